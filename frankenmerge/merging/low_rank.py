"""The best approximation of a matrix by a product of two thin ones, and its actual error.

By Eckart and Young the truncated singular value decomposition has the smallest error of all
matrices of its rank. Exact: eigenvectors of the smaller Gram matrix in float64; projecting onto
them keeps the error optimal to float32's rounding, whatever precision squaring cost the small
singular values. Randomised (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1): a random
subspace of a few more dimensions than needed, improved by power iterations.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from frankenmerge.merging.matrices import Matrix

if TYPE_CHECKING:
    import numpy as np

OVERSAMPLING, POWER_ITERATIONS = 10, 3
"""Dimensions of the random subspace beyond the rank, and passes that turn it to the largest
singular vectors.
"""
LARGE, THIN = 256, 4
"""A subspace is sampled for matrices with at least `LARGE` rows and columns and at least `THIN`
times its dimensions; otherwise the exact decomposition is as fast.
"""
_FIRST = 40
"""Dimensions of the first subspace that is tried where the rank is not given."""
_UNSURE = 1e-5
"""Share of the squared norm that float32 arithmetic may be wrong by, with room to spare."""


@dataclass(frozen=True)
class Goal:
    """What an approximation is for: a rank, or the smallest rank that leaves out little enough."""

    rank: int | None = None
    left_out: float | None = None
    """Largest share of the squared norm that may be left out; None where the rank is given."""


class Approximation(NamedTuple):
    """Two factors of a matrix, `left [m, r] @ right [r, n]`, scaled alike."""

    left: "np.ndarray"
    right: "np.ndarray"

    @property
    def rank(self) -> int:
        """Their inner dimension."""
        return self.right.shape[0]


def approximation(matrix: Matrix, goal: Goal, seed: tuple[int, ...]) -> Approximation:
    """The factors of a matrix that is not zero, in float32.

    A rank above the matrix becomes the matrix's own. With `goal.left_out` the rank is the smallest
    that there is: where a sampled subspace does not prove that, the decomposition is exact.

    Args:
        matrix: what to approximate.
        goal: of the approximation.
        seed: of the random subspace.
    """
    smaller = min(matrix.shape)
    if goal.rank is not None:
        sampled = min(goal.rank, smaller) + OVERSAMPLING
        if smaller >= LARGE and THIN * sampled <= smaller:
            return _truncated(*_subspace(matrix, sampled, seed), goal.rank)
        return _exact(matrix, goal)
    if smaller >= LARGE and (goal.left_out or 0) > _UNSURE:
        total = matrix.squared_norm()
        for dimensions in (_FIRST, smaller // (2 * THIN)):
            basis, rest = _subspace(matrix, min(dimensions, smaller), seed)
            if rank := _proven_rank(rest, total, goal.left_out or 0):
                return _truncated(basis, rest, rank)
    return _exact(matrix, goal)


def _subspace(
    matrix: Matrix, dimensions: int, seed: tuple[int, ...]
) -> "tuple[np.ndarray, np.ndarray]":
    """An orthonormal basis `Q [m, k]` of nearly the largest singular vectors, and `Q.T D`."""
    import numpy as np

    random = np.random.default_rng(seed)
    start = random.standard_normal((matrix.shape[1], dimensions), np.float32)
    basis = np.linalg.qr(matrix.times(start))[0]
    for _ in range(POWER_ITERATIONS):
        other = np.linalg.qr(matrix.transposed_times(basis))[0]
        basis = np.linalg.qr(matrix.times(other))[0]
    return basis, np.ascontiguousarray(matrix.transposed_times(basis).T)


def _proven_rank(rest: "np.ndarray", total: float, left_out: float) -> int | None:
    """The smallest rank that leaves out so little, if the subspace proves it.

    With `R` the part of `D` outside the subspace, the `k` largest squared singular values of `D`
    sum to at most those of `rest` plus the squared norm of `R` (Ky Fan): if even that is too little
    for one rank less, no subspace would do with less.
    """
    import numpy as np

    kept = np.cumsum(np.linalg.svd(rest, compute_uv=False).astype(np.float64) ** 2) / total
    enough = np.flatnonzero(kept >= 1 - left_out + _UNSURE)
    if not enough.size:
        return None
    rank, outside = int(enough[0]) + 1, max(0.0, 1 - kept[-1])
    below = kept[rank - 2] if rank > 1 else 0.0
    return rank if below + outside < 1 - left_out - _UNSURE else None


def _truncated(basis: "np.ndarray", rest: "np.ndarray", rank: int) -> Approximation:
    """The best rank within a subspace: `basis [m, k] @ rest [k, n]`, truncated."""
    import numpy as np

    left, sizes, right = np.linalg.svd(rest, full_matrices=False)
    roots = np.sqrt(sizes[:rank])
    return Approximation(basis @ left[:, :rank] * roots, roots[:, None] * right[:rank])


def _exact(matrix: Matrix, goal: Goal) -> Approximation:
    """Project onto eigenvectors of the smaller Gram matrix."""
    import numpy as np

    values, vectors = matrix.eigen()
    rank = min(goal.rank, len(values)) if goal.rank else _rank(values, goal.left_out or 0)
    chosen = np.ascontiguousarray(vectors[:, :rank], np.float32)
    # The fourth root of an eigenvalue shares the singular value out to both factors.
    roots = np.maximum(values[:rank], np.finfo(np.float64).tiny).astype(np.float64) ** 0.25
    roots = np.maximum(roots, 1e-4 * roots[0]).astype(np.float32)
    if matrix.shape[0] >= matrix.shape[1]:
        return Approximation(matrix.times(chosen) / roots, roots[:, None] * chosen.T)
    right = matrix.transposed_times(chosen).T
    return Approximation(chosen * roots, np.ascontiguousarray(right) / roots[:, None])


def _rank(values: "np.ndarray", left_out: float) -> int:
    """The smallest rank that leaves out at most this share of the sum of eigenvalues."""
    import numpy as np

    noise = len(values) * np.finfo(np.float64).eps * values[0]
    sizes = np.where(values > noise, values, 0.0)
    tails = np.append(np.cumsum(sizes[::-1])[::-1], 0.0)
    return max(1, int(np.argmax(tails <= left_out * tails[0])))


def relative_error(matrix: Matrix, left: "np.ndarray", right: "np.ndarray") -> float:
    """The Frobenius norm of what the factors leave out, over the matrix's own."""
    return math.sqrt(matrix.squared_distance(left, right) / matrix.squared_norm())
