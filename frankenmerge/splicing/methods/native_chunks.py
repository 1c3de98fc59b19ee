"""Passing tensors to the extension, chunk by chunk, on the CPU. Does not import torch.

The extension is built if there is a compiler. Without it torch computes everything; with it, torch
computes what the extension does not support.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods.inputs import BLOCK, Inputs, Operand, Raw
from frankenmerge.storage.dtypes import DTYPES

if TYPE_CHECKING:
    from frankenmerge.splicing.methods import _native as extension
else:
    try:
        from frankenmerge.splicing.methods import _native as extension
    except ImportError:
        extension = None

CHUNK = BLOCK
"""Elements per chunk: a multiple of `LANES`, and one block of a random stream."""

Buffers = list[tuple[memoryview, str]]
"""One chunk of every input, as the extension takes it."""


def scan_chunks(
    inputs: Inputs,
    models: Sequence[Operand],
    scan: Callable[[Buffers, int], int],
    *,
    rows: bool = False,
    allow_nan: bool,
) -> None:
    """Call `scan` with every chunk of `models` and the index of its first element.

    `scan` returns the number of the first input that contains NaN or Inf, or -1. Chunks are whole
    rows if `rows`. Raises FrankenmergeError for such an input unless `allow_nan`.
    """
    for start, stop in inputs.spans(CHUNK, rows=rows):
        raws = [operand.read(start, stop) for operand in models]
        refuse(raws, scan(buffers_of(raws), start), allow_nan=allow_nan)


def written_chunks(
    inputs: Inputs,
    write: Callable[[Buffers, int, memoryview], tuple[int, bool]],
    dtype: str,
    *,
    rows: bool = False,
    allow_nan: bool,
) -> Iterator[tuple[memoryview, bool]]:
    """Yield every chunk of the merged tensor, rounded once to `dtype`, and whether it is finite.

    `write` is called with base and models, the index of the first element and the chunk to fill. It
    returns the number of the first input that contains NaN or Inf, or -1, and whether the chunk is
    finite. Chunks are whole rows if `rows`; each is valid until the next is requested. Raises
    FrankenmergeError for NaN and Inf in an input unless `allow_nan`.
    """
    width = DTYPES[dtype].bytes
    largest = max(stop - start for start, stop in inputs.spans(CHUNK, rows=rows))
    buffer = memoryview(bytearray(largest * width))
    for start, stop in inputs.spans(CHUNK, rows=rows):
        chunk = buffer[: (stop - start) * width]
        raws = [operand.read(start, stop) for operand in operands(inputs)]
        bad, finite = write(buffers_of(raws), start, chunk)
        refuse(raws, bad, allow_nan=allow_nan)
        yield chunk, finite


def operands(inputs: Inputs) -> Sequence[Operand]:
    """Return the base, if there is one, and the models."""
    return [inputs.base, *inputs.models] if inputs.base else inputs.models


def converted(raw: Raw, result: memoryview, *, allow_nan: bool) -> None:
    """Write the elements to `result` in float32. Raises as `written_chunks` does."""
    bad, _ = extension.combine(buffers_of([raw]), [1.0], False, result, "F32")
    refuse([raw], bad, allow_nan=allow_nan)


def buffers_of(raws: Sequence[Raw]) -> Buffers:
    """Return the elements of several inputs as the extension takes them."""
    return [raw[:2] for raw in raws]


def refuse(raws: Sequence[Raw], bad: int, *, allow_nan: bool) -> None:
    """Raise FrankenmergeError if an input, `bad` >= 0, contains NaN or Inf, unless `allow_nan`."""
    if bad >= 0 and not allow_nan:
        raise FrankenmergeError(raws[bad].fault)
