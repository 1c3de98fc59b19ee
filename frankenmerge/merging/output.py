"""Whether an output can be written: nothing overwritten, no donor touched, enough room."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, raise_all
from frankenmerge.merging.journal import work_folder

SPARE = 64 << 20
"""Bytes of the disk that are left free."""


def output_faults(output: Path, donors: Mapping[str, Checkpoint]) -> Iterator[Fault]:
    """Why an output would overwrite something, change a donor, or cannot be made."""
    place = str(output)
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        yield Fault(place, "a folder that can be created", str(error), "choose another output")
        return
    if output.is_symlink() or (
        output.exists() and not (output.is_dir() and not any(output.iterdir()))
    ):
        remedy = "choose another output or move it away"
        expected = "a folder that does not exist yet, or an empty one"
        yield Fault(place, expected, "something is there", remedy)
    elif output.exists() and (found := _immovable(output)):
        yield Fault(
            place,
            "a folder that the checkpoint can replace",
            found,
            f"choose a folder in it, such as {output / 'merged'}",
        )
    for donor in donors.values():
        if donor.path.resolve() in (output.resolve(), *output.resolve().parents):
            yield Fault(
                place,
                "a folder outside the donors",
                f"it is inside {donor.path}",
                "choose another output",
            )
    existing = existing_parent(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Fault(
            place, "a folder that is writable", f"{existing} is not", "choose another output"
        )


def _immovable(folder: Path) -> str | None:
    """What keeps a folder from being replaced by another, if anything.

    The working directory would vanish for the processes in it.
    """
    if os.path.ismount(folder):
        return "a mount point"
    return "the working directory" if folder.samefile(".") else None


def check_output(output: Path, donors: Mapping[str, Checkpoint], size: int) -> None:
    """Raise FrankenmergeError for an output that exists, is inside a donor, or does not fit."""
    raise_all([*output_faults(output, donors), *room_faults(output, size)])


def room_faults(output: Path, needed: int) -> Iterator[Fault]:
    """Why so many bytes do not fit on the output's disk.

    Those that an unfinished merge has written need no more space.
    """
    there = sum(
        path.stat().st_blocks * 512 for path in work_folder(output).rglob("*") if path.is_file()
    )
    free = shutil.disk_usage(existing_parent(output)).free
    if free < needed - there + SPARE:
        expected = (
            f"{max(needed - there, 0):,} bytes of free disk space, and {SPARE >> 20} MiB to spare"
        )
        yield Fault(str(output), expected, f"{free:,}", "free some space or choose another disk")


def existing_parent(output: Path) -> Path:
    """The nearest folder above the output that exists."""
    return next(parent for parent in output.resolve().parents if parent.exists())
