"""The two passes of a linear combination in C: inner products, and the combination itself.

Operations and their order are those of `torch_span.py`, so that both give the same bits.
"""

from collections.abc import Iterator

import numpy as np

from frankenmerge.splicing.methods.inputs import Inputs
from frankenmerge.splicing.methods.native_chunks import (
    Buffers,
    extension,
    operands,
    scan_chunks,
    written_chunks,
)
from frankenmerge.splicing.methods.span import Combination, pairs, solved
from frankenmerge.splicing.methods.sums import LANES, Array


def rounded(
    combination: Combination, dtype: str, *, allow_nan: bool
) -> Iterator[tuple[memoryview, bool]]:
    """Yield the merged tensor in chunks, as `native_chunks.written_chunks` does."""
    inputs = combination.inputs
    if not inputs.size:
        return
    coefficients = solved(
        combination, lambda finite_only: _sums(inputs, finite_only, allow_nan=allow_nan)
    ).tolist()
    relative = inputs.base is not None

    def write(buffers: Buffers, _: int, chunk: memoryview) -> tuple[int, bool]:
        return extension.combine(buffers, coefficients, relative, chunk, dtype)

    yield from written_chunks(inputs, write, dtype, allow_nan=allow_nan)


def _sums(inputs: Inputs, finite_only: bool, *, allow_nan: bool) -> Array:
    """Return inner products `[pairs, LANES]` of all elements or of the finite ones."""
    total = np.zeros((sum(1 for _ in pairs(len(inputs.models))), LANES))
    relative = inputs.base is not None
    scan_chunks(
        inputs,
        operands(inputs),
        lambda buffers, _: extension.products(buffers, relative, finite_only, total),
        allow_nan=allow_nan,
    )
    return total
