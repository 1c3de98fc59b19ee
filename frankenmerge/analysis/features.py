"""Features by name: which neuron of which block a search is for."""

from collections.abc import Sequence
from typing import NamedTuple

from frankenmerge.errors import Fault, raise_all


class Feature(NamedTuple):
    """One neuron of one block's output."""

    block: int
    """1-based; 0 is the embedding as it enters the first block."""
    neuron: int
    """Its index in the residual stream, 0-based."""


def check_features(features: Sequence[Feature], *, blocks: int, width: int) -> None:
    """Raise FrankenmergeError for features that a donor of `blocks` blocks and `width` neurons does not have, or for none."""
    if not features:
        raise_all([Fault("features", "at least one", "none", "name a block and a neuron")])
    raise_all(
        Fault(f"feature {tuple(feature)}", f"a block in 0..{blocks}, a neuron in 0..{width - 1}", "another", "use a feature the donor has")
        for feature in dict.fromkeys(features)
        if not (0 <= feature[0] <= blocks and 0 <= feature[1] < width)
    )
