"""Scopes: which tensors of a splice are trained."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from frankenmerge.artefacts.recipe import Block, Recipe
from frankenmerge.errors import fail
from frankenmerge.splicing.operations import Operation
from frankenmerge.splicing.resolve import Splice

Scope = Literal["seams", "norms", "lora", "all"]
SCOPES: tuple[Scope, ...] = ("seams", "norms", "lora", "all")
_NORM = re.compile(r"(norm|ln)[^.]*\.(weight|bias)$", re.IGNORECASE)
_TRAINABLE = ("F64", "F32", "F16", "BF16")


def seam_blocks(recipe: Recipe, depths: dict[str, int]) -> list[int]:
    """The blocks on both sides of every seam of a recipe that is spelled out.

    The ends count as seams where the first block was not its donor's first, or the last one not its
    donor's last.

    Args:
        recipe: with slices.
        depths: the donors' numbers of blocks.
    """
    blocks: Sequence[Block] = recipe.blocks
    found = {0} if blocks[0].index != 0 else set()
    for place, (one, other) in enumerate(zip(blocks, blocks[1:], strict=False)):
        if other != (one.model, one.index + 1):
            found |= {place, place + 1}
    last = blocks[-1]
    if last.index != depths[last.model] - 1:
        found.add(len(blocks) - 1)
    return sorted(found)


def spread_blocks(count: int, depth: int) -> list[int]:
    """`count` blocks of `depth`, evenly placed."""
    count = min(count, depth)
    return sorted({int((place + 0.5) * depth / count) for place in range(count)})


def trained_names(splice: Splice, scope: Scope, blocks: Collection[int]) -> list[str]:
    """The names of the tensors that a scope trains.

    A LoRA trains matrices of its own, which are folded into the maps of all blocks; see `adapters`.

    Args:
        splice: what is healed.
        scope: any but `lora`.
        blocks: with `seams`, the blocks that are trained.

    Raises:
        FrankenmergeError: for tensors of a type that cannot be trained, and a scope without any.
    """
    chosen = list(_chosen(splice, scope, blocks))
    if not chosen:
        expected, remedy = f"tensors for --scope {scope}", "choose another --scope"
        raise fail("scope", expected, "none", remedy)
    check_types(chosen)
    return [operation.name for operation in chosen]


def check_types(operations: Sequence[Operation]) -> None:
    """Raise FrankenmergeError for tensors of a type that cannot be trained."""
    for operation in operations:
        if operation.dtype not in _TRAINABLE:
            expected = f"one of {', '.join(_TRAINABLE)}, to be trained"
            raise fail(operation.name, expected, operation.dtype, "heal a plain checkpoint")


def _chosen(splice: Splice, scope: Scope, blocks: Collection[int]) -> Iterator[Operation]:
    for operation in splice.operations:
        role, position, _ = splice.base.architecture.role(operation.name)
        if role in ("rest", "ignored"):
            continue
        if scope == "seams" and position not in blocks:
            continue
        if scope == "norms" and not is_norm(operation):
            continue
        yield operation


def is_norm(operation: Operation) -> bool:
    """Whether a tensor is a norm's gain or bias."""
    return len(operation.shape) == 1 and bool(_NORM.search(operation.name))


def device_of(splice: Splice, operation: Operation, devices: int) -> int:
    """The number of the device that a tensor is on: blocks are spread evenly, in their order."""
    role, position, _ = splice.base.architecture.role(operation.name)
    if position is None:
        return 0 if role == "embedding" else devices - 1
    return position * devices // len(splice.blocks)
