"""What a LoRA has to hold to make one checkpoint of another: decided before a byte is written.

Linear maps that differ become products of two thin matrices. What is no linear map, and the
embedding and the head, are held in full (peft's `modules_to_save`), biases of maps by themselves.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.donors.architecture import Config
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import differences, family, language, quantity
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.models.modules import Kind, modules_of
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.compatibility import tensor_names
from frankenmerge.splicing.computing import open_files
from frankenmerge.splicing.reading import DonorFiles, read_stretch, values_of
from frankenmerge.storage.dtypes import BYTES_OF, COMPUTED
from frankenmerge.storage.safetensors_header import Tensor

CHUNK = 1 << 20
"""Elements that are compared at a time."""
Dtype = Literal["float32", "bfloat16", "float16"]
STORED: Mapping[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ROUNDING: Mapping[Dtype, float] = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative error that rounding both factors may cause: twice the unit roundoff, as the factors'
columns and rows are orthogonal; in float32 room for the arithmetic.
"""
_RANK = 32


@dataclass(frozen=True)
class LoraOptions:
    """How a LoRA is extracted. Of `rank`, `energy` and `error` at most one is given."""

    rank: int | None = None
    """Of every matrix; 32 where nothing else is given."""
    energy: float | None = None
    """Smallest share of each difference's squared norm to keep."""
    error: float | None = None
    """Largest relative error of each matrix, in the Frobenius norm."""
    dtype: Dtype = "float32"
    """The type of the factors."""
    device: str = "cpu"
    """A torch device, or `cpu`, where numpy computes."""
    seed: int = 0
    """Of random subspaces."""
    resume: bool = False
    """Continue an interrupted extraction, and keep finished matrices should this one fail."""

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every matrix; None where the rank follows from the matrix."""
        follows = self.energy is not None or self.error is not None
        return None if follows else self.rank if self.rank is not None else _RANK


class Pair(NamedTuple):
    """A tensor of both checkpoints."""

    name: str
    """In memory."""
    role: str
    model: Tensor
    base: Tensor

    @property
    def module(self) -> str:
        """The path of its module in memory."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.base.shape)


class LoraPlan(NamedTuple):
    """What differs between two checkpoints, by how an adapter holds it."""

    model: Checkpoint
    base: Checkpoint
    maps: tuple[Pair, ...]
    """Weights of linear maps."""
    biases: tuple[Pair, ...]
    """Of linear maps."""
    saved: tuple[Pair, ...]
    """All tensors of the modules that are held in full."""
    linear: tuple[str, ...]
    """Paths of all linear maps of the blocks, also those that do not differ."""
    transposed: frozenset[str]
    """Those of the maps that are stored `[in, out]`, by their modules' paths."""
    remarks: tuple[str, ...]

    @property
    def tied(self) -> bool:
        """Whether a head in full is the embedding."""
        return self.model.tied and self.base.tied and any(p.role == "head" for p in self.saved)

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Paths of the modules that are held in full."""
        return tuple(dict.fromkeys(pair.module for pair in self.saved))


def option_faults(options: LoraOptions) -> Iterator[Fault]:
    """What is wrong with options by themselves."""
    named = {"--rank": options.rank, "--energy": options.energy, "--error": options.error}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        remedy = "leave the others out"
        yield Fault(" and ".join(given), "one of them", "several", remedy)
    if options.rank is not None and options.rank < 1:
        yield Fault("--rank", "a rank of 1 or more", str(options.rank), "choose another rank")
    if options.energy is not None and not 0 < options.energy <= 1:
        remedy = "choose a share, such as 0.9"
        yield Fault("--energy", "a share above 0, at most 1", str(options.energy), remedy)
    least = ROUNDING[options.dtype]
    if options.error is not None and not least < options.error < 1:
        expected = f"a bound below 1 and above {least:.2g}, which rounding to {options.dtype} costs"
        remedy = "choose another bound" + ("" if options.dtype == "float32" else " or --dtype")
        yield Fault("--error", expected, str(options.error), remedy)


def compared_headers(model: Checkpoint, base: Checkpoint) -> list[Pair]:
    """The tensors of both, in the order of the base's; configs and headers are enough.

    Raises:
        FrankenmergeError: for other architectures and shapes, and tensors that only one has.
    """
    raise_all(_config_faults(model, base))
    if reference(base.name).lora is not None:
        remedy = "merge it first (a passthrough of its name), and name the result"
        raise fail(base.name, "a base without a LoRA, which peft loads by its name", "one", remedy)
    pairs, faults = _pairs(model, base)
    raise_all(faults)
    return pairs


def lora_plan(model: Checkpoint, base: Checkpoint, progress: Progress = silent) -> LoraPlan:
    """Compare two checkpoints tensor by tensor; those that are equal are read to their end.

    Raises:
        FrankenmergeError: with everything that keeps an adapter of `base` from being `model`.
    """
    pairs = compared_headers(model, base)
    kinds, head = modules_of(base, {pair.name: pair.base.shape for pair in pairs})
    pairs = [_in_memory(pair, kinds, head) for pair in pairs]
    inner = {pair.name for pair in pairs if pair.role in ("block", "rest")}
    unlike = _unlike(pairs, progress)
    if not unlike:
        expected, found = f"a model that differs from {base.name}", "equal in every tensor"
        raise fail(model.name, expected, found, "name the model that was trained from the base")
    raise_all(_type_faults(model, unlike))
    if beyond := [pair.name for pair in unlike if kinds.get(pair.name, "inner") == "inner"]:
        others = f", and {len(beyond) - 1} more such tensors" if len(beyond) > 1 else ""
        raise fail(
            f"{model.name}: {beyond[0]}",
            f"the same as in {base.name}: in memory it is a part of a module that peft can only "
            "change as a whole",
            f"another one{others}",
            "keep the model as it is; a LoRA cannot hold this difference",
        )

    def is_map(pair: Pair) -> bool:
        return pair.name in inner and kinds[pair.name] in ("linear", "transposed")

    maps = tuple(pair for pair in unlike if is_map(pair) and pair.name.endswith(".weight"))
    if not maps:
        found = f"{len(unlike)} other tensors, such as {unlike[0].name}"
        expected = f"linear maps that differ from those of {base.name}: peft loads no LoRA without"
        raise fail(model.name, expected, found, "keep the model as it is")
    biases = tuple(pair for pair in unlike if is_map(pair) and not pair.name.endswith(".weight"))
    held = {pair.module for pair in unlike if not is_map(pair)}
    return LoraPlan(
        model,
        base,
        maps,
        biases,
        tuple(pair for pair in pairs if pair.module in held),
        tuple(
            name.removesuffix(".weight")
            for name, kind in kinds.items()
            if kind in ("linear", "transposed") and name.endswith(".weight") and name in inner
        ),
        frozenset(pair.module for pair in maps if kinds[pair.name] == "transposed"),
        tuple(_remarks(model, base)),
    )


def _in_memory(pair: Pair, kinds: Mapping[str, Kind], head: str) -> Pair:
    """A head under the name that it has in memory, where its file has another."""
    renamed = f"{head}.{pair.name.rpartition('.')[2]}"
    known = pair.role != "head" or pair.name in kinds or renamed not in kinds
    return pair if known else pair._replace(name=renamed)


def rank_remarks(plan: LoraPlan, options: LoraOptions) -> Iterator[str]:
    """Say where a rank is above the matrix, which then has its own."""
    rank = options.fixed_rank
    small = [pair for pair in plan.maps if rank is not None and rank > min(pair.base.shape)]
    if small:
        which = f"{len(small)} matrices, such as {small[0].module} {list(small[0].base.shape)}"
        yield f"rank {rank} is above that of {which}: these are written at their own rank"


def _remarks(model: Checkpoint, base: Checkpoint) -> Iterator[str]:
    yield from (*model.remarks, *base.remarks)
    if base.tied and not model.tied:
        yield (
            f"{model.name} has a head of its own, {base.name} has not: peft loads the LoRA with a "
            "warning, and recipes cannot name it"
        )
    for remark in differences(model.config, base.config)[1]:
        yield f"{model.name} and {base.name}: {remark}; an adapter computes with the base's"


def _config_faults(model: Checkpoint, base: Checkpoint) -> Iterator[Fault]:
    remedy = "name the model that it was trained from"
    kinds = [language(donor.config)["model_type"] for donor in (model, base)]
    reasons = differences(model.config, base.config)[0]
    if kinds[0] == kinds[1] and model.blocks != base.blocks:
        reasons = [*reasons, f"blocks: {model.blocks} and {base.blocks}"]
    elif kinds[0] == kinds[1]:
        unlike = [
            index
            for index in range(base.blocks)
            if _settings(model.config, index) != _settings(base.config, index)
        ]
        reasons = [*reasons, *(f"block {index}: settings of its own" for index in unlike)]
    for reason in reasons:
        yield Fault(model.name, f"the architecture of {base.name}", reason, remedy)


def _settings(config: Config, index: int) -> tuple[Any, ...]:
    """What a config says about a single block."""
    if family(config).listed:
        return tuple(part.of(config, index) for part in family(config).per_block)
    text, depth = language(config), quantity(config, "blocks")
    lists = (text[key] for key in sorted(text) if isinstance(text[key], list))
    return tuple(entries[index] for entries in lists if len(entries) == depth)


def _type_faults(model: Checkpoint, unlike: Sequence[Pair]) -> Iterator[Fault]:
    for pair in unlike:
        if not _types(pair) <= set(COMPUTED):
            expected = "differences of floating types alone"
            found = " and ".join(sorted(_types(pair)))
            remedy = "use unquantised models"
            yield Fault(f"{model.name}: {pair.name}", expected, found, remedy)
            return


def _types(pair: Pair) -> set[str]:
    return {pair.model.dtype, pair.base.dtype}


def _pairs(model: Checkpoint, base: Checkpoint) -> tuple[list[Pair], list[Fault]]:
    """The tensors of both, in the order of the base's, and what is not in both alike."""
    pairs, faults = [], []
    for role, index in dict.fromkeys([*base.by_role, *model.by_role, ("head", None)]):
        own, others = (tensor_names(donor, role, index) for donor in (model, base))
        for canonical in {**others, **own} if role != "ignored" else ():
            name = canonical.format(index)
            a, b = own.get(canonical), others.get(canonical)
            if a is None or b is None:
                found = f"only in {(base if a is None else model).name}"
                remedy = "name the model that it was trained from"
                faults.append(Fault(f"{model.name}: {name}", "a tensor of both", found, remedy))
                continue
            pair = Pair(name, role, model.tensors[a], base.tensors[b])
            pairs.append(pair)
            if pair.model.shape != pair.base.shape:
                faults.append(_shape_fault(pair, model, base))
    return pairs, faults


def _shape_fault(pair: Pair, model: Checkpoint, base: Checkpoint) -> Fault:
    remedy = "name the model that it was trained from"
    if pair.role in ("embedding", "head") and pair.model.shape[1:] == pair.base.shape[1:]:
        remedy = (
            f"give both one vocabulary: resize the embedding of {base.name} to "
            f"{pair.model.shape[0]} rows, or that of {model.name} to {pair.base.shape[0]}"
        )
    return Fault(
        f"{model.name}: {pair.name}",
        f"the shape {list(pair.base.shape)}, as in {base.name}",
        str(list(pair.model.shape)),
        remedy,
    )


def _unlike(pairs: Sequence[Pair], progress: Progress) -> list[Pair]:
    """Those of the pairs whose values differ anywhere."""
    found = []
    with (
        open_files() as files,
        progress("comparing", sum(pair.size for pair in pairs), "parameters") as advance,
    ):
        for pair in pairs:
            if not _equal(pair, files):
                found.append(pair)
            advance(pair.size)
    return found


def _equal(pair: Pair, files: DonorFiles) -> bool:
    if len(_types(pair)) > 1 and not _types(pair) <= set(COMPUTED):
        return False
    for start in range(0, pair.size, CHUNK):
        stop = min(start + CHUNK, pair.size)
        if pair.model.dtype == pair.base.dtype:
            width = BYTES_OF[pair.base.dtype]
            span = start * width, stop * width
            same = read_stretch(files, pair.model, *span) == read_stretch(files, pair.base, *span)
        else:
            values = (values_of(tensor, files, start, stop) for tensor in (pair.model, pair.base))
            same = bool((next(values) == next(values)).all())
        if not same:
            return False
    return True
