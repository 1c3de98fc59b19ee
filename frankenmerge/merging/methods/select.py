"""Exact order statistics of a tensor that is read in chunks: two passes and a part of a third, and no sorting.

The bits of a float32 that is not negative order as the numbers do, so the k-th largest is found digit by digit: its upper 16 bits
by counting, in one pass, then its lower 16 bits among the elements that share the upper. Of equal elements the one with the
lowest index ranks first, so that ranks are distinct.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from frankenmerge.merging.methods.inputs import Span

LARGEST = 2**31 - 1
_DIGIT = 2**16

Keys = Callable[[int, int], Tensor]
"""Elements `[start, stop)` as int32, none negative: the bits of magnitudes."""


class Rank(NamedTuple):
    """An element by its place in the order."""

    key: int
    index: int
    """Its index among all elements."""


def magnitudes(values: Tensor) -> Tensor:
    """The bits of `|values|`, float32, as int32."""
    return values.view(torch.int32).bitwise_and(LARGEST)


def kth_largest(keys: Keys, spans: Callable[[], Iterable[Span]], ranks: Sequence[int]) -> list[tuple[int, int]]:
    """For every rank (0: the largest) the key there, and how many elements of that key rank before it."""
    tops = [_find(counts, rank) for counts, rank in zip(_counted(keys, spans, [0], _DIGIT) * len(ranks), ranks, strict=True)]
    uppers = sorted({upper for upper, _ in tops})
    lower = dict(zip(uppers, _counted(keys, spans, [upper * _DIGIT for upper in uppers], 1), strict=True))
    result = []
    for upper, before in tops:
        digit, left = _find(lower[upper], before)
        result.append((upper * _DIGIT + digit, left))
    return result


def _counted(keys: Keys, spans: Callable[[], Iterable[Span]], offsets: list[int], unit: int) -> list[Tensor]:
    """For every offset how many keys have each value of `(key - offset) // unit` in `[0, 2**16)`."""
    counts = [torch.zeros(_DIGIT, dtype=torch.int64) for _ in offsets]
    for start, stop in spans():
        found = keys(start, stop)
        for count, offset in zip(counts, offsets, strict=True):
            digits = (found - offset).bitwise_right_shift_(unit.bit_length() - 1).clamp_(-1, _DIGIT).add_(1)
            count += torch.bincount(digits, minlength=_DIGIT + 2)[1:-1].cpu()
    return counts


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit that holds the `rank`-th element from the largest down, and that element's rank within the digit."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank, right=True))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def boundaries(keys: Keys, spans: Callable[[], Iterable[Span]], size: int, ranks: Sequence[int]) -> list[Rank]:
    """The elements at `ranks` in descending order, each 0 to `size`; `size` itself stands behind all."""
    inner = [rank for rank in ranks if 0 < rank < size]
    found = iter(kth_largest(keys, spans, inner) if inner else [])
    result = []
    for rank in ranks:
        if rank <= 0:
            result.append(Rank(LARGEST, 0))
        elif rank >= size:
            result.append(Rank(0, size))
        else:
            key, before = next(found)
            result.append(Rank(key, _index(keys, spans, key, before)))
    return result


def _index(keys: Keys, spans: Callable[[], Iterable[Span]], key: int, nth: int) -> int:
    """Where the `nth` (from 0) element that equals `key` is."""
    for start, stop in spans():
        places = (keys(start, stop) == key).nonzero()
        if nth < len(places):
            return start + int(places[nth])
        nth -= len(places)
    raise AssertionError("the tensor changed between two readings")


def before(keys: Tensor, start: int, boundary: Rank) -> Tensor:
    """All ones where the element ranks before `boundary`, else 0: int32, for the keys of elements from `start` on."""
    above = keys - boundary.key
    above[max(boundary.index - start, 0) :] -= 1  # from there on an equal element ranks behind
    return above.bitwise_right_shift_(31).bitwise_not_()
