"""The passes over task vectors that are thinned, in C.

They count magnitudes for ranks, rank elements in rows, sum magnitudes, and add the kept elements.
Operations and their order are those of `torch_sparse.py`, so that both give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from frankenmerge.splicing.methods.inputs import Inputs, Operand
from frankenmerge.splicing.methods.native_chunks import (
    CHUNK,
    Buffers,
    buffers_of,
    extension,
    scan_chunks,
    written_chunks,
)
from frankenmerge.splicing.methods.noise import stream, words
from frankenmerge.splicing.methods.select import DIGITS, Counts, Order, boundaries
from frankenmerge.splicing.methods.sparse import Chance, Keep, RowOdds, Thinned, coefficients
from frankenmerge.splicing.methods.sums import LANES, Array
from frankenmerge.storage.dtypes import DTYPES

if TYPE_CHECKING:
    from frankenmerge.splicing.methods._native import Keep as NativeKeep

KeepOf = Callable[[Buffers, int], "NativeKeep"]
"""From base and model and the index of the first element to what is kept, for the extension."""


def rounded(thinned: Thinned, dtype: str, *, allow_nan: bool) -> Iterator[tuple[memoryview, bool]]:
    """Yield the merged tensor in chunks, as `native_chunks.written_chunks` does."""
    inputs = thinned.inputs
    if not inputs.size:
        return
    keeps = [
        _keep_of(inputs, model, keep, allow_nan=allow_nan)
        for model, keep in enumerate(thinned.keeps)
    ]
    factors = coefficients(
        thinned,
        lambda model, finite_only: _sums(
            thinned, model, keeps[model], finite_only, allow_nan=allow_nan
        ),
    )
    weights, least = inputs.each("weight"), -1.0 if thinned.least is None else thinned.least

    def write(buffers: Buffers, start: int, chunk: memoryview) -> tuple[int, bool]:
        base, *models = buffers
        kept = [keep([base, model], start) for keep, model in zip(keeps, models, strict=True)]
        terms = list(zip(factors, weights, kept, strict=True))
        return extension.thin(
            buffers, terms, start, thinned.consensus, least, thinned.factor, chunk, dtype
        )

    yield from written_chunks(inputs, write, dtype, rows=thinned.rows, allow_nan=allow_nan)


def _keep_of(inputs: Inputs, model: int, keep: Keep, *, allow_nan: bool) -> KeepOf:
    if isinstance(keep, Chance):
        # Chunks are not rounded to whole rows here, so each is one block of the random stream.
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


def _by_row(inputs: Inputs, model: int, odds: RowOdds, pair: Buffers, start: int) -> "NativeKeep":
    content, dtype = pair[0]
    stop = start + len(content) // DTYPES[dtype].bytes
    noise = words(inputs.seed, inputs.name, model, start, stop)
    limits = np.empty_like(noise)
    extension.row_limits(pair, odds.limits, limits)
    return noise, limits


def _order(inputs: Inputs, model: int, *, allow_nan: bool) -> Order:
    pair = _pair(inputs, model)

    def counted(uppers: Sequence[int | None]) -> list[Counts]:
        totals = [np.zeros(DIGITS, np.int64) for _ in uppers]

        def count(buffers: Buffers, _: int) -> int:
            return max(
                extension.count(buffers, upper, counts)
                for upper, counts in zip(uppers, totals, strict=True)
            )

        scan_chunks(inputs, pair, count, allow_nan=allow_nan)
        return totals

    def index(key: int, nth: int) -> int:
        for start, stop in inputs.spans(CHUNK):
            position, equal = extension.find(
                buffers_of([operand.read(start, stop) for operand in pair]), key, nth
            )
            if position >= 0:
                return start + position
            nth -= equal
        raise AssertionError("the tensor changed between two passes")

    return Order(lambda: counted([None])[0], counted, index)


def _sums(
    thinned: Thinned, model: int, keep: KeepOf, finite_only: bool, *, allow_nan: bool
) -> Array:
    """Return sums `[2, LANES]` of a task vector's magnitudes and of the kept ones.

    Sums are over all elements or over the finite ones.
    """
    total = np.zeros((2, LANES))

    def add(buffers: Buffers, start: int) -> int:
        return extension.sum_magnitudes(buffers, keep(buffers, start), start, finite_only, total)

    scan_chunks(
        thinned.inputs, _pair(thinned.inputs, model), add, rows=thinned.rows, allow_nan=allow_nan
    )
    return total


def _pair(inputs: Inputs, model: int) -> tuple[Operand, Operand]:
    assert inputs.base
    return inputs.base, inputs.models[model]
