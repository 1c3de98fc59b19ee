"""How the extension is given a tensor's elements, chunk by chunk, on the CPU. Imports no torch.

It is built where there is a compiler; what it cannot do, and everything where it is missing, is
left to torch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from frankenmerge.donors.checkpoint import BYTES_OF
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods.inputs import BLOCK, Inputs, Operand, Raw

if TYPE_CHECKING:
    from frankenmerge.splicing.methods import _native as extension
else:
    try:
        from frankenmerge.splicing.methods import _native as extension
    except ImportError:
        extension = None

CHUNK = BLOCK
"""Elements of a chunk: a whole number of `LANES`, and one stream of noise."""

Given = list[tuple[memoryview, str]]
"""A chunk of every input as the extension takes it."""


def scanned(
    inputs: Inputs,
    models: Sequence[Operand],
    scan: Callable[[Given, int], int],
    *,
    rows: bool = False,
    allow_nan: bool,
) -> None:
    """Give every chunk of `models`, of whole `rows` if asked for, to `scan`, and the index of its first element.

    It returns the number of the first input that holds NaN or Inf, or -1. Raises FrankenmergeError,
    unless `allow_nan`, for that input.
    """
    for start, stop in inputs.spans(CHUNK, rows=rows):
        raws = [operand.read(start, stop) for operand in models]
        refuse(raws, scan(given(raws), start), allow_nan=allow_nan)


def written(
    inputs: Inputs,
    write: Callable[[Given, int, memoryview], tuple[int, bool]],
    dtype: str,
    *,
    rows: bool = False,
    allow_nan: bool,
) -> Iterator[tuple[memoryview, bool]]:
    """Yield the merged tensor in chunks, each element rounded once to `dtype`, and whether all of a chunk is finite.

    Chunks are of whole `rows` if asked for. `write` is given base and models, the index of the
    first element and the chunk to fill; it returns the number that `scan` does above, and whether
    what it made is finite. A chunk is good until the next is asked for. Raises FrankenmergeError,
    unless `allow_nan`, for NaN and Inf in an input.
    """
    width = BYTES_OF[dtype]
    largest = max(stop - start for start, stop in inputs.spans(CHUNK, rows=rows))
    made = memoryview(bytearray(largest * width))
    for start, stop in inputs.spans(CHUNK, rows=rows):
        chunk = made[: (stop - start) * width]
        raws = [operand.read(start, stop) for operand in every(inputs)]
        bad, finite = write(given(raws), start, chunk)
        refuse(raws, bad, allow_nan=allow_nan)
        yield chunk, finite


def every(inputs: Inputs) -> Sequence[Operand]:
    """The base, where there is one, and the models."""
    return [inputs.base, *inputs.models] if inputs.base else inputs.models


def converted(raw: Raw, result: memoryview, *, allow_nan: bool) -> None:
    """Write the elements to `result` in float32. Raises as `written` does."""
    bad, _ = extension.combine(given([raw]), [1.0], False, result, "F32")
    refuse([raw], bad, allow_nan=allow_nan)


def given(raws: Sequence[Raw]) -> Given:
    """What the extension is told of inputs."""
    return [raw[:2] for raw in raws]


def refuse(raws: Sequence[Raw], bad: int, *, allow_nan: bool) -> None:
    """Raise FrankenmergeError, unless `allow_nan`, where the extension found NaN or Inf in the input of number `bad`."""
    if bad >= 0 and not allow_nan:
        raise FrankenmergeError(raws[bad].fault)
