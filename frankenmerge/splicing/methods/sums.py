"""Sums over a whole tensor: in float64, in an order that neither chunks nor threads change."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

LANES = 2**13
"""Sums that a tensor's elements are gathered in, side by side: element k of a span adds to sum k %
LANES, so that the order is fixed, as the spans are, and yet many are added at once.
"""


def folded(sums: Array) -> Array:
    """`[n, LANES]` to `[n]`, by halves, which fixes the order."""
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def gathered(gather: Callable[[bool], Array]) -> Array:
    """What `gather` sums: of all elements (False) or, where that gives NaN or Inf, of the finite ones (True).

    So a tensor has its sums where NaN or Inf was let through, which stays in its own elements. A
    second pass when it is needed costs less than a look at every element each time.
    """
    with np.errstate(invalid="ignore"):  # the sum of Inf and -Inf
        found = gather(False)
    return found if np.isfinite(found).all() else gather(True)
