"""What a recipe means, tensor by tensor. Touches no tensor data."""

from collections.abc import Mapping
from typing import NamedTuple

from frankenmerge.architectures import is_tied
from frankenmerge.checkpoint import Checkpoint, Tensor
from frankenmerge.gauge import Meeting, meeting
from frankenmerge.recipe import Recipe
from frankenmerge.splice import untied


class Copy(NamedTuple):
    """One tensor of the result: the bytes of one tensor of a donor."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor


class Rotate(NamedTuple):
    """One tensor of the result: a donor's, turned to another basis of the residual stream and rounded once, to its own type."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    met: Meeting
    gain: Tensor | None
    """The norm's gain that it takes in."""
    part: int
    """The slice whose turn is meant."""


Operation = Copy | Rotate


def schedule(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> list[Operation]:
    """List the result's tensors in layer order: embedding, blocks, final norm, head.

    The embedding is the first slice's donor's, final norm and head are the last one's; a tied head that must part from
    its embedding is written out.
    """
    first, last = recipe.sources[0].model, recipe.sources[-1].model
    ends = len(recipe.slices) - 1
    operations = _turned(recipe, donors, _copies(donors[first], first, "embedding", None, None), 0)
    position = 0
    for number, source in enumerate(recipe.sources):
        for index in range(*source.layer_range):
            copies = _copies(donors[source.model], source.model, "block", index, position)
            operations += _turned(recipe, donors, copies, number)
            position += 1
    operations += _turned(recipe, donors, _copies(donors[last], last, "final", None, None), ends)
    if untied(recipe, donors):
        operations += _turned(recipe, donors, _head(donors[last], last), ends)
    return operations


def _turned(recipe: Recipe, donors: Mapping[str, Checkpoint], copies: list[Copy], part: int) -> list[Operation]:
    """The copies, as operations of a slice that is turned where the recipe says so."""
    if recipe.slices[part].gauge is None:
        return list(copies)
    operations: list[Operation] = []
    for copy in copies:
        donor = donors[copy.donor]
        architecture = donor.architecture
        # A tied head is stored under the embedding's name: how it meets the stream goes by the name it gets.
        _, index, canonical = architecture.role(copy.source if architecture.role(copy.name)[0] == "block" else copy.name)
        met = meeting(architecture, canonical)
        gains = donor.by_role["final", None] if index is None else donor.by_role["block", index]
        gain = donor.tensors[gains[met.gain]] if met.gain else None
        operations.append(copy if met.kind == "inside" else Rotate(*copy, met, gain, part))
    return operations


def _copies(donor: Checkpoint, name: str, role: str, index: int | None, position: int | None) -> list[Copy]:
    names = donor.by_role.get((role, index), {})
    return [Copy(canonical.format(position), name, source, donor.tensors[source]) for canonical, source in sorted(names.items())]


def _head(donor: Checkpoint, name: str) -> list[Copy]:
    """The donor's head; for a tied donor its embedding matrix under the head's name.

    A tied checkpoint may store a head too; loaders use the embedding, and so does this.
    """
    if not is_tied(donor.config):
        return _copies(donor, name, "head", None, None)
    architecture = donor.architecture
    source = donor.by_role["embedding", None][f"{architecture.root}{architecture.embedding[0]}weight"]
    return [Copy(f"{architecture.head}weight", name, source, donor.tensors[source])]
