"""The two passes of a linear combination in C, on the CPU: inner products, and the combination itself. Imports no torch.

The same operations in the same order as in `torch_span.py`, so that both give the same bits. The extension is built where there
is a compiler; what it cannot do, and everything where it is missing, is left to torch.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from frankenmerge.checkpoint import BYTES_OF
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.methods.inputs import BLOCK, Inputs, Part, Raw
from frankenmerge.merging.methods.span import LANES, Array, Combination, pairs, solved

if TYPE_CHECKING:
    from frankenmerge.merging import _native as native
else:
    try:
        from frankenmerge.merging import _native as native
    except ImportError:
        native = None

CHUNK = BLOCK
"""Elements of a chunk; a whole number of `LANES`."""


def can(combination: Combination) -> bool:
    """Whether the extension is there and does this: coefficients for a whole tensor, not for every row or column."""
    return native is not None and combination.per == "tensor"


def rounded(combination: Combination, dtype: str, *, allow_nan: bool) -> Iterator[tuple[memoryview, bool]]:
    """Yield the merged tensor in chunks, each element rounded once to `dtype`, and whether all of a chunk is finite.

    A chunk is good until the next is asked for. Raises FrankenmergeError, unless `allow_nan`, for NaN and Inf in an input.
    """
    inputs = combination.inputs
    if not inputs.size:
        return
    coefficients = solved(combination, lambda finite_only: _sums(inputs, finite_only, allow_nan=allow_nan)).tolist()
    width = BYTES_OF[dtype]
    made = memoryview(bytearray(min(CHUNK, inputs.size) * width))
    for start, stop in inputs.spans(CHUNK):
        chunk = made[: (stop - start) * width]
        raws = _raws(inputs, start, stop)
        bad, finite = native.combine([raw[:2] for raw in raws], coefficients, inputs.base is not None, chunk, dtype)
        if not allow_nan:
            refuse(raws, bad)
        yield chunk, finite


def converted(raw: Raw, result: memoryview, *, allow_nan: bool) -> None:
    """Write the elements to `result` in float32. Raises as `rounded` does."""
    bad, _ = native.combine([raw[:2]], [1.0], False, result, "F32")
    if not allow_nan:
        refuse([raw], bad)


def _raws(inputs: Inputs, start: int, stop: int) -> list[Raw]:
    parts: Sequence[Part] = [inputs.base, *inputs.parts] if inputs.base else inputs.parts
    return [part.read(start, stop) for part in parts]


def refuse(raws: Sequence[Raw], bad: int) -> None:
    """Raise FrankenmergeError where the extension found NaN or Inf in the input of number `bad`."""
    if bad >= 0:
        raise FrankenmergeError(raws[bad].broken)


def _sums(inputs: Inputs, finite_only: bool, *, allow_nan: bool) -> Array:
    """Inner products `[pairs, LANES]`, of the finite elements or of all."""
    total = np.zeros((sum(1 for _ in pairs(len(inputs.parts))), LANES))
    for start, stop in inputs.spans(CHUNK):
        raws = _raws(inputs, start, stop)
        bad = native.products([raw[:2] for raw in raws], inputs.base is not None, finite_only, total)
        if not allow_nan:
            refuse(raws, bad)
    return total
