"""Copy bytes from file to file: cloned or copied in the kernel, else read and written."""

import fcntl
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from frankenmerge.merging.shards import BLOCK, Range
from frankenmerge.progress import Advance
from frankenmerge.splicing.reading import unreadable

CHUNK = 8 << 20
"""Bytes asked of the kernel at a time, so that progress shows and Ctrl-C is heard."""
PIECE = 64 << 20
"""Bytes that one thread copies in one go."""
_FICLONERANGE = 0x4020940D
"""The request of ioctl(2) by which XFS, btrfs and others let two files share blocks; see
ioctl_ficlonerange(2).
"""


def clonable(files: Iterable[Path], folder: Path) -> frozenset[Path]:
    """Those of `files` whose blocks a file in `folder` can share.

    It is tried with the largest file of every file system.
    """
    by_device: dict[int, list[Path]] = {}
    for file in files:
        by_device.setdefault(file.stat().st_dev, []).append(file)
    largest = [max(group, key=lambda file: file.stat().st_size) for group in by_device.values()]
    return frozenset(
        file
        for group, first in zip(by_device.values(), largest, strict=True)
        if _clones(first, folder)
        for file in group
    )


def _clones(file: Path, folder: Path) -> bool:
    try:
        with file.open("rb") as source, tempfile.TemporaryFile(dir=folder) as target:
            clone(source.fileno(), target.fileno(), 0, 0, BLOCK)
            return os.pread(target.fileno(), BLOCK, 0) == os.pread(source.fileno(), BLOCK, 0)
    except OSError:
        return False


def clone(source: int, target: int, start: int, position: int, count: int) -> None:
    """Let `target` share `count` bytes with `source`; all numbers are whole blocks.

    Raises OSError where that cannot be done.
    """
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, start, count, position))


def pieces(whole: Range) -> Iterator[Range]:
    """Cut a range for several threads; all pieces but the last end at a block of the donor."""
    start, end = whole.start, whole.start + whole.bytes
    while start < end:
        stop = min(end, (start + PIECE) // BLOCK * BLOCK)
        yield Range(whole.file, start, whole.position + start - whole.start, stop - start)
        start = stop


def copy_range(piece: Range, source: int, target: int, moved: Advance, *, cloning: bool) -> None:
    """Copy a range from the file `source` to the file `target`.

    `moved` is called with the bytes done since its last call. With `cloning` the whole blocks
    are shared and only the ends copied. Raises OSError when writing fails,
    FrankenmergeError when reading does.
    """
    start, position, left = piece.start, piece.position, piece.bytes
    if cloning and (start - position) % BLOCK == 0:
        head = min(-start % BLOCK, left)
        blocks = (left - head) // BLOCK * BLOCK
        if blocks and _cloned(source, target, start + head, position + head, blocks):
            _copy(piece.file, source, target, start, position, head, moved)
            moved(blocks)
            done = head + blocks
            start, position, left = start + done, position + done, left - done
    _copy(piece.file, source, target, start, position, left, moved)


def _cloned(source: int, target: int, start: int, position: int, count: int) -> bool:
    try:
        clone(source, target, start, position, count)
    except OSError:  # copied instead, which reports what prevents that too
        return False
    return True


def _copy(
    file: Path,
    source: int,
    target: int,
    start: int,
    position: int,
    left: int,
    moved: Advance,
) -> None:
    while left:
        count = min(left, CHUNK)
        try:
            done = os.copy_file_range(source, target, count, start, position)
        except (OSError, AttributeError):  # file systems, kernels and systems without it
            done = 0
        if not done:
            done = os.pwrite(target, _content(file, source, count, start), position)
        flush(target, position, done)
        start, position, left = start + done, position + done, left - done
        moved(done)


def _content(file: Path, source: int, count: int, start: int) -> bytes:
    """Up to `count` bytes, and at least one, of a donor's file."""
    try:
        content = os.pread(source, count, start)
    except OSError as error:
        raise unreadable(file, error.strerror or str(error)) from error
    if not content:
        raise unreadable(file, f"it ended at byte {os.fstat(source).st_size:,}")
    return content


def write_fully(target: int, content: bytes | memoryview, position: int) -> None:
    """Write all of `content` to the file `target`, however little the system takes at a time."""
    view = memoryview(content)
    while view:
        done = os.pwrite(target, view, position)
        view, position = view[done:], position + done


def flush(target: int, position: int, count: int) -> None:
    """Let the kernel begin to write these bytes to disk, so that the final sync has little to do.

    The advice means that the pages are not needed soon: dirty ones are written, and stay in memory
    while they are.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, position, count, os.POSIX_FADV_DONTNEED)
