"""The header of a safetensors file: every tensor's name, type, shape and position in the file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.storage.dtypes import BYTES_OF

HEADER_LIMIT = 100_000_000
"""Bytes; a longer header is an attack, and safetensors refuses it too."""


class Tensor(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    dtype: str
    """The name in safetensors: `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.stop - self.start


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what the file should be, for the error message.

    Raises:
        FrankenmergeError: if the file is missing, is not valid JSON, or has duplicate names.
    """
    if path.exists() and not path.is_file():
        raise fail(str(path), what, "not a regular file", "restore the file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise fail(
            str(path), what, "no such file", "give the folder of a complete checkpoint"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise fail(str(path), what, f"{error}", "restore the file") from error


def read_header(file: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file and compare every entry with the file.

    Raises FrankenmergeError for a missing or truncated file and for offsets that overlap, leave
    gaps or run past the end.
    """
    if file.exists() and not file.is_file():
        raise fail(
            str(file), "a safetensors file", "not a regular file", "download the shard again"
        )
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            text = handle.read(header_length(handle.read(8), size, str(file)))
    except FileNotFoundError as error:
        raise fail(
            str(file),
            "a shard that the checkpoint needs",
            "no such file",
            "download the missing shard",
        ) from error
    except (OSError, ValueError) as error:
        raise fail(
            str(file), "a safetensors header", str(error), "download the shard again"
        ) from error
    return tensors_of(text, size, file)


def header_of(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a file of tensors in this order, the eight bytes of its length included.

    Args:
        tensors: name, type and shape of each.
        metadata: what else the header says.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + BYTES_OF[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_length(first: bytes, size: int, place: str) -> int:
    """The length of the header in bytes, from the first eight bytes of the file.

    Raises FrankenmergeError if it does not fit into a file of `size` bytes.
    """
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(HEADER_LIMIT, size - 8):
        found = f"{size:,} bytes, and a header length of {length:,}"
        raise fail(place, "a complete safetensors file", found, "download the shard again")
    return length


def tensors_of(text: bytes, size: int, file: Path) -> dict[str, Tensor]:
    """Read the text of a header and compare its entries with the `size` of the whole file.

    Raises FrankenmergeError for invalid headers, and for offsets that overlap, leave gaps or run
    past the end.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise fail(
            str(file), "a safetensors header", str(error), "download the shard again"
        ) from error
    if not isinstance(header, dict):
        raise fail(
            str(file),
            "a safetensors header, a JSON object",
            type(header).__name__,
            "download the shard again",
        )
    header.pop("__metadata__", None)
    tensors, faults, data_start = {}, [], 8 + len(text)
    for name, entry in header.items():
        if (tensor := _tensor(entry, file, data_start)) is not None:
            tensors[name] = tensor
        else:
            faults.append(
                Fault(
                    f"{file}: {name}",
                    "dtype, shape and offsets that agree",
                    json.dumps(entry)[:200],
                    "download the shard again",
                )
            )
    raise_all(faults)
    _check_positions(tensors, data_start, size, file)
    return tensors


def _tensor(entry: Any, file: Path, data_start: int) -> Tensor | None:
    """The tensor of a header's entry; None if the entry is invalid."""
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or any(
            type(number) is not int or not 0 <= number < 1 << 63 for number in [*shape, begin, end]
        ):
            return None
        if end - begin != BYTES_OF[entry["dtype"]] * math.prod(shape):
            return None
    except (KeyError, TypeError, ValueError):
        return None
    return Tensor(file, entry["dtype"], tuple(shape), data_start + begin, data_start + end)


def _check_positions(tensors: Mapping[str, Tensor], start: int, size: int, file: Path) -> None:
    """Raise FrankenmergeError unless the tensors fill the file from `start` to its end."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            raise fail(
                f"{file}: {name}",
                f"its bytes to start at {position:,}",
                f"{tensor.start:,}",
                "download the shard again",
            )
        position = tensor.stop
    if position != size:
        found = f"{size:,} bytes ({'truncated' if size < position else 'too many bytes'})"
        raise fail(
            str(file), f"{position:,} bytes, as its header says", found, "download the shard again"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := [name for name, _ in pairs]) != len(set(names)):
        raise ValueError("duplicate names in an object")
    "".join(names).encode()  # raises ValueError for lone surrogates, which are not text
    return dict(pairs)
