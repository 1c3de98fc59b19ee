"""Which tensor goes into which file of the result, and where. Reads and writes nothing."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from frankenmerge.donors.shards import SINGLE_NAME
from frankenmerge.errors import Fault
from frankenmerge.splicing.operations import Combine, Computed, Copy, Operation, readings
from frankenmerge.storage.dtypes import BYTES_OF, COMPUTED
from frankenmerge.storage.safetensors_header import header_of

BLOCK = 4096
"""File systems clone whole blocks of this many bytes."""
WORTH_CLONING = 1 << 20
"""Bytes from which on a tensor may begin a shard of its own in order to be cloned."""


class Place(NamedTuple):
    """Where an operation's bytes go in their shard."""

    operation: Operation
    start: int


class Shard(NamedTuple):
    """One file of the result."""

    name: str
    header: bytes
    """The eight bytes of its length included."""
    operations: tuple[Operation, ...]
    cloned: bool = False
    """Whether every tensor lies as its donor's does within a block, so that blocks can be cloned.
    """

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(operation.bytes for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.tensor_bytes

    @property
    def places(self) -> Iterator[Place]:
        """Every operation with its first byte in the file."""
        position = len(self.header)
        for operation in self.operations:
            yield Place(operation, position)
            position += operation.bytes


class Range(NamedTuple):
    """Bytes that are contiguous in a donor and in the result: of one tensor or more."""

    file: Path
    start: int
    """First byte in the donor's file."""
    position: int
    """First byte in the shard."""
    bytes: int


def operation_faults(operations: Sequence[Operation], files: Collection[Path]) -> Iterator[Fault]:
    """Check every operation's names, types, shapes and bytes, and the donors' `files` it reads."""
    names: set[str] = set()
    needed: dict[Path, int] = {}
    for operation in operations:
        if operation.name in names:
            yield Fault(
                operation.name,
                "every tensor of the result once",
                "twice",
                "remove one of its sources",
            )
        names.add(operation.name)
        if not isinstance(operation, Copy):
            yield from _computed_faults(operation)
        for donor, source, tensor in readings(operation):
            if tensor.bytes != BYTES_OF[tensor.dtype] * math.prod(tensor.shape):
                expected = f"bytes for the shape {list(tensor.shape)} of {tensor.dtype}"
                yield Fault(
                    f"{donor}: {source}", expected, f"{tensor.bytes:,}", "restore the donor"
                )
            needed[tensor.file] = max(tensor.stop, needed.get(tensor.file, 0))
    for file, stop in ((file, stop) for file, stop in needed.items() if file in files):
        size = file.stat().st_size if file.exists() else 0
        if size < stop:
            yield Fault(
                str(file),
                f"{stop:,} bytes or more, as its header says",
                f"{size:,}",
                "restore the donor",
            )


def _computed_faults(operation: Computed) -> Iterator[Fault]:
    if operation.dtype not in COMPUTED:
        yield Fault(
            operation.name,
            f"one of the types {', '.join(COMPUTED)}",
            operation.dtype,
            "choose another dtype",
        )
    for donor, source, tensor in readings(operation):
        if tensor.dtype not in COMPUTED:
            yield Fault(
                f"{donor}: {source}",
                f"one of the types {', '.join(COMPUTED)}",
                tensor.dtype,
                "use an unquantised donor",
            )
    for part in operation.read if isinstance(operation, Combine) else ():
        shape = (
            part.tensor.shape if part.rows is None else (len(part.rows.row), *part.tensor.shape[1:])
        )
        if shape != operation.shape:
            expected = f"the shape {list(operation.shape)} of {operation.name}"
            yield Fault(
                f"{part.donor}: {part.source}",
                expected,
                str(list(shape)),
                "merge donors of one shape",
            )


def plan_shards(
    operations: Sequence[Operation], limit: int, clonable: Collection[Path] = frozenset()
) -> list[Shard]:
    """Divide operations among files of at most `limit` bytes of tensors (one may exceed it).

    Without `clonable` files the tensors stay in their order. From `clonable` files blocks can be
    cloned where the tensor begins at the same byte of a block here as there: those tensors are
    chained into shards in which they do, and the others follow in shards of their own.
    """
    chains, rest = _chained(operations, limit, clonable)
    groups = [(group, group[0].tensor.start % BLOCK) for group in chains] + [
        (group, None) for group in _in_order(rest, limit)
    ]
    names = (
        [SINGLE_NAME]
        if len(groups) == 1
        else [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    )
    return [
        Shard(name, _header(group, residue), tuple(group), residue is not None)
        for name, (group, residue) in zip(names, groups, strict=True)
    ]


def _in_order(operations: Sequence[Operation], limit: int) -> list[list[Operation]]:
    groups: list[list[Operation]] = []
    filled = 0
    for operation in operations:
        if not groups or filled + operation.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(operation)
        filled += operation.bytes
    return groups


def _chained(
    operations: Sequence[Operation], limit: int, clonable: Collection[Path]
) -> tuple[list[list[Copy]], list[Operation]]:
    """Chains of copies, and the operations that are in none.

    A tensor may follow another where the one's bytes end at the same byte of a block as the other's
    begin. Sizes are mostly whole blocks, so that there is about one chain for every `start % BLOCK`
    that occurs.
    """
    chains: list[list[Copy]] = []
    ending: dict[int, list[int]] = defaultdict(list)
    """The chains that can be continued, by the byte of a block at which they end."""
    filled: list[int] = []
    rest: list[Operation] = []
    for operation in operations:
        if not isinstance(operation, Copy) or operation.tensor.file not in clonable:
            rest.append(operation)
            continue
        candidates, size = ending[operation.tensor.start % BLOCK], operation.tensor.bytes
        number = next(
            (number for number in reversed(candidates) if filled[number] + size <= limit), None
        )
        if number is not None:
            candidates.remove(number)
        elif size >= WORTH_CLONING:
            number = len(chains)
            chains.append([])
            filled.append(0)
        else:
            rest.append(operation)
            continue
        chains[number].append(operation)
        filled[number] += size
        ending[operation.tensor.stop % BLOCK].append(number)
    return chains, rest


def _header(operations: Sequence[Operation], residue: int | None) -> bytes:
    """A safetensors header, padded with a `residue` so that data begin at that byte of a block."""
    entries = ((operation.name, operation.dtype, operation.shape) for operation in operations)
    header = header_of(entries, {"format": "pt"})
    if residue is None:
        return header
    text = header[8:].rstrip()
    text += b" " * ((residue - 8 - len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def ranges_of(shard: Shard) -> Iterator[Range]:
    """What is copied into a shard; what is contiguous here and in the donor is one range."""
    last: Range | None = None
    for operation, position in shard.places:
        if not isinstance(operation, Copy):
            continue
        file, start, size = operation.tensor.file, operation.tensor.start, operation.tensor.bytes
        if last and (file, start, position) == (
            last.file,
            last.start + last.bytes,
            last.position + last.bytes,
        ):
            last = last._replace(bytes=last.bytes + size)
            continue
        if last:
            yield last
        last = Range(file, start, position, size)
    if last:
        yield last
