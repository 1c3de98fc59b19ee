"""The passes over thinned task vectors in C: counts that find ranks, sums of magnitudes, and what is left, added.

The same operations in the same order as in `torch_sparse.py`, so that both give the same bits.
"""

from collections.abc import Iterator

import numpy as np

from frankenmerge.merging.methods.inputs import Inputs, Part
from frankenmerge.merging.methods.native_chunks import CHUNK, Given, extension, given, scanned, written
from frankenmerge.merging.methods.noise import stream
from frankenmerge.merging.methods.select import DIGITS, Counts, Order, boundaries
from frankenmerge.merging.methods.sparse import Chance, Keep, Ranks, Thinned, coefficients
from frankenmerge.merging.methods.sums import LANES, Array

Boundaries = tuple[int, int, int, int]
"""Key and index of what ranks first of all that stays, and of what ranks first behind it."""


def rounded(thinned: Thinned, dtype: str, *, allow_nan: bool) -> Iterator[tuple[memoryview, bool]]:
    """The merged tensor in chunks, as `native_chunks.written` yields them."""
    inputs = thinned.inputs
    if not inputs.size:
        return
    found = [_boundaries(inputs, model, keep, allow_nan=allow_nan) for model, keep in enumerate(thinned.keeps)]
    factors = coefficients(thinned, lambda model, finite_only: _sums(inputs, model, found[model], finite_only, allow_nan=allow_nan))
    weights = inputs.each("weight")

    def write(given: Given, start: int, chunk: memoryview) -> tuple[int, bool]:
        streams = [stream(inputs.seed, inputs.name, model, start // CHUNK) for model in range(len(weights))]
        stays = [
            (noise.capsule, keep.limit) if isinstance(keep, Chance) else ranks
            for keep, noise, ranks in zip(thinned.keeps, streams, found, strict=True)
        ]
        terms = list(zip(factors, weights, stays, strict=True))
        return extension.thin(given, terms, start, thinned.consensus, thinned.by_weight, thinned.factor, chunk, dtype)

    yield from written(inputs, write, dtype, allow_nan=allow_nan)


def _boundaries(inputs: Inputs, model: int, keep: Keep, *, allow_nan: bool) -> Boundaries | None:
    if not isinstance(keep, Ranks):
        return None
    first, end = boundaries(_order(inputs, model, allow_nan=allow_nan), inputs.size, keep)
    return first.key, first.index, end.key, end.index


def _order(inputs: Inputs, model: int, *, allow_nan: bool) -> Order:
    pair = _pair(inputs, model)

    def counted(upper: int | None) -> Counts:
        found = np.zeros(DIGITS, np.int64)
        scanned(inputs, pair, lambda given, _: extension.count(given, upper, found), allow_nan=allow_nan)
        return found

    def index(key: int, nth: int) -> int:
        for start, stop in inputs.spans(CHUNK):
            place, equal = extension.find(given([part.read(start, stop) for part in pair]), key, nth)
            if place >= 0:
                return start + place
            nth -= equal
        raise AssertionError("the tensor changed between two readings")

    return Order(lambda: counted(None), lambda uppers: [counted(upper) for upper in uppers], index)


def _sums(inputs: Inputs, model: int, stays: Boundaries | None, finite_only: bool, *, allow_nan: bool) -> Array:
    """Magnitudes of a task vector and of what stays of it, `[2, LANES]`, of the finite elements or of all."""
    total = np.zeros((2, LANES))

    def add(given: Given, start: int) -> int:
        return extension.sum_magnitudes(given, stays, start, finite_only, total)

    scanned(inputs, _pair(inputs, model), add, allow_nan=allow_nan)
    return total


def _pair(inputs: Inputs, model: int) -> tuple[Part, Part]:
    assert inputs.base
    return inputs.base, inputs.parts[model]
