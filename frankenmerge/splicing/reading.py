"""Read elements of donors' tensors: as tensors for torch, arrays for numpy, raw bytes for C."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.splicing.methods.inputs import Raw
from frankenmerge.splicing.operations import Input
from frankenmerge.splicing.vocabulary import Rows
from frankenmerge.storage.dtypes import BYTES_OF, torch_dtype
from frankenmerge.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    import numpy as np
    import torch

LIMIT = 16
"""Files that stay open."""


@dataclass
class _Open:
    handle: int
    readers: int = 0


class DonorFiles:
    """The donors' files, each opened when it is read, by any number of threads.

    At most `LIMIT` are open, and those that threads are reading.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._files: dict[Path, _Open] = {}  # the most recently used last

    @contextmanager
    def opened(self, file: Path) -> Iterator[int]:
        """The descriptor of a file, for as long as the context lasts.

        Raises FrankenmergeError if the file cannot be opened.
        """
        with self._lock:
            found = self._files.pop(file, None) or _Open(_descriptor(file))
            self._files[file] = found
            found.readers += 1
        try:
            yield found.handle
        finally:
            with self._lock:
                found.readers -= 1
                self._close(len(self._files) - LIMIT)

    def close(self) -> None:
        """Close all files; none is being read any more."""
        self._close(len(self._files))

    def _close(self, count: int) -> None:
        """Close so many files, the least recently used first, but none that is being read."""
        idle = [file for file, each in self._files.items() if not each.readers]
        for file in idle[: max(0, count)]:
            os.close(self._files.pop(file).handle)


def _descriptor(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise unreadable(file, error.strerror or str(error)) from error


def unreadable(file: Path, found: str) -> FrankenmergeError:
    """The error of a donor's file that cannot be read to the end."""
    remedy = "check the disk, or download the file again"
    return fail(str(file), "a file that can be read to its end", found, remedy)


def read_into(handle: int, tensor: Tensor, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a tensor from byte `start` on.

    Raises FrankenmergeError if the file cannot be read, or ends before.
    """
    position = tensor.start + start
    while view:
        try:
            done = os.preadv(handle, [view], position)
        except OSError as error:
            raise unreadable(tensor.file, error.strerror or str(error)) from error
        if not done:
            size = os.fstat(handle).st_size
            raise unreadable(tensor.file, f"it ended at byte {size:,}")
        view, position = view[done:], position + done


def read_stretch(files: DonorFiles, tensor: Tensor, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a tensor. Raises FrankenmergeError if they cannot be read."""
    with files.opened(tensor.file) as handle:
        return read_fully(handle, tensor, start, stop)


def read_fully(handle: int, tensor: Tensor, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a tensor. Raises FrankenmergeError as `read_into`."""
    content = bytearray(stop - start)
    read_into(handle, tensor, start, memoryview(content))
    return content


def not_finite(donor: str, source: str) -> Fault:
    """The fault of a tensor that holds NaN or Inf."""
    return Fault(
        f"{donor}: {source}",
        "finite numbers",
        "NaN or Inf",
        "repair or replace the donor, or allow it with --allow-nan",
    )


# For torch


def tensor_reader(
    given: Input, files: DonorFiles, *, device: str, allow_nan: bool
) -> "Callable[[int, int], torch.Tensor]":
    """Return a function that reads flat elements of an input in float32.

    It raises FrankenmergeError for NaN and Inf in them, unless `allow_nan`.
    """
    read = _read if given.rows is None else _read_rows
    return partial(read, given, files, device=device, allow_nan=allow_nan)


def _read(
    given: Input, files: DonorFiles, start: int, stop: int, *, device: str, allow_nan: bool
) -> "torch.Tensor":
    made = elements(given.tensor, files, start, stop).to(device)
    if not allow_nan and not all_finite(made):
        raise FrankenmergeError(not_finite(given.donor, given.source))
    return made


def _read_rows(
    given: Input, files: DonorFiles, start: int, stop: int, *, device: str, allow_nan: bool
) -> "torch.Tensor":
    """Elements of a matrix whose rows come from several donors' matrices."""
    import torch

    assert given.rows
    made = torch.zeros(stop - start)
    for donor, first, place, count in _stretches(
        given.rows, math.prod(given.tensor.shape[1:]), start, stop
    ):
        taken = elements(given.rows.tensors[donor], files, first, first + count)
        if not allow_nan and not all_finite(taken):
            raise FrankenmergeError(not_finite(given.rows.donors[donor], given.source))
        made[place : place + count] = taken
    return made.to(device)


def elements(
    tensor: Tensor, files: DonorFiles, start: int, stop: int, dtype: "torch.dtype | None" = None
) -> "torch.Tensor":
    """Flat elements [start, stop) as the file has them, in `dtype`, float32 when absent."""
    import torch

    width = BYTES_OF[tensor.dtype]
    content = read_stretch(files, tensor, start * width, stop * width)
    return torch.frombuffer(content, dtype=torch_dtype(tensor.dtype)).to(dtype or torch.float32)


def all_finite(values: "torch.Tensor") -> bool:
    """Whether all are finite; a sum shows it in one pass, unless finite numbers overflow it."""
    import torch

    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


# For numpy


def decoded(content: "bytes | bytearray | memoryview", dtype: str) -> "np.ndarray":
    """The elements of these bytes in float32, or in float64 if that is their type."""
    import numpy as np

    if dtype == "BF16":
        bits = np.frombuffer(content, "<u2").astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    stored = np.frombuffer(content, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    return stored.astype(np.float32) if dtype == "F16" else stored


def encoded(values: "np.ndarray", dtype: str) -> bytes:
    """The bytes of finite float32 elements in a floating type, rounded to the nearest."""
    import numpy as np

    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return (((bits >> 16 & 1) + 0x7FFF + bits) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def values_of(tensor: Tensor, files: DonorFiles, start: int, stop: int) -> "np.ndarray":
    """Flat elements [start, stop) of a tensor, as `decoded` gives them."""
    width = BYTES_OF[tensor.dtype]
    return decoded(read_stretch(files, tensor, start * width, stop * width), tensor.dtype)


# For C


def raw_reader(given: Input, files: DonorFiles, *, allow_nan: bool) -> Callable[[int, int], Raw]:
    """Return a function that reads flat elements of an input into a buffer that it reuses.

    Where rows come from several donors' matrices they are read as float32, and it raises
    FrankenmergeError, unless `allow_nan`, for NaN and Inf in them; otherwise nothing is checked.
    """
    fault = not_finite(given.donor, given.source)
    content = bytearray()

    def view_of(size: int) -> memoryview:
        nonlocal content
        if len(content) < size:
            content = bytearray(size)
        return memoryview(content)[:size]

    def read(start: int, stop: int) -> Raw:
        width = BYTES_OF[given.tensor.dtype]
        view = view_of((stop - start) * width)
        with files.opened(given.tensor.file) as handle:
            read_into(handle, given.tensor, start * width, view)
        return Raw(view, given.tensor.dtype, fault)

    def read_rows(start: int, stop: int) -> Raw:
        from frankenmerge.splicing.methods.native_chunks import converted

        assert given.rows
        view = view_of((stop - start) * 4)
        view[:] = bytes(len(view))
        for donor, first, place, count in _stretches(
            given.rows, math.prod(given.tensor.shape[1:]), start, stop
        ):
            tensor = given.rows.tensors[donor]
            width = BYTES_OF[tensor.dtype]
            taken = read_stretch(files, tensor, first * width, (first + count) * width)
            raw = Raw(
                memoryview(taken), tensor.dtype, not_finite(given.rows.donors[donor], given.source)
            )
            converted(raw, view[place * 4 : (place + count) * 4], allow_nan=allow_nan)
        return Raw(view, "F32", fault)

    return read if given.rows is None else read_rows


def _stretches(
    rows: Rows, width: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, int]]:
    """Elements [start, stop) of a matrix of rows, as stretches of single donors; no zeros.

    Each is (donor, its first element, the place counted from `start`, the number of elements).
    Neighbouring rows that are neighbours in the donor too are taken together.
    """
    place, last = start // width, -(-stop // width)
    while place < last:
        donor, row, count = int(rows.origin[place]), int(rows.row[place]), 1
        while (
            place + count < last
            and rows.origin[place + count] == donor
            and rows.row[place + count] == row + count
        ):
            count += 1
        if donor >= 0:
            first, end = max(place * width, start), min((place + count) * width, stop)
            yield donor, row * width + first - place * width, first - start, end - first
        place += count
