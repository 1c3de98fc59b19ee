"""Computed tensors: read, combined, rounded once, written. Nothing larger than a few chunks is held, but for what is turned."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from frankenmerge.checkpoint import BYTES_OF, Tensor
from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.gauge import Turn, turned
from frankenmerge.merging.copying import CHUNK, flush, write_fully
from frankenmerge.merging.schedule import Combine, Input, Operation, Rotate
from frankenmerge.merging.shards import readings
from frankenmerge.splice import DTYPE_NAMES
from frankenmerge.vocabulary import Rows

if TYPE_CHECKING:
    import torch

_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
"""Per type: the unsigned integer of its width, and the bits of the exponent, all set in NaN and Inf alone."""


def check_device(device: str) -> None:
    """Raise FrankenmergeError for a device that torch cannot compute on."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA assert
        raise fail(f"device {device}", "a torch device that is there", str(error), "choose another --device") from error


def one_thread() -> None:
    """Keep torch from starting threads of its own in the thread that calls this: here every thread has its own tensor."""
    import torch

    torch.set_num_threads(1)


def compute(
    operation: Combine,
    handles: Mapping[Path, int],
    target: int,
    position: int,
    moved: Callable[[int], None],
    *,
    device: str,
    allow_nan: bool,
) -> None:
    """Compute one tensor and write it to the file `target` at `position`.

    `handles` are the open donors' files; `moved` is called with the bytes written since its last call. The arithmetic is in
    float32, and each element is rounded once. Raises FrankenmergeError, unless `allow_nan`, for NaN and Inf in an input,
    named, or in the result.
    """
    from frankenmerge.merging.methods.combine import Part, combine

    def part(given: Input) -> Part:
        read = _read if given.rows is None else _read_rows
        return Part(partial(read, given, handles, device=device, allow_nan=allow_nan), given.parameters)

    parts, base = [part(given) for given in operation.inputs], part(operation.base) if operation.base else None
    chunks = combine(
        operation.method, parts, base, shape=operation.shape, parameters=operation.parameters, name=operation.name, seed=operation.seed
    )
    _write(chunks, operation, operation.method, target, position, moved, allow_nan=allow_nan)


def rotate(
    operation: Rotate, turn: Turn, handles: Mapping[Path, int], target: int, position: int, moved: Callable[[int], None], *, allow_nan: bool
) -> None:
    """Turn one tensor, held whole, and write it as `compute` does; the arithmetic is in float64, on the CPU."""
    import torch

    def read(given: Input) -> "torch.Tensor":
        values = _elements(given.tensor, handles, 0, math.prod(given.tensor.shape), torch.float64)
        if not allow_nan and not _finite(values):
            raise FrankenmergeError(_not_finite(given.donor, given.source))
        return values.view(given.tensor.shape)

    made = turned(read(operation.given), operation.met, turn, read(operation.gain) if operation.gain else None)
    _write([made.flatten()], operation, "a turn", target, position, moved, allow_nan=allow_nan)


def _write(
    chunks: Iterable["torch.Tensor"], operation: Combine | Rotate, by: str, target: int, position: int, moved: Callable[[int], None], *,
    allow_nan: bool,
) -> None:  # fmt: skip
    """Round a tensor's flat chunks and write them one behind the other; `by` is what made them."""
    import torch

    written, flushed = position, position
    for chunk in chunks:
        rounded = chunk.to(getattr(torch, DTYPE_NAMES[operation.dtype])).cpu().contiguous()
        if not allow_nan and not _finite(rounded):
            remedy = f"look at the method's parameters, choose a dtype wider than {operation.dtype}, or go on with --allow-nan"
            raise fail(operation.name, f"finite numbers from {by}", "NaN or Inf", remedy)
        content = rounded.view(torch.uint8).numpy().data
        write_fully(target, content, written)
        written += len(content)
        moved(len(content))
        if written - flushed >= CHUNK:
            flush(target, flushed, written - flushed)
            flushed = written
    flush(target, flushed, written - flushed)


def _read(given: Input, handles: Mapping[Path, int], start: int, stop: int, *, device: str, allow_nan: bool) -> "torch.Tensor":
    """Flat elements [start, stop) of an input in float32."""
    made = _elements(given.tensor, handles, start, stop).to(device)
    if not allow_nan and not _finite(made):
        raise FrankenmergeError(_not_finite(given.donor, given.source))
    return made


def _read_rows(given: Input, handles: Mapping[Path, int], start: int, stop: int, *, device: str, allow_nan: bool) -> "torch.Tensor":
    """Flat elements [start, stop), in float32, of a matrix whose rows come from several donors' matrices."""
    import torch

    assert given.rows
    width = math.prod(given.tensor.shape[1:])
    first, last = start // width, -(-stop // width)
    made = torch.zeros((last - first) * width)
    for donor, row, place, count in _runs(given.rows, first, last):
        taken = _elements(given.rows.tensors[donor], handles, row * width, (row + count) * width)
        if not allow_nan and not _finite(taken):
            raise FrankenmergeError(_not_finite(given.rows.donors[donor], given.source))
        made[(place - first) * width : (place - first + count) * width] = taken
    return made[start - first * width : stop - first * width].to(device)


def _runs(rows: Rows, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows [first, last) of the result as (donor, its row, the result's row, how many follow one another); zeros left out."""
    place = first
    while place < last:
        donor, row, count = int(rows.origin[place]), int(rows.row[place]), 1
        while place + count < last and rows.origin[place + count] == donor and rows.row[place + count] == row + count:
            count += 1
        if donor >= 0:
            yield donor, row, place, count
        place += count


def _elements(
    tensor: Tensor, handles: Mapping[Path, int], start: int, stop: int, dtype: "torch.dtype | None" = None
) -> "torch.Tensor":  # fmt: skip
    """Flat elements [start, stop) as the file has them, in `dtype`, float32 when absent."""
    import torch

    width = BYTES_OF[tensor.dtype]
    content = read_fully(handles[tensor.file], tensor, start * width, stop * width)
    return torch.frombuffer(content, dtype=getattr(torch, DTYPE_NAMES[tensor.dtype])).to(dtype or torch.float32)


def read_fully(handle: int, tensor: Tensor, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a tensor. Raises OSError where the file ends before."""
    content = bytearray(stop - start)
    view, position = memoryview(content), tensor.start + start
    while view:
        done = os.preadv(handle, [view], position)
        if not done:
            raise OSError(f"{tensor.file} ended at byte {os.fstat(handle).st_size:,}")
        view, position = view[done:], position + done
    return content


def _finite(values: "torch.Tensor") -> bool:
    """Whether all are finite; a sum tells it in one pass, unless finite numbers overflow it."""
    import torch

    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


def _not_finite(donor: str, source: str) -> Fault:
    return Fault(f"{donor}: {source}", "finite numbers", "NaN or Inf", "repair or replace the donor, or go on with --allow-nan")


def not_finite(operations: Sequence[Operation]) -> list[Fault]:
    """Read every tensor that `operations` use and return a fault for each that holds NaN or Inf. Imports no torch."""
    import numpy as np

    faults = []
    for donor, source, tensor in dict.fromkeys(reading for operation in operations for reading in readings(operation)):
        if tensor.dtype not in _EXPONENTS:
            continue
        unsigned, mask = _EXPONENTS[tensor.dtype]
        with tensor.file.open("rb", buffering=0) as handle:
            for start in range(0, tensor.bytes, CHUNK):
                content = read_fully(handle.fileno(), tensor, start, min(start + CHUNK, tensor.bytes))
                if ((np.frombuffer(content, unsigned) & mask) == mask).any():
                    faults.append(_not_finite(donor, source))
                    break
    return faults
