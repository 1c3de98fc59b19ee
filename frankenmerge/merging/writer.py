"""Execute a splice onto disk: a checkpoint that is complete or absent, resumable after a kill.

The floor is one read and one write of every byte; nothing larger than a few chunks is ever held
here, but for tensors that are rotated, one in each thread.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

import frankenmerge
from frankenmerge.distributed import Rank
from frankenmerge.merging.copying import CHUNK, copy_range, flush, pieces, write_fully
from frankenmerge.merging.fits import awaited_fits, fits_in
from frankenmerge.merging.journal import (
    GROWING,
    begin,
    finish,
    is_finished,
    joined,
    unwritable,
    workplace,
    write_shards,
)
from frankenmerge.merging.provenance import plan_hash
from frankenmerge.merging.shards import Range, Shard, ranges_of
from frankenmerge.merging.small_files import small_files
from frankenmerge.merging.write_plan import MergeOptions, WritePlan, planned
from frankenmerge.progress import Advance, Progress, silent
from frankenmerge.splicing.computing import Computation, computed, open_files, workers
from frankenmerge.splicing.operations import Computed, Copy
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.rotation import Fit
from frankenmerge.storage.hashing import file_hash


class Merged(NamedTuple):
    """What a merge wrote."""

    output: Path
    tensors: int
    bytes: int
    seconds: float
    computed: int = 0
    """Tensors that were computed; the others are copied from a donor."""
    kept: int = 0
    """Shards that an earlier run had finished."""


def merge(
    splice: Splice,
    output: Path,
    options: MergeOptions = MergeOptions(),  # noqa: B008 - it is immutable
    *,
    rank: Rank = Rank(),  # noqa: B008 - it is immutable
    progress: Progress = silent,
) -> Merged:
    """Write the checkpoint of a splice to the folder `output`.

    Everything is written to a work folder alongside the output, synced, and renamed at the end.

    Args:
        splice: what to write.
        output: a folder that does not exist yet, or is empty.
        options: how to write it.
        rank: of this process; several share the shards.
        progress: in bytes written, and of the fits of gauges.

    Raises:
        FrankenmergeError: before writing for an output that exists, is inside a donor or has no
            room; no files are left when writing fails, unless it was to be resumed.
    """
    started = time.perf_counter()
    plan = planned(splice, output, options, rank)
    inputs = _inputs(plan, options)
    kept = 0
    try:
        with progress(f"merging into {output.name}", plan.bytes, "bytes") as advance:
            if not rank.first:
                folder = joined(output, inputs)
                fits = awaited_fits(folder, output, splice) if folder else None
                if folder and fits is not None:
                    _write(plan, fits, folder, options, rank, advance)
            else:
                with workplace(output, resume=options.resume) as folder:
                    begin(folder, inputs, [shard.name for shard in plan.shards])
                    fits = fits_in(folder, splice, progress)
                    kept = sum(is_finished(folder, shard) for shard in plan.shards)
                    _write(plan, fits, folder, options, rank, advance)
                    _finish(plan, fits, folder, output, options)
    except OSError as error:
        finished = not rank.first and output.is_dir()  # the first process has finished meanwhile
        if not finished:
            raise unwritable(output, error, resume=options.resume) from error
    seconds, tensors = time.perf_counter() - started, len(splice.operations)
    return Merged(output, tensors, plan.bytes, seconds, splice.computed, kept)


def _inputs(plan: WritePlan, options: MergeOptions) -> dict[str, str]:
    """Everything that the bytes depend on, each with a hash or a name."""
    splice = plan.splice
    inputs = {"recipe": splice.recipe.key, "plan of shards": plan_hash(plan.shards)}
    inputs |= {f"donor {name}": donor.fingerprint for name, donor in splice.donors.items()}
    inputs["version of frankenmerge"] = frankenmerge.__version__
    if plan.arithmetics:
        inputs["device"] = options.device.partition(":")[0]
        inputs["arithmetic"] = " and ".join(sorted(plan.arithmetics))
    return inputs | {f"text {name}": digest for name, digest in splice.texts.items()}


def _finish(
    plan: WritePlan, fits: Mapping[int, Fit], folder: Path, output: Path, options: MergeOptions
) -> None:
    """Write the small files, and move the finished checkpoint to its place."""
    grown, checksums = folder / GROWING, {}
    if options.checksums:
        checksums = {shard.name: file_hash(grown / shard.name) for shard in plan.shards}
    finish(folder, output, small_files(plan, fits, checksums))


def _write(
    plan: WritePlan,
    fits: Mapping[int, Fit],
    folder: Path,
    options: MergeOptions,
    rank: Rank,
    advance: Advance,
) -> None:
    """Write the shards that are missing; returns when this process has no more to do."""
    stop, lock, made = threading.Event(), threading.Lock(), set()

    def moved(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            advance(count)

    with open_files() as files, workers(plan.arithmetics) as pool:
        how = Computation(files, fits, options.device, options.allow_nan)

        def fill(shard: Shard, target: int) -> None:
            made.add(shard.name)
            write_fully(target, shard.header, 0)
            _run(_jobs(shard, how, target, moved), pool, stop)

        for shard in write_shards(folder, plan.shards, fill, rank):
            if shard.name not in made:
                moved(shard.tensor_bytes)


class _Stopped(Exception):
    """Raised in the threads that are to end because another one failed."""


def _jobs(
    shard: Shard, how: Computation, target: int, moved: Advance
) -> Iterator[Callable[[], None]]:
    for whole in ranges_of(shard):
        for piece in pieces(whole):
            yield partial(_copied, piece, how, target, moved, cloning=shard.cloned)
    # The largest first, so that no thread is left alone with one at the end.
    for operation, position in sorted(shard.places, key=lambda place: -place.operation.bytes):
        if not isinstance(operation, Copy):
            yield partial(write_computed, operation, how, target, position, moved)


def _copied(piece: Range, how: Computation, target: int, moved: Advance, *, cloning: bool) -> None:
    with how.files.opened(piece.file) as source:
        copy_range(piece, source, target, moved, cloning=cloning)


def write_computed(
    operation: Computed, how: Computation, target: int, position: int, moved: Advance
) -> None:
    """Compute one tensor and write it to the open file `target` from byte `position` on.

    `moved` is called with the bytes written since its last call. Raises as `computed` does.
    """
    written, flushed = position, position
    for content in computed(operation, how):
        write_fully(target, content, written)
        written += len(content)
        moved(len(content))
        if written - flushed >= CHUNK:
            flush(target, flushed, written - flushed)
            flushed = written
    flush(target, flushed, written - flushed)


def _run(
    jobs: Iterator[Callable[[], None]], pool: ThreadPoolExecutor, stop: threading.Event
) -> None:
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
