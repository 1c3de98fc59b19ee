"""The states of all donors together, from alignments of pairs."""

from collections.abc import Sequence

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.errors import Fault, raise_all
from frankenmerge.planning.prediction import States


def states_of(alignments: Sequence[Alignment]) -> States:
    """Combine the donors' inner products.

    States of two donors without an alignment are taken as orthogonal.

    Raises:
        FrankenmergeError: for alignments of an earlier version, without inner products.
    """
    raise_all(
        Fault(
            " | ".join(alignment.donors),
            "an alignment with the donors' inner products",
            "one of an earlier version",
            "align the donors again",
        )
        for alignment in alignments
        if alignment.gram is None
    )
    blocks = {
        name: count
        for alignment in alignments
        for name, count in zip(alignment.donors, alignment.blocks, strict=True)
    }
    first, total = {}, 0
    for name, count in blocks.items():
        first[name], total = total, total + count + 1
    places = {name: first[name] + np.arange(count + 1) for name, count in blocks.items()}
    own: dict[str, list[np.ndarray]] = {name: [] for name in blocks}
    for alignment in alignments:
        middle = alignment.blocks[0] + 1
        for name, part in zip(
            alignment.donors, (slice(None, middle), slice(middle, None)), strict=True
        ):
            own[name].append(_gram(alignment)[part, part])
    gram = np.zeros((total, total))
    for name, parts in own.items():
        gram[np.ix_(places[name], places[name])] = np.mean(parts, axis=0)
    # A donor's states have a different unit in every alignment, so only the cosines between two
    # donors are comparable.
    size = np.sqrt(gram.diagonal())
    for alignment in alignments:
        (a, b), middle = (places[name] for name in alignment.donors), alignment.blocks[0] + 1
        if alignment.donors[0] != alignment.donors[1]:
            between = _cosines(_gram(alignment))[:middle, middle:] * np.outer(size[a], size[b])
            gram[np.ix_(a, b)], gram[np.ix_(b, a)] = between, between.T
    return States(first, blocks, gram)


def _gram(alignment: Alignment) -> np.ndarray:
    assert alignment.gram is not None
    return alignment.gram


def _cosines(gram: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum(gram.diagonal(), 1e-24))
    return gram / np.outer(size, size)
