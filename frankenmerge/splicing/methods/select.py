"""Exact order statistics of a tensor that is read in chunks, without sorting.

The bits of nonnegative float32 numbers order as the numbers do, so the k-th largest is found digit
by digit: its upper 16 bits by counting in one pass, then, in a second, its lower 16 bits among the
elements with the same upper bits. Part of a third pass finds the index. Of equal elements, the one
with the lowest index ranks first, so that ranks are distinct. This module decides; the callers read
the tensor and count.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LARGEST = 2**31 - 1
DIGITS = 2**16

Counts = np.ndarray[Any, np.dtype[np.int64]]


class Order(NamedTuple):
    """Queries about the keys of a tensor, which are the bits of its magnitudes."""

    uppers: Callable[[], Counts]
    """Counts `[DIGITS]` of the keys by their upper half."""
    lowers: Callable[[Sequence[int]], list[Counts]]
    """For each of several upper halves, counts `[DIGITS]` of its keys by their lower half."""
    index: Callable[[int, int], int]
    """The index of the nth element, counted from 0, that has a key."""


class Rank(NamedTuple):
    """An element in the order."""

    key: int
    index: int
    """Its index in the tensor."""


def kth_largest(order: Order, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return, for every rank, its key and the number of elements with that key that rank before it.

    Rank 0 is the largest.
    """
    counts = order.uppers()
    tops = [_find(counts, rank) for rank in ranks]
    uppers = sorted({upper for upper, _ in tops})
    lower = dict(zip(uppers, order.lowers(uppers), strict=True))
    result = []
    for upper, before in tops:
        digit, left = _find(lower[upper], before)
        result.append((upper * DIGITS + digit, left))
    return result


def _find(counts: Counts, rank: int) -> tuple[int, int]:
    """Return the digit of the element at `rank` (0: largest) and its rank within the digit."""
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, rank, side="right"))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def boundaries(order: Order, size: int, ranks: Sequence[int]) -> list[Rank]:
    """Return the elements at `ranks` in descending order, each from 0 to `size` (after all)."""
    inner = [rank for rank in ranks if 0 < rank < size]
    keys = iter(kth_largest(order, inner) if inner else [])
    result = []
    for rank in ranks:
        if rank <= 0:
            result.append(Rank(LARGEST, 0))
        elif rank >= size:
            result.append(Rank(0, size))
        else:
            key, before = next(keys)
            result.append(Rank(key, order.index(key, before)))
    return result
