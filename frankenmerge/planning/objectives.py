"""What a seam costs, from an alignment alone."""

from typing import NamedTuple

import numpy as np

from frankenmerge.alignment import Alignment


class Objective(NamedTuple):
    """How scores become predicted damage."""

    score: str = "jaccard"
    """Which score of the alignment to trust."""
    skipped: float = 0.5
    """Cost of every block skipped at a seam."""


def seam_costs(alignment: Alignment, objective: Objective) -> np.ndarray:
    """Cost `[l_a+1, l_b+1]` of leaving A after `i` blocks and entering B before its block `j`.

    `1 - score[i, j] + skipped * max(0, j - i)`: misalignment of what B's block will read with what it would have read at
    home, and a penalty for blocks that neither donor contributes.
    """
    matrix = alignment.scores[objective.score].matrix.astype(np.float64)
    left, entered = np.indices(matrix.shape)
    return 1 - matrix + objective.skipped * np.maximum(0, entered - left)
