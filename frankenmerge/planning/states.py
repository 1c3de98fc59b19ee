"""All donors' states together, from alignments of pairs."""

from collections.abc import Sequence

import numpy as np

from frankenmerge.alignment import Alignment
from frankenmerge.errors import Fault, raise_all
from frankenmerge.planning.prediction import States


def states_of(alignments: Sequence[Alignment]) -> States:
    """Put the donors' inner products together; donors of which no alignment is given are taken to share nothing.

    Raises:
        FrankenmergeError: for alignments without inner products, made by an earlier version.
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
    blocks = {name: count for alignment in alignments for name, count in zip(alignment.donors, alignment.blocks, strict=True)}
    first, total = {}, 0
    for name, count in blocks.items():
        first[name], total = total, total + count + 1
    gram = np.zeros((total, total))
    for alignment in alignments:
        places = np.concatenate([first[name] + np.arange(blocks[name] + 1) for name in alignment.donors])
        gram[np.ix_(places, places)] = alignment.gram
    return States(first, blocks, gram)
