"""The order of a tensor's magnitudes in torch, and masks of what ranks before a boundary."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from frankenmerge.splicing.methods.inputs import Span
from frankenmerge.splicing.methods.select import DIGITS, LARGEST, Counts, Order, Rank

Keys = Callable[[int, int], Tensor]
"""Elements `[start, stop)` as nonnegative int32: the bits of magnitudes."""


def magnitudes(values: Tensor) -> Tensor:
    """Return the bits of `|values|`, float32, as int32."""
    return values.view(torch.int32).bitwise_and(LARGEST)


def order_of(keys: Keys, spans: Callable[[], Iterable[Span]]) -> Order:
    """Return the order of a tensor whose keys are read as often as necessary."""

    def uppers() -> Counts:
        return sum(
            (_counted(keys(start, stop) >> 16) for start, stop in spans()),
            np.zeros(DIGITS, np.int64),
        )

    def lowers(uppers: Sequence[int]) -> list[Counts]:
        totals = [np.zeros(DIGITS, np.int64) for _ in uppers]
        for start, stop in spans():
            chunk = keys(start, stop)
            for count, upper in zip(totals, uppers, strict=True):
                count += _counted(chunk[chunk >> 16 == upper] & (DIGITS - 1))
        return totals

    def index(key: int, nth: int) -> int:
        for start, stop in spans():
            places = (keys(start, stop) == key).nonzero()
            if nth < len(places):
                return start + int(places[nth])
            nth -= len(places)
        raise AssertionError("the tensor changed between two passes")

    return Order(uppers, lowers, index)


def _counted(digits: Tensor) -> Counts:
    return torch.bincount(digits, minlength=DIGITS).cpu().numpy()


def before(keys: Tensor, start: int, boundary: Rank) -> Tensor:
    """Return an int32 mask: all ones where the element ranks before `boundary`, else 0.

    `keys` are those of the elements from index `start` on.
    """
    above = keys - boundary.key
    above[max(boundary.index - start, 0) :] -= 1  # from there on, an equal element ranks after it
    return above.bitwise_right_shift_(31).bitwise_not_()
