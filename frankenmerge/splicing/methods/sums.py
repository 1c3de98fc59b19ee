"""Sums over a whole tensor, in float64, whose order does not depend on chunks or threads."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

LANES = 2**13
"""Number of parallel sums: element k of a span is added to sum k % LANES. So the order is fixed, as
the spans are, and many elements are added at once.
"""


def folded(sums: Array) -> Array:
    """Reduce `[n, LANES]` to `[n]`, by halves, which fixes the order."""
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def finite_sums(sums: Callable[[bool], Array]) -> Array:
    """Return the sums of all elements or, if those are not finite, of the finite elements.

    So NaN and Inf that were allowed affect only their own elements of the result. A second pass, if
    needed, costs less than checking every element each time.

    Args:
        sums: the sums of all elements (False) or of the finite ones (True).
    """
    with np.errstate(invalid="ignore"):  # the sum of Inf and -Inf
        total = sums(False)
    return total if np.isfinite(total).all() else sums(True)
