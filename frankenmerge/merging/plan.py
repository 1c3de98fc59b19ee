"""Everything that is settled before the first byte of a checkpoint is written: what, where to, and that it can be."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.distributed import Rank
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, raise_all
from frankenmerge.merging.copying import clonable
from frankenmerge.merging.journal import work_folder
from frankenmerge.merging.shards import Shard, operation_faults, plan_shards, readings
from frankenmerge.splicing.compatibility import recipe_faults
from frankenmerge.splicing.computing import Arithmetic, arithmetic, check_device, not_finite
from frankenmerge.splicing.operations import Copy, Operation, schedule

SPARE = 64 << 20
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class Options:
    """How a merge is written. What is written does not depend on it, but for the cut into shards and the device's arithmetic."""

    shard_size: int = 5 * 10**9
    """Bytes of tensors in a file; one tensor may exceed it."""
    reflink: bool = True
    """Rank blocks with the donors where the file system can; then shards follow the donors' blocks
    rather than the layers.
    """
    resume: bool = False
    """Go on with an unfinished merge, and keep the finished shards should this one fail."""
    device: str = "cpu"
    """The torch device that computes; copies need none."""
    allow_nan: bool = False
    """Go on where a computed tensor holds NaN or Inf, or is made of any."""
    check_finite: bool = False
    """Read every donor's tensor before the first byte is written, and refuse NaN and Inf in copied
    ones too.
    """
    checksums: bool = False
    """Read every shard again and put its SHA-256 into the provenance."""


class Plan(NamedTuple):
    """A merge that can be written."""

    operations: list[Operation]
    shards: list[Shard]
    clonable: frozenset[Path]
    """The donors' files of which blocks can be shared."""
    arithmetics: frozenset[Arithmetic]
    """What computes, some tensors the one, others the other; none where all are copied."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def computed(self) -> int:
        """How many tensors are computed; the others are copied."""
        return sum(not isinstance(operation, Copy) for operation in self.operations)

    @property
    def files(self) -> set[Path]:
        """The donors' files that are read."""
        return {
            reading.tensor.file for operation in self.operations for reading in readings(operation)
        }


def planned(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    output: Path,
    options: Options,
    rank: Rank,
    *,
    dry: bool = False,
) -> Plan:
    """Check everything that can be known before the first byte and cut the result into shards. Writes nothing.

    A `dry` plan, after which nothing is written, does without the weights of donors on the hub.
    Raises FrankenmergeError with all faults of recipe and output, or all of donors' tensors, room
    and device.
    """
    raise_all(
        [*recipe_faults(recipe, donors), *(output_faults(output, donors) if rank.first else ())]
    )
    if not dry or options.check_finite:
        raise_all(_absence_faults(donors))
    operations: list[Operation] = list(schedule(recipe, donors))
    files = {
        tensor.file for donor in donors.values() if donor.whole for tensor in donor.tensors.values()
    }
    raise_all(operation_faults(operations, files))
    files &= {reading.tensor.file for operation in operations for reading in readings(operation)}
    sharing = clonable(files, _existing(output)) if options.reflink else frozenset()
    arithmetics: frozenset[Arithmetic] = frozenset(
        arithmetic(operation, options.device)
        for operation in operations
        if not isinstance(operation, Copy)
    )
    plan = Plan(
        operations, plan_shards(operations, options.shard_size, sharing), sharing, arithmetics
    )
    if "torch" in arithmetics:
        check_device(options.device)
    if rank.first:
        new = sum(shard.bytes for shard in plan.shards if not shard.cloned)
        raise_all(
            [*room_faults(output, new), *(not_finite(operations) if options.check_finite else ())]
        )
    return plan


def _absence_faults(donors: Mapping[str, Checkpoint]) -> Iterator[Fault]:
    for name, donor in donors.items():
        if not donor.whole:
            yield Fault(
                name,
                "a donor whose weights are at hand",
                "its headers alone",
                "open it with its weights, see --download",
            )


def output_faults(output: Path, donors: Mapping[str, Checkpoint]) -> Iterator[Fault]:
    """Tell why an output would overwrite something, touch a donor or cannot be made."""
    place = str(output)
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        yield Fault(place, "a folder that may be made", str(error), "choose another output")
        return
    if output.is_symlink() or (
        output.exists() and not (output.is_dir() and not any(output.iterdir()))
    ):
        remedy = "choose another output or move it away"
        yield Fault(
            place, "a folder that does not exist yet, or an empty one", "something is there", remedy
        )
    elif output.exists() and (found := _immovable(output)):
        yield Fault(
            place,
            "a folder whose place a checkpoint can take",
            found,
            f"choose a folder in it, such as {output / 'merged'}",
        )
    for donor in donors.values():
        if donor.path.resolve() in (output.resolve(), *output.resolve().parents):
            yield Fault(
                place,
                "a folder outside the donors",
                f"it lies in {donor.path}",
                "choose another output",
            )
    existing = _existing(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Fault(
            place, "a folder that may be written to", f"{existing} may not", "choose another output"
        )


def _immovable(folder: Path) -> str | None:
    """What keeps a folder from being replaced by another, if anything; the working directory would be gone for who stands in it."""
    if os.path.ismount(folder):
        return "a mount point"
    return "the working directory" if folder.samefile(".") else None


def check_output(output: Path, donors: Mapping[str, Checkpoint], size: int) -> None:
    """Raise FrankenmergeError for an output that would overwrite something, touch a donor or not fit."""
    raise_all([*output_faults(output, donors), *room_faults(output, size)])


def room_faults(output: Path, needed: int) -> Iterator[Fault]:
    """Tell why so many bytes do not fit on the output's disk; those of an unfinished merge that are there need no room."""
    there = sum(
        path.stat().st_blocks * 512 for path in work_folder(output).rglob("*") if path.is_file()
    )
    free = shutil.disk_usage(_existing(output)).free
    if free < needed - there + SPARE:
        expected = (
            f"{max(needed - there, 0):,} bytes of free disk space, and {SPARE >> 20} MiB to spare"
        )
        yield Fault(str(output), expected, f"{free:,}", "free some space or choose another disk")


def _existing(output: Path) -> Path:
    return next(parent for parent in output.resolve().parents if parent.exists())
