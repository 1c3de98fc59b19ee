"""What running a model costs, from config and headers: operations, and elements in memory.

A product of matrices `[a, b] x [b, c]` counts `2abc` operations. Norms, activations, rotary
positions and rankings are not counted: they are a small part of a large model's time.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from frankenmerge.donors.architecture import Architecture, Config
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import head_width, quantity

_EXPERT = re.compile(r"\bexperts\b")
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields of config.json: experts that a token passes, and experts in a block."""


class Shape(NamedTuple):
    """What the cost of a model depends on; elements are numbers in tensors."""

    width: int
    inner: int
    vocabulary: int
    maps: tuple[int, ...]
    """Elements of the matrices that a token passes, of each block."""
    blocks: tuple[int, ...]
    """Elements of all tensors, of each block."""
    ends: int
    """Elements of everything else: embedding, final norm, head."""
    embedding: int
    """Elements of what enters the first block."""
    head: int
    """Elements of the matrix that makes logits."""
    queries_keys: int
    """Elements of the maps of all blocks that a single position does not need."""
    attention: int
    """Width of all heads together."""

    @property
    def parameters(self) -> int:
        """All elements."""
        return sum(self.blocks) + self.ends

    def through_blocks(self, positions: int, context: int = 1, *, alone: bool = False) -> int:
        """Operations of all blocks.

        Args:
            positions: how many there are in all rows.
            context: positions that each attends to; in causal attention that is computed in full,
                the length of a row.
            alone: whether every row is a single position, whose queries and keys are left out.
        """
        maps = sum(self.maps) - (self.queries_keys if alone else 0)
        attention = 0 if alone else 2 * context * self.attention * len(self.maps)
        return 2 * positions * (maps + attention)

    def to_logits(self, positions: int) -> int:
        """Operations of the head."""
        return 2 * positions * self.head

    def forward(self, positions: int, context: int) -> int:
        """Operations of a pass with logits at every position."""
        return self.through_blocks(positions, context) + self.to_logits(positions)


def shape_of(
    tensors: Mapping[str, tuple[int, ...]], architecture: Architecture, config: Config
) -> Shape:
    """The shape of a model.

    Args:
        tensors: shapes by name.
        architecture: whose names these are.
        config: of the model.
    """
    maps: dict[int, float] = defaultdict(float)
    blocks: dict[int, int] = defaultdict(int)
    others: dict[str, int] = defaultdict(int)
    queries_keys, used = 0, _share_used(config)
    unneeded = tuple(f".{name}." for name in architecture.queries_keys)
    for name, shape in tensors.items():
        role, index, _ = architecture.role(name)
        elements = prod(shape)
        if index is None:
            others[role] += elements if role != "ignored" else 0
            continue
        blocks[index] += elements
        if len(shape) > 1:
            maps[index] += elements * (used if _EXPERT.search(name) else 1)
            queries_keys += elements if any(part in name for part in unneeded) else 0
    width, vocabulary = quantity(config, "width") or 0, quantity(config, "vocabulary") or 0
    order = sorted(blocks)
    return Shape(
        width=width,
        inner=quantity(config, "inner") or 4 * width,
        vocabulary=vocabulary,
        maps=tuple(round(maps[index]) for index in order),
        blocks=tuple(blocks[index] for index in order),
        ends=sum(others.values()),
        embedding=others["embedding"],
        head=vocabulary * width,
        queries_keys=queries_keys,
        attention=(quantity(config, "heads") or 0) * (head_width(config) or 0),
    )


def checkpoint_shape(checkpoint: Checkpoint) -> Shape:
    """The shape of a donor."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return shape_of(shapes, checkpoint.architecture, checkpoint.config)


def _share_used(config: Config) -> float:
    """The share of a block's experts that a token passes; 1 where it is not known."""
    used = next((config[key] for key in _USED if type(config.get(key)) is int), None)
    experts = next((config[key] for key in _EXPERTS if type(config.get(key)) is int), None)
    return used / experts if used and experts else 1.0


class Cost(NamedTuple):
    """What one command costs."""

    operations: float
    memory: Mapping[str, int]
    """Bytes in memory at the peak, by use."""
    read: int
    """Bytes of weights that are read from disk."""
    counts: Mapping[str, int]
    """What the operations are counted from, such as positions."""
    product: tuple[int, int]
    """Width and inner width of the model: the product by which a device is measured."""
    notes: tuple[str, ...] = ()
    """What is not counted."""

    @property
    def total(self) -> int:
        """Bytes in memory together."""
        return sum(self.memory.values())
