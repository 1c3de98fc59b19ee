"""Exact order statistics of a tensor that is read in chunks: two passes and a part of a third, and no sorting.

The bits of a float32 that is not negative order as the numbers do, so the k-th largest is found
digit by digit: its upper 16 bits by counting, in one pass, then its lower 16 bits among the
elements that share the upper. Of equal elements the one with the lowest index ranks first, so that
ranks are distinct. Here are the decisions; who reads the tensor counts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LARGEST = 2**31 - 1
DIGITS = 2**16

Counts = np.ndarray[Any, np.dtype[np.int64]]


class Order(NamedTuple):
    """What must be known of a tensor's keys, the bits of magnitudes."""

    uppers: Callable[[], Counts]
    """How many keys have each upper half, `[DIGITS]`."""
    lowers: Callable[[Sequence[int]], list[Counts]]
    """Of the keys of every upper half that is asked for how many have each lower half, `[DIGITS]`.
    """
    index: Callable[[int, int], int]
    """Where the nth (from 0) element of a key is."""


class Rank(NamedTuple):
    """An element by its place in the order."""

    key: int
    index: int
    """Its index among all elements."""


def kth_largest(order: Order, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """For every rank (0: the largest) the key there, and how many elements of that key rank before it."""
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
    """The digit that holds the `rank`-th element from the largest down, and that element's rank within the digit."""
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, rank, side="right"))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def boundaries(order: Order, size: int, ranks: Sequence[int]) -> list[Rank]:
    """The elements at `ranks` in descending order, each 0 to `size`; `size` itself stands behind all."""
    inner = [rank for rank in ranks if 0 < rank < size]
    found = iter(kth_largest(order, inner) if inner else [])
    result = []
    for rank in ranks:
        if rank <= 0:
            result.append(Rank(LARGEST, 0))
        elif rank >= size:
            result.append(Rank(0, size))
        else:
            key, before = next(found)
            result.append(Rank(key, order.index(key, before)))
    return result
