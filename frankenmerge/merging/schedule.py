"""What a recipe means, tensor by tensor. Touches no tensor data."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from frankenmerge.architectures import is_tied
from frankenmerge.checkpoint import BYTES_OF, Checkpoint, Tensor
from frankenmerge.recipe import Recipe
from frankenmerge.splice import untied
from frankenmerge.vocabulary import Rows


class Copy(NamedTuple):
    """One tensor of the result: the bytes of one tensor of a donor."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The donor's."""
        return self.tensor.shape

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.tensor.bytes


class Input(NamedTuple):
    """What one model gives to a tensor of the result."""

    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    parameters: dict[str, Any]
    """The method's parameters of single models, for this tensor at this depth."""
    rows: Rows | None = None
    """Where embedding and head are put together token by token: what stands in place of `tensor`."""


class Combine(NamedTuple):
    """One tensor of the result: computed from tensors of donors in float32 or better, rounded once to `dtype`."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    method: str
    """An entry of METHODS."""
    inputs: tuple[Input, ...]
    base: Input | None
    """The base model's, where the method has one; it is none of the inputs."""
    parameters: dict[str, Any]
    """The method's parameters of the whole, for this tensor at this depth."""
    seed: int
    """Draws what a method drops at random: another for every tensor, the same at every run."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)


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
