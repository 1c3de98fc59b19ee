"""Computed tensors: read, combined, rounded once, written. Nothing larger than a few chunks is held, but for what is rotated."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.merging.copying import CHUNK, flush, write_fully
from frankenmerge.merging.shards import readings
from frankenmerge.progress import Advance
from frankenmerge.splicing.compatibility import DTYPE_NAMES
from frankenmerge.splicing.methods.inputs import Operand, inputs_of
from frankenmerge.splicing.operations import Combine, Input, Operation, Rotate
from frankenmerge.splicing.reading import (
    Handles,
    all_finite,
    broken,
    elements,
    raw_reader,
    read_fully,
    tensor_reader,
)
from frankenmerge.splicing.rotation import Rotation, rotated

if TYPE_CHECKING:
    import torch

    from frankenmerge.splicing.methods.span import Combination
    from frankenmerge.splicing.methods.sparse import Thinned

Chunks = Iterator[tuple[memoryview, bool]]
"""The bytes of a tensor's elements, in order, and whether these are finite; each good until the
next is asked for.
"""

Reader = Callable[[Input], Callable[[int, int], Any]]
"""From what is given to how it is read: `Operand.read`."""

Arithmetic = Literal["C", "torch"]

_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF << 52),
}
"""Per type: the unsigned integer of its width, and the bits of the exponent, all set in NaN and Inf
alone.
"""


def check_device(device: str) -> None:
    """Raise FrankenmergeError for a device that torch cannot compute on."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA assert
        raise fail(
            f"device {device}",
            "a torch device that is there",
            str(error),
            "choose another --device",
        ) from error


def one_thread() -> None:
    """Keep torch from starting threads of its own in the thread that calls this: here every thread has its own tensor."""
    import torch

    torch.set_num_threads(1)


def arithmetic(operation: Combine | Rotate, device: str) -> Arithmetic:
    """What computes a tensor: C where it can, which is the quickest and needs no torch; torch otherwise."""
    from frankenmerge.splicing.methods import native

    if device != "cpu" or not isinstance(operation, Combine):
        return "torch"
    method = _method(operation, lambda _: _unread)
    return "C" if method and native.can(method) else "torch"


def _unread(start: int, stop: int) -> NoReturn:
    raise AssertionError("how a tensor is computed does not depend on its elements")


def compute(
    operation: Combine,
    handles: Handles,
    target: int,
    position: int,
    moved: Advance,
    *,
    device: str,
    allow_nan: bool,
) -> None:
    """Compute one tensor and write it to the file `target` at `position`.

    `handles` are the open donors' files; `moved` is called with the bytes written since its last
    call. The arithmetic is in float32, and each element is rounded once. Raises FrankenmergeError,
    unless `allow_nan`, for NaN and Inf in an input, named, or in the result.
    """
    by = _by_c if arithmetic(operation, device) == "C" else partial(_by_torch, device=device)
    _write(
        by(operation, handles, allow_nan=allow_nan),
        operation,
        operation.method,
        target,
        position,
        moved,
        allow_nan=allow_nan,
    )


def _by_c(operation: Combine, handles: Handles, *, allow_nan: bool) -> Chunks:
    from frankenmerge.splicing.methods import native

    method = _method(operation, partial(raw_reader, handles=handles, allow_nan=allow_nan))
    assert method
    return native.rounded(method, operation.dtype, allow_nan=allow_nan)


def _by_torch(operation: Combine, handles: Handles, *, device: str, allow_nan: bool) -> Chunks:
    from frankenmerge.splicing.methods.combine import combine

    parts, base = _parts(
        operation, partial(tensor_reader, handles=handles, device=device, allow_nan=allow_nan)
    )
    return _rounded(combine(operation.method, parts, base, **_whole(operation)), operation.dtype)


def _method(operation: Combine, reader: Reader) -> "Combination | Thinned | None":
    """What the method makes of its inputs, with no tensor read; None for one that torch alone knows."""
    from frankenmerge.splicing.methods import span, sparse

    rule = span.RULES.get(operation.method) or sparse.RULES.get(operation.method)
    parts, base = _parts(operation, reader)
    return rule and rule(inputs_of(operation.method, parts, base, **_whole(operation)))


def _parts(operation: Combine, reader: Reader) -> tuple[list[Operand], Operand | None]:
    parts = [Operand(reader(given), given.parameters) for given in operation.inputs]
    return parts, Operand(reader(operation.base)) if operation.base else None


def _whole(operation: Combine) -> dict[str, Any]:
    return {
        "shape": operation.shape,
        "parameters": operation.parameters,
        "name": operation.name,
        "seed": operation.seed,
    }


def rotate(
    operation: Rotate,
    rotation: Rotation,
    handles: Handles,
    target: int,
    position: int,
    moved: Advance,
    *,
    allow_nan: bool,
) -> None:
    """Rotation one tensor, held whole, and write it as `compute` does; the arithmetic is in float64, on the CPU."""
    import torch

    def read(given: Input) -> "torch.Tensor":
        values = elements(given.tensor, handles, 0, math.prod(given.tensor.shape), torch.float64)
        if not allow_nan and not all_finite(values):
            raise FrankenmergeError(broken(given.donor, given.source))
        return values.view(given.tensor.shape)

    made = rotated(
        read(operation.given),
        operation.met,
        rotation,
        read(operation.gain) if operation.gain else None,
    )
    _write(
        _rounded([made.flatten()], operation.dtype),
        operation,
        "a rotation",
        target,
        position,
        moved,
        allow_nan=allow_nan,
    )


def _rounded(chunks: "Iterable[torch.Tensor]", dtype: str) -> Chunks:
    import torch

    for chunk in chunks:
        made = chunk.to(getattr(torch, DTYPE_NAMES[dtype])).cpu().contiguous()
        if not (finite := all_finite(made)):
            made.masked_fill_(
                made.isnan(), math.nan
            )  # every NaN the same one: which one an operation makes is up to the processor
        yield made.view(torch.uint8).numpy().data, finite


def _write(
    chunks: Chunks,
    operation: Combine | Rotate,
    by: str,
    target: int,
    position: int,
    moved: Advance,
    *,
    allow_nan: bool,
) -> None:
    """Write a tensor's chunks one behind the other; `by` is what made them."""
    written, flushed = position, position
    for content, finite in chunks:
        if not allow_nan and not finite:
            wider = (
                f"choose a dtype wider than {operation.dtype}, "
                if operation.dtype in ("F16", "BF16")
                else ""
            )
            remedy = f"look at the method's parameters, {wider}or go on with --allow-nan"
            raise fail(operation.name, f"finite numbers from {by}", "NaN or Inf", remedy)
        write_fully(target, content, written)
        written += len(content)
        moved(len(content))
        if written - flushed >= CHUNK:
            flush(target, flushed, written - flushed)
            flushed = written
    flush(target, flushed, written - flushed)


def not_finite(operations: Sequence[Operation]) -> list[Fault]:
    """Read every tensor that `operations` use and return a fault for each that holds NaN or Inf. Imports no torch."""
    import numpy as np

    faults = []
    for donor, source, tensor in dict.fromkeys(
        reading for operation in operations for reading in readings(operation)
    ):
        if tensor.dtype not in _EXPONENTS:
            continue
        unsigned, mask = _EXPONENTS[tensor.dtype]
        with tensor.file.open("rb", buffering=0) as handle:
            for start in range(0, tensor.bytes, CHUNK):
                content = read_fully(
                    handle.fileno(), tensor, start, min(start + CHUNK, tensor.bytes)
                )
                if ((np.frombuffer(content, unsigned) & mask) == mask).any():
                    faults.append(broken(donor, source))
                    break
    return faults
