"""The passes over thinned task vectors in C: counts for ranks, ranks in rows, sums of magnitudes, and what is left, added.

The same operations in the same order as in `torch_sparse.py`, so that both give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from frankenmerge.donors.checkpoint import BYTES_OF
from frankenmerge.splicing.methods.inputs import Inputs, Operand
from frankenmerge.splicing.methods.native_chunks import (
    CHUNK,
    Given,
    extension,
    given,
    scanned,
    written,
)
from frankenmerge.splicing.methods.noise import stream, words
from frankenmerge.splicing.methods.select import DIGITS, Counts, Order, boundaries
from frankenmerge.splicing.methods.sparse import Chance, Keep, RowOdds, Thinned, coefficients
from frankenmerge.splicing.methods.sums import LANES, Array

if TYPE_CHECKING:
    from frankenmerge.splicing.methods._native import Keep as Stays

Stay = Callable[[Given, int], "Stays"]
"""From base and model and the index of the first element to what stays, as the extension is told of
it.
"""


def rounded(thinned: Thinned, dtype: str, *, allow_nan: bool) -> Iterator[tuple[memoryview, bool]]:
    """The merged tensor in chunks, as `native_chunks.written` yields them."""
    inputs = thinned.inputs
    if not inputs.size:
        return
    stays = [
        _stay(inputs, model, keep, allow_nan=allow_nan) for model, keep in enumerate(thinned.keeps)
    ]
    factors = coefficients(
        thinned,
        lambda model, finite_only: _sums(
            thinned, model, stays[model], finite_only, allow_nan=allow_nan
        ),
    )
    weights, least = inputs.each("weight"), -1.0 if thinned.least is None else thinned.least

    def write(given: Given, start: int, chunk: memoryview) -> tuple[int, bool]:
        base, *models = given
        kept = [stay([base, model], start) for stay, model in zip(stays, models, strict=True)]
        terms = list(zip(factors, weights, kept, strict=True))
        return extension.thin(
            given, terms, start, thinned.consensus, least, thinned.factor, chunk, dtype
        )

    yield from written(inputs, write, dtype, rows=thinned.rows, allow_nan=allow_nan)


def _stay(inputs: Inputs, model: int, keep: Keep, *, allow_nan: bool) -> Stay:
    if isinstance(keep, Chance):
        # Without rows a chunk is a block of noise.
        return lambda _, start: (
            stream(inputs.seed, inputs.name, model, start // CHUNK),
            keep.limit,
        )
    if isinstance(keep, RowOdds):
        return partial(_by_row, inputs, model, keep)
    if keep is None:
        return lambda _, __: None
    first, end = boundaries(_order(inputs, model, allow_nan=allow_nan), inputs.size, keep)
    return lambda _, __: (first.key, first.index, end.key, end.index)


def _by_row(inputs: Inputs, model: int, odds: RowOdds, pair: Given, start: int) -> "Stays":
    words_ = words(
        inputs.seed, inputs.name, model, start, start + len(pair[0][0]) // BYTES_OF[pair[0][1]]
    )
    limits = np.empty_like(words_)
    extension.row_limits(pair, odds.limits, limits)
    return words_, limits


def _order(inputs: Inputs, model: int, *, allow_nan: bool) -> Order:
    pair = _pair(inputs, model)

    def counted(uppers: Sequence[int | None]) -> list[Counts]:
        found = [np.zeros(DIGITS, np.int64) for _ in uppers]

        def count(given: Given, _: int) -> int:
            return max(
                extension.count(given, upper, counts)
                for upper, counts in zip(uppers, found, strict=True)
            )

        scanned(inputs, pair, count, allow_nan=allow_nan)
        return found

    def index(key: int, nth: int) -> int:
        for start, stop in inputs.spans(CHUNK):
            place, equal = extension.find(
                given([operand.read(start, stop) for operand in pair]), key, nth
            )
            if place >= 0:
                return start + place
            nth -= equal
        raise AssertionError("the tensor changed between two readings")

    return Order(lambda: counted([None])[0], counted, index)


def _sums(thinned: Thinned, model: int, stay: Stay, finite_only: bool, *, allow_nan: bool) -> Array:
    """Magnitudes of a task vector and of what stays of it, `[2, LANES]`, of the finite elements or of all."""
    total = np.zeros((2, LANES))

    def add(given: Given, start: int) -> int:
        return extension.sum_magnitudes(given, stay(given, start), start, finite_only, total)

    scanned(
        thinned.inputs, _pair(thinned.inputs, model), add, rows=thinned.rows, allow_nan=allow_nan
    )
    return total


def _pair(inputs: Inputs, model: int) -> tuple[Operand, Operand]:
    assert inputs.base
    return inputs.base, inputs.models[model]
