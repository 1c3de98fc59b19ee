"""The two passes of a linear combination in C: inner products, and the combination itself.

The same operations in the same order as in `torch_span.py`, so that both give the same bits.
"""

from collections.abc import Iterator

import numpy as np

from frankenmerge.splicing.methods.inputs import Inputs
from frankenmerge.splicing.methods.native_chunks import Given, every, extension, scanned, written
from frankenmerge.splicing.methods.span import Combination, pairs, solved
from frankenmerge.splicing.methods.sums import LANES, Array


def rounded(
    combination: Combination, dtype: str, *, allow_nan: bool
) -> Iterator[tuple[memoryview, bool]]:
    """The merged tensor in chunks, as `native_chunks.written` yields them."""
    inputs = combination.inputs
    if not inputs.size:
        return
    coefficients = solved(
        combination, lambda finite_only: _sums(inputs, finite_only, allow_nan=allow_nan)
    ).tolist()
    relative = inputs.base is not None

    def write(given: Given, _: int, chunk: memoryview) -> tuple[int, bool]:
        return extension.combine(given, coefficients, relative, chunk, dtype)

    yield from written(inputs, write, dtype, allow_nan=allow_nan)


def _sums(inputs: Inputs, finite_only: bool, *, allow_nan: bool) -> Array:
    """Inner products `[pairs, LANES]`, of the finite elements or of all."""
    total = np.zeros((sum(1 for _ in pairs(len(inputs.models))), LANES))
    relative = inputs.base is not None
    scanned(
        inputs,
        every(inputs),
        lambda given, _: extension.products(given, relative, finite_only, total),
        allow_nan=allow_nan,
    )
    return total
