"""Features by name: which outputs of which block to maximise.

The notation is that of the source document, see docs/method.md.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from frankenmerge.errors import Fault, fail, raise_all

_PART = re.compile(r":|\d+|\d+\s*:\s*\d+|\d+\s*-\s*\d+")
_GRAMMAR = (
    "`[:, positions, neurons]`, both `:`, `2`, `0:4` (0 to 3 as one feature) "
    "or `0-3` (0 to 3, one feature each)"
)


@dataclass(frozen=True)
class Feature:
    """A block's output `[s, d]` summed over neurons and positions, which one input maximises."""

    block: int
    """1-based; 0 is what enters the first block."""
    neurons: range
    """Indices of the residual stream, maximised together."""
    positions: range | None = None
    """Positions of the input; all of them when None."""

    @classmethod
    def of(cls, block: int, neuron: int) -> "Feature":
        """The feature of one neuron at all positions."""
        return cls(block, range(neuron, neuron + 1))

    @property
    def neuron(self) -> int:
        """The neuron's index, for a feature of one."""
        (index,) = self.neurons
        return index

    @property
    def notation(self) -> str:
        """As the source document writes it, without the block."""
        positions = ":" if self.positions is None else _slice(self.positions)
        return f"[:, {positions}, {_slice(self.neurons)}]"

    def __str__(self) -> str:
        return f"block {self.block} {self.notation}"


def parse_features(notation: str, block: int, width: int) -> list[Feature]:
    """Parse the source document's notation, such as `[:, :, 0-3]`, `[:, 2, 7]`, or `[:, 0-2, :]`.

    `0:4` is one feature of four neurons (or positions), `0-3` is four features, as in the
    source document's tables.

    Args:
        notation: the text to parse.
        block: the block of the features.
        width: the neurons that `:` stands for.

    Returns:
        The features in reading order, positions before neurons.

    Raises:
        FrankenmergeError: if it is not that notation.
    """
    parts = [
        part.strip() for part in notation.strip().removeprefix("[").removesuffix("]").split(",")
    ]
    bracketed = notation.strip().startswith("[") and notation.strip().endswith("]")
    if (
        not bracketed
        or len(parts) != 3
        or parts[0] != ":"
        or not all(_PART.fullmatch(part) for part in parts)
    ):
        raise fail(
            "features",
            _GRAMMAR,
            notation,
            "write, for example, `[:, :, 0-3]` for the first four neurons",
        )
    positions = [None] if parts[1] == ":" else _ranges(parts[1])
    neurons = [range(width)] if parts[2] == ":" else _ranges(parts[2])
    if not all(neurons) or not all(chosen is None or chosen for chosen in positions):
        raise fail(
            "features",
            "ranges that are not empty",
            notation,
            "make every range end after its start",
        )
    return [Feature(block, chosen, position) for position, chosen in product(positions, neurons)]


def check_features(features: Sequence[Feature], *, blocks: int, width: int, tokens: int) -> None:
    """Check that there are features, and that a model and an input of these sizes have them.

    Raises:
        FrankenmergeError: with every fault.
    """
    faults = (
        [] if features else [Fault("features", "at least one", "none", "name a block and a neuron")]
    )
    for feature in features:
        block = range(feature.block, feature.block + 1)
        faults += _outside("features: block", block, blocks + 1, "choose a block the model has")
        faults += _outside(
            f"{feature.notation}: neuron",
            feature.neurons,
            width,
            "choose a neuron of the residual stream",
        )
        positions = range(tokens) if feature.positions is None else feature.positions
        faults += _outside(
            f"{feature.notation}: position",
            positions,
            tokens,
            "search for more tokens, or choose an earlier position",
        )
    raise_all(dict.fromkeys(faults))


def check_single(features: Sequence[Feature], why: str) -> None:
    """Check that every feature is one neuron at all positions; `why` explains the limit.

    Raises:
        FrankenmergeError: with every fault.
    """
    expected = "one neuron at all positions, such as `[:, :, 3]`"
    raise_all(
        Fault(notation, expected, "several neurons" if several else "chosen positions", why)
        for notation, several, positions in dict.fromkeys(
            (f.notation, len(f.neurons) > 1, f.positions) for f in features
        )
        if several or positions is not None
    )


def _outside(place: str, chosen: range, size: int, remedy: str) -> list[Fault]:
    if chosen and min(chosen) >= 0 and max(chosen) < size:
        return []
    return [Fault(place, f"within 0 to {size - 1}", _slice(chosen) if chosen else "none", remedy)]


def _ranges(part: str) -> list[range]:
    first, _, last = (
        (piece.strip() for piece in re.split(r"([:-])", part))
        if re.search("[:-]", part)
        else (part, "", part)
    )
    if ":" in part:
        return [range(int(first), int(last))]
    return [range(index, index + 1) for index in range(int(first), int(last) + 1)] or [range(0)]


def _slice(chosen: range) -> str:
    return str(chosen.start) if len(chosen) == 1 else f"{chosen.start}:{chosen.stop}"
