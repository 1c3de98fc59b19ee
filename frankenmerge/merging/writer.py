"""Write a checkpoint: complete or absent. Tensor bytes go from file to file inside the kernel where it can.

The floor is one read and one write of every byte; nothing larger than a chunk is ever held here.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import frankenmerge
from frankenmerge.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from frankenmerge.errors import fail
from frankenmerge.gauge import Turn, turned
from frankenmerge.merging.card import model_card
from frankenmerge.merging.schedule import Copy, Operation, Rotate, schedule
from frankenmerge.recipe import Recipe
from frankenmerge.splice import result_config, validated

if TYPE_CHECKING:
    from frankenmerge.fitting import Fit

CHUNK = 8 << 20
"""Bytes asked of the kernel at a time, so that progress shows and Ctrl-C is heard."""
DEFAULT_SHARD = 5 * 10**9


class Merged(NamedTuple):
    """What a merge wrote."""

    output: Path
    tensors: int
    bytes: int
    seconds: float


class Shard(NamedTuple):
    """One file of the result."""

    name: str
    header: bytes
    """The eight bytes of its length included."""
    copies: list[Operation]


def plan_shards(copies: list[Operation], limit: int) -> list[Shard]:
    """Cut the schedule, in order, into files of at most `limit` bytes of tensors (one tensor may exceed it)."""
    groups: list[list[Operation]] = [[]]
    filled = 0
    for copy in copies:
        if groups[-1] and filled + copy.tensor.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(copy)
        filled += copy.tensor.bytes
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, _header(groups[0]), groups[0])]
    return [Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", _header(group), group) for n, group in enumerate(groups, 1)]


def _header(copies: list[Operation]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for copy in copies:
        stop = position + copy.tensor.bytes
        entries[copy.name] = {"dtype": copy.tensor.dtype, "shape": copy.tensor.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def merge(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    output: Path,
    *,
    shard_size: int = DEFAULT_SHARD,
    progress: Callable[[int], None] = lambda _: None,
) -> Merged:
    """Write the checkpoint that `recipe` describes to the folder `output`.

    Everything is written to a neighbour folder, synced, and renamed at the end. `progress` is called with the bytes
    written since its last call. Raises FrankenmergeError before writing for a recipe that cannot become a model, an output
    that exists, lies inside a donor or has no room; nothing is left behind when writing fails.
    """
    started = time.perf_counter()
    validated(recipe, donors)
    copies = schedule(recipe, donors)
    total = sum(copy.tensor.bytes for copy in copies)
    check_output(output, donors, total)
    turns = _turns(recipe, donors)
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".merge.", suffix=".partial", dir=output.parent))
        shards = plan_shards(copies, shard_size)
        for shard in shards:
            _write_shard(folder / shard.name, shard, turns, progress)
        for name, content in small_files(recipe, donors, shards, turns).items():
            _write_synced(folder / name, content)
        folder.chmod(0o755)
        _sync(folder)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
        _sync(output.parent)
    except OSError as error:
        raise fail(
            str(output), "room and leave to write the checkpoint", str(error), "mend that and merge again; nothing was left"
        ) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds the result, or is not there
                parent.rmdir()
    return Merged(output, len(copies), total, time.perf_counter() - started)


def _turns(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[int, "Fit"]:
    if not any(part.gauge for part in recipe.slices):
        return {}
    from frankenmerge.fitting import fitted_turns

    return fitted_turns(recipe, donors)


def check_output(output: Path, donors: Mapping[str, Checkpoint], size: int) -> None:
    """Raise FrankenmergeError for an output that would overwrite something, touch a donor or not fit."""
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise fail(str(output), "a folder that may be made", str(error), "choose another output") from error
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise fail(
            str(output), "a folder that does not exist yet, or an empty one", "something is there", "choose another output or move it away"
        )
    for donor in donors.values():
        if donor.path.resolve() in (output.resolve(), *output.resolve().parents):
            raise fail(str(output), "a folder outside the donors", f"it lies in {donor.path}", "choose another output")
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise fail(str(output), "a folder that may be written to", f"{existing} may not", "choose another output")
    free = shutil.disk_usage(existing).free
    if free < size + (64 << 20):
        raise fail(
            str(output), f"{size:,} bytes of free disk space, and 64 MiB to spare", f"{free:,}", "free some space or choose another disk"
        )


def small_files(recipe: Recipe, donors: Mapping[str, Checkpoint], shards: list[Shard], turns: Mapping[int, "Fit"]) -> dict[str, bytes]:
    """Everything beside the weights, by name: config, index, tokenizer, recipe, card, provenance."""
    base, tokenizer = donors[recipe.base], donors[recipe.tokenizer]
    config = result_config(recipe, donors)
    files = {"config.json": _json(config)}
    if len(shards) > 1:
        total = sum(copy.tensor.bytes for shard in shards for copy in shard.copies)
        weight_map = {copy.name: shard.name for shard in shards for copy in shard.copies}
        files[INDEX_NAME] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    files |= {path.name: path.read_bytes() for path in tokenizer.tokenizer_files}
    if (generation := base.path / "generation_config.json").is_file():
        files[generation.name] = generation.read_bytes()
    files["recipe.yaml"] = recipe.dump().encode()
    provenance = {
        "frankenmerge": frankenmerge.__version__,
        "recipe_sha256": hashlib.sha256(files["recipe.yaml"]).hexdigest(),
        "donors": {name: {"fingerprint": donor.fingerprint} for name, donor in donors.items()},
        "tensors": {
            copy.name: {"donor": copy.donor, "tensor": copy.source, "method": "rotate" if isinstance(copy, Rotate) else "copy"}
            for shard in shards for copy in shard.copies
        },
        "gauges": {
            part: {"rotation": fit.turn.hash, "scale": fit.turn.scale, "held_out_r2": 1 - fit.residual} for part, fit in turns.items()
        },
    }  # fmt: skip
    files["frankenmerge.json"] = _json(provenance)
    files["README.md"] = model_card(recipe, donors, config).encode()
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_shard(path: Path, shard: Shard, turns: Mapping[int, "Fit"], progress: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        files = sorted({copy.tensor.file for copy in shard.copies})
        sources = {file: stack.enter_context(file.open("rb", buffering=0)) for file in files}
        target = stack.enter_context(path.open("wb", buffering=0))
        target.write(shard.header)
        for copy in shard.copies:
            if isinstance(copy, Rotate):
                target.write(_rotated(copy, turns[copy.part].turn))
                progress(copy.tensor.bytes)
            else:
                _copy_range(sources[copy.tensor.file].fileno(), target.fileno(), copy, progress)
        os.fsync(target.fileno())


def _rotated(operation: Rotate, turn: Turn) -> memoryview:
    """The bytes of a turned tensor: computed in float64, rounded once to the type that the donor has it in."""
    import torch

    from frankenmerge.blockwise import read_tensor

    tensor = read_tensor(operation.tensor)
    gain = read_tensor(operation.gain) if operation.gain else None
    result: Any = turned(tensor, operation.met, turn, gain).to(tensor.dtype).contiguous()
    return memoryview(result.flatten().view(torch.uint8).numpy())


def _copy_range(source: int, target: int, copy: Copy, progress: Callable[[int], None]) -> None:
    position, left = copy.tensor.start, copy.tensor.bytes
    while left:
        try:
            moved = os.copy_file_range(source, target, min(left, CHUNK), position)
        except (OSError, AttributeError):  # file systems, kernels and systems without it
            moved = os.write(target, os.pread(source, min(left, CHUNK), position))
        if not moved:
            raise OSError(f"{copy.tensor.file} ended at byte {position:,} while {copy.source} was copied")
        position, left = position + moved, left - moved
        progress(moved)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
