"""Tables of features, as far as a page can show them: the first neurons of some blocks, with their tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.atlas import Atlas

NEURONS, BLOCKS, TOKENS = 16, 9, 5
"""Neurons, blocks and tokens of each that are shown."""


class Features(NamedTuple):
    """What excites a donor's neurons, from an atlas or an alignment."""

    donor: str
    fingerprint: str
    tokens: np.ndarray
    """Ids `[l+1, d, k]`, the best first."""
    vocabulary: list[str]
    told: dict[str, str]
    """What it was made with, for the provenance."""


class Chip(NamedTuple):
    """A token, and whether another donor has it for the same neuron of the same block."""

    text: str
    shared: bool


class Table(NamedTuple):
    """The features of one block, neuron by neuron."""

    block: int
    rows: list[tuple[int, list[list[Chip]]]]
    """(neuron, each donor's tokens)."""


def features_of(atlas: Atlas) -> Features:
    """Take from an atlas what a page shows of it."""
    tokens = next(iter(atlas.top.values())).tokens[:, :NEURONS]
    told = {"fingerprint": atlas.fingerprint} | {
        str(key): str(value) for key, value in atlas.provenance.items()
    }
    control = "" if atlas.provenance.get("untrained") is None else " (untrained)"
    return Features(atlas.donor + control, atlas.fingerprint, tokens, atlas.vocabulary, told)


def aligned_features(alignment: Alignment) -> list[Features]:
    """The same of both donors of an alignment, for runs that keep no atlas."""
    parts = zip(alignment.donors, alignment.fingerprints, alignment.tokens, strict=True)
    return [
        Features(donor, fingerprint, tokens[:, :NEURONS], alignment.vocabulary, {})
        for donor, fingerprint, tokens in parts
    ]


def feature_tables(donors: Sequence[Features]) -> list[Table]:
    """Set the donors side by side, block by block; of deep donors evenly spaced blocks, the first and the last among them."""
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
    found = [_texts(donor, block, neuron) for donor in donors]
    others = [
        {text for n, texts in enumerate(found) if n != number for text in texts}
        for number in range(len(found))
    ]
    return [
        [Chip(text, text in other) for text in texts[:TOKENS]]
        for texts, other in zip(found, others, strict=True)
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
