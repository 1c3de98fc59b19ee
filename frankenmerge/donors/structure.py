"""A donor's tensors compared with its config.

Every block must exist, blocks of a kind must be alike, and embedding, norm and head must have the
shapes that follow from config.json.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from frankenmerge.donors.config import block_kind, quantity
from frankenmerge.donors.sizes import size_faults
from frankenmerge.errors import Fault

if TYPE_CHECKING:
    from frankenmerge.donors.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of one block's tensors by canonical name."""
_REMEDY = "use a complete checkpoint whose config.json belongs to its weights"


def structure_faults(checkpoint: "Checkpoint") -> Iterator[Fault]:
    """Compare the tensors with the config.

    Raises FrankenmergeError for a tensor whose role is not known.
    """
    roles, place = checkpoint.by_role, str(checkpoint.path)
    known = {name for names in roles.values() for name in names.values()}
    for name in sorted(set(checkpoint.tensors) - known):
        yield Fault(
            f"{place}: {name}",
            "each tensor under one name",
            "a second name of the same tensor",
            _REMEDY,
        )
    if checkpoint.blocks > len(checkpoint.tensors):
        yield Fault(
            place,
            f"tensors of {checkpoint.blocks:,} blocks",
            f"{len(checkpoint.tensors):,} in all",
            _REMEDY,
        )
        return
    if checkpoint.blocks:
        yield from _missing_blocks(checkpoint)
    empty = tuple(_empty_tensors(checkpoint))
    yield from empty
    if not checkpoint.architecture.listed or empty:
        return
    shapes = {
        index: {canonical: checkpoint.tensors[name].shape for canonical, name in names.items()}
        for (role, index), names in roles.items()
        if role == "block" and index is not None and index < checkpoint.blocks
    }
    kinds: dict[tuple, dict[int, Shapes]] = {}
    for index, block in sorted(shapes.items()):
        kinds.setdefault(block_kind(checkpoint.config, index), {})[index] = block
    unlike = []
    for blocks in kinds.values():
        yield from _unequal_names(blocks, place)
        unlike += _unequal_shapes(blocks, place)
    yield from unlike or size_faults(checkpoint)
    yield from _marker_faults(checkpoint, shapes)
    for role, needed in (
        ("embedding", True),
        ("final", True),
        ("head", not checkpoint.tied),
    ):
        names = roles.get((role, None), {})
        if needed and not names:
            yield Fault(place, f"tensors of the {role}", "none", _REMEDY)
        for canonical, name in names.items():
            yield from _outer_faults(checkpoint, role, canonical, name)


def _empty_tensors(checkpoint: "Checkpoint") -> Iterator[Fault]:
    """Tensors without elements, but for those that no loader reads."""
    for name, tensor in checkpoint.tensors.items():
        if 0 in tensor.shape and not re.search(checkpoint.architecture.unread, name):
            found = f"shape {list(tensor.shape)}"
            yield Fault(f"{checkpoint.path}: {name}", "a tensor with elements", found, _REMEDY)


def _missing_blocks(checkpoint: "Checkpoint") -> Iterator[Fault]:
    """Blocks without tensors, and tensors of blocks that config.json does not have."""
    present = {index for role, index in checkpoint.by_role if role == "block"}
    place, expected = str(checkpoint.path), f"tensors of {checkpoint.blocks} blocks"
    if missing := sorted(set(range(checkpoint.blocks)) - present):
        yield Fault(place, expected, f"none of block {', '.join(map(str, missing))}", _REMEDY)
    if extra := sorted(
        index for index in present if index is not None and index >= checkpoint.blocks
    ):
        yield Fault(place, expected, f"some of block {', '.join(map(str, extra))}", _REMEDY)


def _unequal_names(blocks: Mapping[int, Shapes], place: str) -> Iterator[Fault]:
    """Tensors that only some of the blocks of a kind have."""
    counts = Counter(canonical for shapes in blocks.values() for canonical in shapes)
    for index, shapes in sorted(blocks.items()):
        for canonical, count in counts.items():
            usual = 2 * count >= len(blocks)
            if usual and canonical not in shapes:
                yield Fault(
                    f"{place}: {canonical.format(index)}",
                    "a tensor that other blocks have",
                    "missing",
                    _REMEDY,
                )
            if not usual and canonical in shapes:
                yield Fault(
                    f"{place}: {canonical.format(index)}",
                    "a tensor of most blocks",
                    f"only in {count} of {len(blocks)}",
                    _REMEDY,
                )


def _unequal_shapes(blocks: Mapping[int, Shapes], place: str) -> Iterator[Fault]:
    """Tensors of another shape than in the other blocks of a kind."""
    names = dict.fromkeys(canonical for shapes in blocks.values() for canonical in shapes)
    usual = {
        canonical: Counter(
            shapes[canonical] for shapes in blocks.values() if canonical in shapes
        ).most_common(1)[0][0]
        for canonical in names
    }
    for index, shapes in sorted(blocks.items()):
        for canonical, shape in shapes.items():
            if shape != usual[canonical]:
                yield Fault(
                    f"{place}: {canonical.format(index)}",
                    f"shape {usual[canonical]}, as in the other blocks",
                    f"shape {shape}",
                    _REMEDY,
                )


def _marker_faults(checkpoint: "Checkpoint", blocks: Mapping[int, Shapes]) -> Iterator[Fault]:
    """Blocks whose tensors are of another kind than config.json says."""
    for part in checkpoint.architecture.per_block:
        if not part.marker:
            continue
        for index, shapes in blocks.items():
            in_config = bool(part.of(checkpoint.config, index))
            in_tensors = any(part.marker in canonical for canonical in shapes)
            if in_config != in_tensors:
                expected, found = (
                    f"{'' if present else 'no '}{part.marker} in block {index}"
                    for present in (in_config, in_tensors)
                )
                yield Fault(f"{checkpoint.path}: {part.key}", expected, found, _REMEDY)


def _outer_faults(
    checkpoint: "Checkpoint", role: str, canonical: str, name: str
) -> Iterator[Fault]:
    """Compare the shape of a tensor outside the blocks with width and vocabulary in config.json."""
    config, architecture = checkpoint.config, checkpoint.architecture
    shape, place = checkpoint.tensors[name].shape, f"{checkpoint.path}: {name}"
    width, vocabulary = quantity(config, "width"), quantity(config, "vocabulary")
    is_positions = role == "embedding" and canonical.removeprefix(architecture.root).startswith(
        architecture.embedding[1:]
    )
    rows = quantity(config, "positions" if is_positions else "vocabulary")
    if shape and shape[-1] not in (width, vocabulary):
        expected = f"last axis {width}, the width in config.json"
        yield Fault(place, expected, f"shape {shape}", _REMEDY)
    if len(shape) == 2 and shape[0] != rows:
        yield Fault(place, f"first axis {rows}, as in config.json", f"shape {shape}", _REMEDY)
