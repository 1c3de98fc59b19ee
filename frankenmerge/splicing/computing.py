"""Computed tensors: inputs read, combined, rounded once, and given out in chunks of bytes.

Both executors use it, so that a tensor in memory has the same bits as on disk. Nothing larger than
a few chunks is held, but for tensors that are rotated.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.splicing.methods.inputs import Operand, inputs_of
from frankenmerge.splicing.operations import (
    Combine,
    Computed,
    Gate,
    Input,
    Operation,
    Perturb,
    Rotate,
    Transplant,
)
from frankenmerge.splicing.reading import (
    DonorFiles,
    all_finite,
    elements,
    not_finite,
    raw_reader,
    tensor_reader,
)
from frankenmerge.splicing.rotation import Fit, Rotation, rotated
from frankenmerge.storage.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

    from frankenmerge.splicing.methods.span import Combination
    from frankenmerge.splicing.methods.sparse import Thinned

Chunks = Iterator[tuple[memoryview, bool]]
"""The bytes of a tensor's elements, in order, and whether they are finite; each chunk is valid
until the next is asked for.
"""

Reader = Callable[[Input], Callable[[int, int], Any]]
"""From an input to the function that reads its elements: `Operand.read`."""

Arithmetic = Literal["C", "torch"]


@dataclass(frozen=True)
class Computation:
    """How tensors are computed."""

    files: DonorFiles
    """The donors' files."""
    fits: Mapping[int, Fit]
    """Rotations of slices that have a gauge, by slice."""
    device: str = "cpu"
    """The torch device that computes."""
    allow_nan: bool = False
    """Whether NaN and Inf may be in inputs and results."""


def check_device(device: str) -> None:
    """Raise FrankenmergeError for a device that torch cannot compute on."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA assert
        place, expected = f"device {device}", "an available torch device"
        raise fail(place, expected, str(error), "choose another --device") from error


def one_thread() -> None:
    """Keep torch to the calling thread: every thread computes a tensor of its own."""
    import torch

    torch.set_num_threads(1)


def arithmetic(operation: Computed, device: str) -> Arithmetic:
    """What computes a tensor: C where it can, which is fastest and needs no torch; else torch."""
    from frankenmerge.splicing.methods import native

    if isinstance(operation, Gate):
        return "C"  # its bytes are there
    if device != "cpu" or not isinstance(operation, Combine):
        return "torch"
    method = _method(operation, lambda _: _unread)
    return "C" if method and native.can(method) else "torch"


def extension_remarks(operations: Iterable[Operation], device: str) -> Iterator[str]:
    """Report that torch has to compute what the extension in C would, if it were built."""
    from frankenmerge.splicing.methods import native, native_chunks

    if native_chunks.extension is not None or device != "cpu":
        return
    combined = (each for each in operations if isinstance(each, Combine))
    methods = (_method(each, lambda _: _unread) for each in combined)
    if any(method and native.supports(method) for method in methods):
        yield (
            "the C extension is not installed: torch computes, three to four times as slowly and "
            "in several times the memory; install a wheel, or a C compiler and frankenmerge again"
        )


def _unread(start: int, stop: int) -> NoReturn:
    raise AssertionError("how a tensor is computed does not depend on its elements")


def computed(operation: Computed, how: Computation) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order; each chunk is valid until the next is asked for.

    Methods compute in float32, rotations in float64, and each element is rounded once to the
    operation's type.

    Raises:
        FrankenmergeError: for NaN and Inf in an input or in the result, named, unless allowed.
    """
    if isinstance(operation, Gate):
        assert operation.content is not None, "gates are made before a splice is executed"
        yield memoryview(operation.content)
        return
    if isinstance(operation, Rotate):
        chunks, maker = _rotation_chunks(operation, how), "a rotation"
    elif isinstance(operation, Transplant):
        chunks, maker = _transplanted_chunks(operation, how), "approximated rows"
    elif isinstance(operation, Perturb):
        chunks, maker = _noisy_chunks(operation, how), "noise_scale and residual_scale"
    else:
        native = arithmetic(operation, how.device) == "C"
        chunks = (_native_chunks if native else _torch_chunks)(operation, how)
        maker = operation.method
    for content, finite in chunks:
        if not how.allow_nan and not finite:
            wider = f"choose a dtype wider than {operation.dtype}, "
            wider = wider if operation.dtype in ("F16", "BF16") else ""
            remedy = f"check the method's parameters, {wider}or allow it with --allow-nan"
            raise fail(operation.name, f"finite numbers from {maker}", "NaN or Inf", remedy)
        yield content


def _native_chunks(operation: Combine, how: Computation) -> Chunks:
    from frankenmerge.splicing.methods import native

    reader = partial(raw_reader, files=how.files, allow_nan=how.allow_nan)
    method = _method(operation, reader)
    assert method
    return native.rounded(method, operation.dtype, allow_nan=how.allow_nan)


def _torch_chunks(operation: Combine, how: Computation) -> Chunks:
    from frankenmerge.splicing.methods.combine import combine

    reader = partial(tensor_reader, files=how.files, device=how.device, allow_nan=how.allow_nan)
    operands, base = _operands(operation, reader)
    made = combine(operation.method, operands, base, **_whole(operation))
    return _rounded(made, operation.dtype)


def _method(operation: Combine, reader: Reader) -> "Combination | Thinned | None":
    """The method on its inputs, with no tensor read; None for one that torch alone computes."""
    from frankenmerge.splicing.methods import span, sparse

    rule = span.RULES.get(operation.method) or sparse.RULES.get(operation.method)
    operands, base = _operands(operation, reader)
    return rule and rule(inputs_of(operation.method, operands, base, **_whole(operation)))


def _operands(operation: Combine, reader: Reader) -> tuple[list[Operand], Operand | None]:
    operands = [Operand(reader(given), given.parameters) for given in operation.inputs]
    return operands, Operand(reader(operation.base)) if operation.base else None


def _whole(operation: Combine) -> dict[str, Any]:
    return {
        "shape": operation.shape,
        "parameters": operation.parameters,
        "name": operation.name,
        "seed": operation.seed,
    }


def _rotation_chunks(operation: Rotate, how: Computation) -> Chunks:
    """Rotate one tensor, held whole, in float64 on the CPU."""
    import torch

    rotation: Rotation = how.fits[operation.part].at(operation.place)

    def read(given: Input) -> "torch.Tensor":
        count = math.prod(given.tensor.shape)
        values = elements(given.tensor, how.files, 0, count, torch.float64)
        if not how.allow_nan and not all_finite(values):
            raise FrankenmergeError(not_finite(given.donor, given.source))
        return values.view(given.tensor.shape)

    gain = read(operation.gain) if operation.gain else None
    made = rotated(read(operation.given), operation.use, rotation, gain)
    return _rounded([made.flatten()], operation.dtype)


def _transplanted_chunks(operation: Transplant, how: Computation) -> Chunks:
    """Rows for another vocabulary; both matrices are held whole, in float32."""
    from frankenmerge.splicing.transplanting import transplanted

    def read(given: Input) -> "torch.Tensor":
        reader = tensor_reader(given, how.files, device=how.device, allow_nan=how.allow_nan)
        return reader(0, math.prod(given.tensor.shape)).view(given.tensor.shape)

    made = transplanted(
        read(operation.given),
        read(operation.reference) if operation.reference else None,
        operation.tokens,
        operation.approximation,
        operation.anchors,
    )
    return _rounded([made.flatten()], operation.dtype)


def _noisy_chunks(operation: Perturb, how: Computation) -> Chunks:
    """Add noise in float32, block by block of the random stream."""
    import torch

    from frankenmerge.splicing.methods.inputs import BLOCK
    from frankenmerge.splicing.methods.noise import normals

    read = tensor_reader(operation.given, how.files, device="cpu", allow_nan=how.allow_nan)
    size = math.prod(operation.shape)

    def chunks() -> "Iterator[torch.Tensor]":
        for block, start in enumerate(range(0, size, BLOCK)):
            stop = min(start + BLOCK, size)
            noise = normals(operation.seed, operation.name, block, stop - start)
            noisy = read(start, stop).add_(torch.from_numpy(noise), alpha=operation.deviation)
            yield noisy.mul_(operation.scale)

    return _rounded(chunks(), operation.dtype)


def _rounded(chunks: "Iterable[torch.Tensor]", dtype: str) -> Chunks:
    import torch

    for chunk in chunks:
        made = chunk.to(torch_dtype(dtype)).cpu().contiguous()
        if not (finite := all_finite(made)):
            # Every NaN the same one: which one an operation makes is up to the processor.
            made.masked_fill_(made.isnan(), math.nan)
        yield made.view(torch.uint8).numpy().data, finite


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(arithmetics: Collection[Arithmetic]) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute a tensor each: as many as cores, or two for copies, bound by the disk.

    Torch keeps to one thread in each, so that results do not depend on the number of cores; its
    own setting is restored.
    """
    count = cores() if arithmetics else 2
    if "torch" not in arithmetics:
        with ThreadPoolExecutor(count) as pool:
            yield pool
        return
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=one_thread) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def open_files() -> Iterator[DonorFiles]:
    """The donors' files, to be read by several threads; closed at the end."""
    files = DonorFiles()
    try:
        yield files
    finally:
        files.close()
