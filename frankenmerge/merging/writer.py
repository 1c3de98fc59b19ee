"""Write a checkpoint: complete or absent, and able to be gone on with after a kill.

The floor is one read and one write of every byte; nothing larger than a few chunks is ever held
here, but for tensors that are rotated, one in each thread.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import frankenmerge
from frankenmerge.artefacts.provenance import PROVENANCE
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.distributed import Rank
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.shards import INDEX_NAME
from frankenmerge.errors import fail
from frankenmerge.merging.card import PICTURE, card_picture, model_card
from frankenmerge.merging.copying import copy_range, pieces, write_fully
from frankenmerge.merging.fits import awaited_fits, fits_in
from frankenmerge.merging.journal import (
    GROWING,
    begin,
    is_finished,
    joined,
    sync,
    work_folder,
    workplace,
    write_shards,
    write_synced,
)
from frankenmerge.merging.plan import Options, Plan, planned
from frankenmerge.merging.provenance import file_hash, plan_hash, provenance, texts_of
from frankenmerge.merging.shards import Shard, ranges_of
from frankenmerge.progress import Advance, Progress, ignore, silent
from frankenmerge.splicing.compatibility import result_config
from frankenmerge.splicing.computing import compute, one_thread, rotate
from frankenmerge.splicing.operations import Combine, Rotate
from frankenmerge.splicing.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from frankenmerge.splicing.gauge_fitting import Fit


class Merged(NamedTuple):
    """What a merge wrote."""

    output: Path
    tensors: int
    bytes: int
    seconds: float
    computed: int = 0
    """Tensors that were computed; the others are their donor's bytes."""
    kept: int = 0
    """Shards that an earlier run had finished."""


def merge(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    output: Path,
    *,
    rank: Rank = Rank(),  # noqa: B008 - it is immutable
    advance: Advance = ignore,
    progress: Progress = silent,
    **options: Any,
) -> Merged:
    """Write the checkpoint that `recipe` describes to the folder `output`.

    `options` are the fields of `Options`. Everything is written to a work folder beside the output,
    synced, and renamed at the end. `advance` is called, from several threads but one at a time,
    with the bytes written since its last call; `progress` shows how far the fits of gauges are. Raises
    FrankenmergeError before writing for a recipe that cannot become a model, an output that exists,
    lies inside a donor or has no room; nothing is left behind when writing fails, unless it was to
    be resumed.
    """
    started, chosen = time.perf_counter(), Options(**options)
    plan = planned(recipe, donors, output, chosen, rank)
    inputs = {
        "recipe": hashlib.sha256(recipe.dump().encode()).hexdigest(),
        "plan of shards": plan_hash(plan.shards),
    }
    inputs |= {f"donor {name}": donor.fingerprint for name, donor in donors.items()}
    inputs["version of frankenmerge"] = frankenmerge.__version__
    if plan.computed:
        inputs |= {
            "device": chosen.device.partition(":")[0],
            "arithmetic": " and ".join(sorted(plan.arithmetics)),
        }
    inputs |= {f"text {name}": digest for name, digest in texts_of(recipe).items()}
    kept = 0
    try:
        if not rank.first:
            if (folder := joined(output, inputs)) and (
                fits := awaited_fits(folder, output, recipe)
            ) is not None:
                _write(plan, fits, folder, chosen, rank, advance)
        else:
            with workplace(output, resume=chosen.resume) as folder:
                begin(folder, inputs, plan.shards)
                fits = fits_in(folder, recipe, donors, progress)
                kept = sum(is_finished(folder, shard) for shard in plan.shards)
                _write(plan, fits, folder, chosen, rank, advance)
                grown = folder / GROWING
                checksums = (
                    {shard.name: file_hash(grown / shard.name) for shard in plan.shards}
                    if chosen.checksums
                    else {}
                )
                for name, content in small_files(recipe, donors, plan, fits, checksums).items():
                    write_synced(grown / name, content)
                sync(grown)
                grown.rename(output)
                sync(output.absolute().parent)
    except OSError as error:
        if not rank.first and output.is_dir():  # the first process has finished meanwhile
            return Merged(
                output,
                len(plan.operations),
                plan.bytes,
                time.perf_counter() - started,
                plan.computed,
            )
        left = (
            f"the finished shards are kept in {work_folder(output)}"
            if chosen.resume
            else "nothing was left"
        )
        remedy = f"mend that and merge again; {left}"
        raise fail(
            str(output), "room and leave to write the checkpoint", str(error), remedy
        ) from error
    return Merged(
        output, len(plan.operations), plan.bytes, time.perf_counter() - started, plan.computed, kept
    )


def _write(
    plan: Plan,
    fits: "Mapping[int, Fit]",
    folder: Path,
    options: Options,
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

    with _open(plan.files) as handles, _crew(plan) as pool:

        def fill(shard: Shard, target: int) -> None:
            made.add(shard.name)
            write_fully(target, shard.header, 0)
            _run(_jobs(shard, fits, handles, target, options, moved), pool, stop)

        for shard in write_shards(folder, plan.shards, fill, rank):
            if shard.name not in made:
                moved(shard.tensor_bytes)


class _Stopped(Exception):
    """Raised in the threads that are to end because another one failed."""


def _jobs(
    shard: Shard,
    fits: "Mapping[int, Fit]",
    handles: Mapping[Path, int],
    target: int,
    options: Options,
    moved: Advance,
) -> Iterator[Callable[[], None]]:
    for whole in ranges_of(shard):
        for piece in pieces(whole):
            yield partial(
                copy_range, piece, handles[piece.file], target, moved, cloning=shard.cloned
            )
    # The largest first, so that no thread is left alone with one at the end.
    for operation, position in sorted(shard.places, key=lambda place: -place.operation.bytes):
        if isinstance(operation, Combine):
            yield partial(
                compute,
                operation,
                handles,
                target,
                position,
                moved,
                device=options.device,
                allow_nan=options.allow_nan,
            )
        elif isinstance(operation, Rotate):
            rotation = fits[operation.part].at(operation.place)
            yield partial(
                rotate,
                operation,
                rotation,
                handles,
                target,
                position,
                moved,
                allow_nan=options.allow_nan,
            )


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


@contextmanager
def _crew(plan: Plan) -> Iterator[ThreadPoolExecutor]:
    """The threads that work: as many as cores for arithmetic, two for copies, which wait for the disk."""
    count = cores() if plan.computed else 2
    if "torch" not in plan.arithmetics:
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


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _open(files: set[Path]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        yield {
            file: stack.enter_context(file.open("rb", buffering=0)).fileno()
            for file in sorted(files)
        }


def small_files(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    plan: Plan,
    fits: "Mapping[int, Fit]",
    checksums: Mapping[str, str],
) -> dict[str, bytes]:
    """Everything beside the weights, by name: config, index, tokenizer, recipe, card with its picture, provenance."""
    base = donors[recipe.base]
    config = result_config(recipe, donors)
    files = {"config.json": _json(config)}
    if len(plan.shards) > 1:
        weight_map = {
            operation.name: shard.name for shard in plan.shards for operation in shard.operations
        }
        files[INDEX_NAME] = _json(
            {"metadata": {"total_size": plan.bytes}, "weight_map": weight_map}
        )
    files |= tokenizer_files(recipe, donors)
    if base.generation_config is not None:
        files["generation_config.json"] = base.generation_config
    files["recipe.yaml"] = recipe.dump().encode()
    files[PICTURE] = card_picture(recipe, donors).encode()
    files[PROVENANCE] = _json(provenance(recipe, donors, plan, fits, checksums, files))
    files["README.md"] = model_card(recipe, donors, config).encode()
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
