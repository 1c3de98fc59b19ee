"""Everything that is decided before the first byte of a checkpoint is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from frankenmerge.distributed import Rank
from frankenmerge.errors import Fault, raise_all
from frankenmerge.merging.copying import clonable
from frankenmerge.merging.finite import finite_faults
from frankenmerge.merging.output import existing_parent, output_faults, room_faults
from frankenmerge.merging.shards import Shard, operation_faults, plan_shards
from frankenmerge.splicing.computing import Arithmetic, arithmetic, check_device
from frankenmerge.splicing.operations import Copy, Gate, readings
from frankenmerge.splicing.resolve import Splice


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is written.

    What is written does not depend on it, except for the division into shards and the device's
    arithmetic.
    """

    shard_size: int = 5 * 10**9
    """Bytes of tensors in a file; one tensor may exceed it."""
    reflink: bool = True
    """Share blocks with the donors where the file system can; then shards follow the donors' blocks
    rather than the layers.
    """
    resume: bool = False
    """Continue an unfinished merge, and keep the finished shards should this one fail."""
    device: str = "cpu"
    """The torch device that computes; copies need none."""
    allow_nan: bool = False
    """Allow NaN and Inf in inputs and computed tensors."""
    check_finite: bool = False
    """Read every donor's tensor before the first byte is written, and refuse NaN and Inf in copied
    ones too.
    """
    checksums: bool = False
    """Read every shard again and put its SHA-256 into the provenance."""


class WritePlan(NamedTuple):
    """A splice that can be written, and how."""

    splice: Splice
    shards: list[Shard]
    clonable: frozenset[Path]
    """The donors' files whose blocks can be shared."""
    arithmetics: frozenset[Arithmetic]
    """What computes tensors, possibly both; empty where all are copied."""

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return self.splice.bytes

    @property
    def files(self) -> set[Path]:
        """The donors' files that are read."""
        operations = self.splice.operations
        return {reading.tensor.file for each in operations for reading in readings(each)}


def planned(
    splice: Splice, output: Path, options: MergeOptions, rank: Rank, *, dry: bool = False
) -> WritePlan:
    """Check everything that can be known before the first byte, and divide the result into shards.

    Args:
        splice: what is written.
        output: where.
        options: how.
        rank: of this process; the first one checks the output.
        dry: whether nothing is written afterwards: then headers of donors suffice.

    Raises:
        FrankenmergeError: with all faults of the output, or of tensors, room and device.
    """
    raise_all(output_faults(output, splice.donors) if rank.first else ())
    if not dry or options.check_finite:
        raise_all(_absence_faults(splice))
    whole = (donor for donor in splice.donors.values() if donor.whole)
    files = {tensor.file for donor in whole for tensor in donor.tensors.values()}
    raise_all(operation_faults(splice.operations, files))
    files &= {reading.tensor.file for each in splice.operations for reading in readings(each)}
    sharing = clonable(files, existing_parent(output)) if options.reflink else frozenset()
    computed = (each for each in splice.operations if not isinstance(each, Copy | Gate))
    arithmetics: frozenset[Arithmetic] = frozenset(
        arithmetic(each, options.device) for each in computed
    )
    shards = plan_shards(splice.operations, options.shard_size, sharing)
    if "torch" in arithmetics:
        check_device(options.device)
    if rank.first:
        new = sum(shard.bytes for shard in shards if not shard.cloned)
        broken = finite_faults(splice.operations) if options.check_finite else []
        raise_all([*room_faults(output, new), *broken])
    return WritePlan(splice, shards, sharing, arithmetics)


def _absence_faults(splice: Splice) -> Iterator[Fault]:
    for name, donor in splice.donors.items():
        if not donor.whole:
            remedy = "open it with its weights, see --download"
            yield Fault(name, "a donor with its weights", "its headers alone", remedy)
