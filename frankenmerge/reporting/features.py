"""Tables of features: the first neurons of some blocks, with their top-activating tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.atlas import Atlas

NEURONS, BLOCKS, TOKENS = 16, 9, 5
"""Neurons, blocks and tokens of each that are shown."""


class Features(NamedTuple):
    """The top-activating tokens of a donor's neurons, from an atlas or an alignment."""

    donor: str
    fingerprint: str
    tokens: np.ndarray
    """Ids `[l+1, d, k]`, the best first."""
    vocabulary: list[str]
    provenance: dict[str, str]
    """What produced them."""


class Chip(NamedTuple):
    """A token, and whether another donor has it for the same neuron after the same block."""

    text: str
    shared: bool


class Table(NamedTuple):
    """The features after one block, by neuron."""

    block: int
    rows: list[tuple[int, list[list[Chip]]]]
    """(neuron, each donor's tokens)."""


def features_of(atlas: Atlas) -> Features:
    """Return the features that a page shows of an atlas."""
    tokens = next(iter(atlas.top.values())).tokens[:, :NEURONS]
    provenance = {"fingerprint": atlas.fingerprint} | {
        str(key): str(value) for key, value in atlas.provenance.items()
    }
    control = "" if atlas.provenance.get("untrained") is None else " (untrained)"
    return Features(atlas.donor + control, atlas.fingerprint, tokens, atlas.vocabulary, provenance)


def aligned_features(alignment: Alignment) -> list[Features]:
    """Return the features of both donors of an alignment, for runs without an atlas."""
    parts = zip(alignment.donors, alignment.fingerprints, alignment.tokens, strict=True)
    return [
        Features(donor, fingerprint, tokens[:, :NEURONS], alignment.vocabulary, {})
        for donor, fingerprint, tokens in parts
    ]


def feature_tables(donors: Sequence[Features]) -> list[Table]:
    """Compare the donors' features block by block.

    Of deep donors, `BLOCKS` evenly spaced blocks are shown, the first and the last included.
    """
    deepest = max(len(donor.tokens) for donor in donors)
    blocks = np.unique(
        np.linspace(0, deepest - 1, min(deepest, BLOCKS)).round().astype(int)
    ).tolist()
    return [
        Table(block, [(neuron, _row(donors, block, neuron)) for neuron in range(_width(donors))])
        for block in blocks
    ]


def _width(donors: Sequence[Features]) -> int:
    return min(NEURONS, max(donor.tokens.shape[1] for donor in donors))


def _row(donors: Sequence[Features], block: int, neuron: int) -> list[list[Chip]]:
    lists = [_texts(donor, block, neuron) for donor in donors]
    others = [
        {text for n, texts in enumerate(lists) if n != number for text in texts}
        for number in range(len(lists))
    ]
    return [
        [Chip(text, text in other) for text in texts[:TOKENS]]
        for texts, other in zip(lists, others, strict=True)
    ]


def _texts(donor: Features, block: int, neuron: int) -> list[str]:
    blocks, width, _ = donor.tokens.shape
    ids: list[int] = (
        donor.tokens[block, neuron].tolist() if block < blocks and neuron < width else []
    )
    return [
        donor.vocabulary[token] if 0 <= token < len(donor.vocabulary) else f"#{token}"
        for token in ids
    ]
