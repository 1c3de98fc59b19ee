"""What a recipe means, tensor by tensor. Touches no tensor data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from frankenmerge.architectures import is_tied
from frankenmerge.checkpoint import Checkpoint, Tensor
from frankenmerge.recipe import Recipe
from frankenmerge.splice import untied


class Copy(NamedTuple):
    """One tensor of the result: the bytes of one tensor of a donor."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor


class Input(NamedTuple):
    """One donor's part in a computed tensor."""

    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    parameters: dict[str, Any]
    """This donor's: weight, density, ..."""


class Combine(NamedTuple):
    """One tensor of the result: computed from tensors of several donors."""

    name: str
    dtype: str
    """The type it is rounded to, as safetensors names it."""
    shape: tuple[int, ...]
    method: str
    inputs: tuple[Input, ...]
    base: Input | None
    parameters: dict[str, Any]
    """The method's own: t, lambda, normalize, ..."""
    seed: int


Operation = Copy | Combine


def schedule(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> list[Copy]:
    """List the result's tensors in layer order: embedding, blocks, final norm, head.

    The embedding is the first slice's donor's, final norm and head are the last one's; a tied head that must part from
    its embedding is written out.
    """
    first, last = recipe.sources[0].model, recipe.sources[-1].model
    copies = _copies(donors[first], first, "embedding", None, None)
    for position, block in enumerate(recipe.blocks):
        copies += _copies(donors[block.model], block.model, "block", block.index, position)
    copies += _copies(donors[last], last, "final", None, None)
    if untied(recipe, donors):
        copies += _head(donors[last], last)
    return copies


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
