"""Extract a LoRA onto disk, one matrix at a time: complete or absent, resumable after a kill.

Factors are written to a file for each matrix in the work folder; the adapter is put together of
these and of the model's own bytes at the end.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import frankenmerge
from frankenmerge.errors import FrankenmergeError, fail, raise_all
from frankenmerge.merging.copying import copy_range, write_fully
from frankenmerge.merging.journal import GROWING, begin, finish, unwritable, workplace
from frankenmerge.merging.lora_plan import (
    CHUNK,
    ROUNDING,
    STORED,
    LoraOptions,
    LoraPlan,
    Pair,
    option_faults,
)
from frankenmerge.merging.low_rank import Approximation, Goal, approximation, relative_error
from frankenmerge.merging.matrices import DeviceMatrix, HostMatrix, Matrix
from frankenmerge.merging.output import output_faults, room_faults
from frankenmerge.merging.shards import plan_shards, ranges_of
from frankenmerge.models.lora import WEIGHTS_NAME
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.computing import check_device, open_files
from frankenmerge.splicing.operations import Copy
from frankenmerge.splicing.reading import DonorFiles, decoded, encoded, not_finite, values_of
from frankenmerge.storage.atomic import replacing_file
from frankenmerge.storage.safetensors_header import Tensor, header_length, header_of, read_header

if TYPE_CHECKING:
    import numpy as np

PREFIX = "base_model.model."
"""What peft puts before a module's path."""
_PARTS = "matrices"


class Module(NamedTuple):
    """The low-rank change of one linear map."""

    name: str
    """The module's path in memory."""
    rank: int
    error: float
    """Of the factors as they are written: the Frobenius norm of what they leave out of the
    difference, over the difference's own.
    """
    norm: float
    """The Frobenius norm of the difference."""
    file: Path
    """With the factors."""


SmallFiles = Callable[[Sequence[Module], Path], Mapping[str, bytes]]
"""From the maps and the file of weights to what else an adapter's folder holds, by name."""


def check_lora(plan: LoraPlan, output: Path, options: LoraOptions) -> None:
    """Raise FrankenmergeError for what can be known before anything is computed."""
    raise_all(option_faults(options))
    donors = {donor.name: donor for donor in (plan.model, plan.base)}
    raise_all([*output_faults(output, donors), *room_faults(output, least_bytes(plan, options))])
    if options.device != "cpu":
        check_device(options.device)
        _check_double(options.device)


def _check_double(device: str) -> None:
    """Raise FrankenmergeError for a device without float64, such as Apple's."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError) as error:
        expected, remedy = "a device that computes in float64", "leave --device out"
        raise fail(f"device {device}", expected, str(error), remedy) from error


def least_bytes(plan: LoraPlan, options: LoraOptions) -> int:
    """The size of the adapter's tensors; of rank 1 where ranks follow from the matrices."""
    width = {"F32": 4}.get(STORED[options.dtype], 2)
    rank = options.fixed_rank or 1
    factors = (min(rank, *pair.base.shape) * sum(pair.base.shape) for pair in plan.maps)
    return width * sum(factors) + sum(pair.model.bytes for pair in (*plan.saved, *plan.biases))


def write_lora(
    plan: LoraPlan,
    output: Path,
    options: LoraOptions,
    small: SmallFiles,
    progress: Progress = silent,
) -> tuple[list[Module], int]:
    """Write the adapter to the folder `output`; returns its modules and the bytes of its tensors.

    Raises:
        FrankenmergeError: for an output that exists or has no room, NaN and Inf, and an error bound
            that cannot be kept; no files are left then, unless it was to be resumed.
    """
    check_lora(plan, output, options)
    try:
        with workplace(output, resume=options.resume) as folder:
            begin(folder, _inputs(plan, options), [WEIGHTS_NAME])
            (folder / _PARTS).mkdir(exist_ok=True)
            modules = _modules(plan, folder / _PARTS, options, progress)
            weights = folder / GROWING / WEIGHTS_NAME
            size = _assembled(plan, modules, weights, progress)
            finish(folder, output, small(modules, weights))
    except OSError as error:
        raise unwritable(output, error, resume=options.resume) from error
    return modules, size


def _inputs(plan: LoraPlan, options: LoraOptions) -> dict[str, str]:
    """Everything that the bytes depend on."""
    named = {"rank": options.fixed_rank, "energy": options.energy, "error": options.error}
    named |= {"dtype": options.dtype, "seed": options.seed}
    named["device"] = options.device.partition(":")[0]
    inputs = {name: str(value) for name, value in named.items()}
    inputs |= {"model": plan.model.fingerprint, "base": plan.base.fingerprint}
    return inputs | {"version of frankenmerge": frankenmerge.__version__}


def _modules(
    plan: LoraPlan, folder: Path, options: LoraOptions, progress: Progress
) -> list[Module]:
    """The factors of every matrix, each written to a file of its own unless it is there."""
    total = sum(pair.size for pair in plan.maps)
    modules = []
    with open_files() as files, progress("decomposing", total, "parameters") as advance:
        for number, pair in enumerate(plan.maps):
            file = folder / f"{number:05}.safetensors"
            if not file.is_file():
                _write_factors(pair, file, plan, options, files)
            modules.append(_read_module(pair.module, file))
            advance(pair.size)
    return modules


def _write_factors(
    pair: Pair, file: Path, plan: LoraPlan, options: LoraOptions, files: DonorFiles
) -> None:
    values = difference(pair, plan, files)
    matrix = HostMatrix(values) if options.device == "cpu" else DeviceMatrix(values, options.device)
    found, error = fitted(matrix, options, pair.module)
    dtype = STORED[options.dtype]
    entries = [("A", dtype, found.right.shape), ("B", dtype, found.left.shape)]
    notes = {"error": repr(error), "norm": repr(math.sqrt(matrix.squared_norm()))}
    with replacing_file(file) as partial, partial.open("wb") as handle:
        handle.write(header_of(entries, notes))
        handle.write(encoded(found.right, dtype))
        handle.write(encoded(found.left, dtype))


def difference(pair: Pair, plan: LoraPlan, files: DonorFiles) -> "np.ndarray":
    """The model's weight minus the base's as a map `[out, in]`, float32.

    Raises FrankenmergeError for NaN and Inf.
    """
    import numpy as np

    made = np.empty(pair.size, np.float32)
    for start in range(0, pair.size, CHUNK):
        stop = min(start + CHUNK, pair.size)
        model, base = (values_of(tensor, files, start, stop) for tensor in (pair.model, pair.base))
        for donor, values in ((plan.model, model), (plan.base, base)):
            if not np.isfinite(values).all():
                fault = not_finite(donor.name, pair.name)
                raise FrankenmergeError(fault._replace(remedy="repair or replace the model"))
        made[start:stop] = model - base
    made = made.reshape(pair.base.shape)
    return made.T if pair.module in plan.transposed else made


def fitted(matrix: Matrix, options: LoraOptions, name: str) -> tuple[Approximation, float]:
    """The factors of a matrix, rounded to their type, and their relative error.

    An error bound includes the rounding: where the smallest rank for the bound misses it by that,
    the rank is one that leaves room for it.

    Raises FrankenmergeError where the bound cannot be kept.
    """
    seed = (options.seed, zlib.crc32(name.encode()))
    bound = options.error
    if bound is None:
        left_out = None if options.energy is None else 1 - options.energy
        goals = [Goal(options.fixed_rank, left_out)]
    else:
        goals = [Goal(left_out=share**2) for share in (bound, bound - ROUNDING[options.dtype])]
    error = math.inf
    for goal in goals:
        found = _rounded(approximation(matrix, goal, seed), STORED[options.dtype])
        error = relative_error(matrix, found.left, found.right)
        if math.isfinite(error) and (bound is None or error <= bound):
            return found, error
    expected = f"factors in {options.dtype} with a finite error"
    expected += "" if bound is None else f" of at most {bound:g}"
    raise fail(name, expected, f"{error:g}", "choose another --dtype, or a larger --error")


def _rounded(found: Approximation, dtype: str) -> Approximation:
    left, right = (decoded(encoded(factor, dtype), dtype).reshape(factor.shape) for factor in found)
    return Approximation(left, right)


def _read_module(name: str, file: Path) -> Module:
    with file.open("rb") as handle:
        text = handle.read(header_length(handle.read(8), file.stat().st_size, str(file)))
    notes = json.loads(text)["__metadata__"]
    rank = read_header(file)["A"].shape[0]
    return Module(name, rank, float(notes["error"]), float(notes["norm"]), file)


def _assembled(plan: LoraPlan, modules: Sequence[Module], target: Path, progress: Progress) -> int:
    """Put the adapter's file together of copies; returns the bytes of its tensors."""
    copies = [Copy(f"{PREFIX}{name}", "", "", tensor) for name, tensor in _tensors(plan, modules)]
    (shard,) = plan_shards(copies, sum(copy.bytes for copy in copies) + 1)
    with (
        open_files() as files,
        progress("writing", shard.tensor_bytes, "bytes") as advance,
        target.open("wb") as handle,
    ):
        write_fully(handle.fileno(), shard.header, 0)
        for whole in ranges_of(shard):
            with files.opened(whole.file) as source:
                copy_range(whole, source, handle.fileno(), advance, cloning=False)
        os.fsync(handle.fileno())
    return shard.tensor_bytes


def _tensors(plan: LoraPlan, modules: Sequence[Module]) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors by name, without peft's prefix."""
    for module in modules:
        factors = read_header(module.file)
        yield f"{module.name}.lora_A.weight", factors["A"]
        yield f"{module.name}.lora_B.weight", factors["B"]
    changed = {module.name for module in modules}
    for pair in plan.biases:
        inner = ".base_layer" if pair.module in changed else ""
        yield f"{pair.module}{inner}.bias", pair.model
    for pair in plan.saved:
        yield pair.name, pair.model
