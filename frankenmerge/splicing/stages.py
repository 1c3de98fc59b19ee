"""The recipes of one file: ordered, and resolved together before anything is read or written."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from frankenmerge.artefacts.recipe import Block, Recipe
from frankenmerge.donors.checkpoint import SINGLE_NAME, Checkpoint
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.gates import with_gates
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.parameters import method_faults
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.storage.safetensors_header import Tensor
from frankenmerge.storage.scratch import write_files


class Stages(NamedTuple):
    """The recipes of one file, resolved."""

    before: tuple[Splice, ...]
    """Stages that others use, each after those that it uses; each has a name."""
    result: Splice

    @property
    def all(self) -> tuple[Splice, ...]:
        """Every stage, the result last."""
        return (*self.before, self.result)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Worth knowing about the donors of any stage; each once."""
        return tuple(dict.fromkeys(remark for splice in self.all for remark in splice.remarks))

    @property
    def names(self) -> frozenset[str]:
        """Of the stages that others use."""
        return frozenset(str(stage.recipe.name) for stage in self.before)

    @property
    def opened(self) -> dict[str, Checkpoint]:
        """Every donor that is not a stage, by name."""
        return {
            name: donor
            for splice in self.all
            for name, donor in splice.donors.items()
            if name not in self.names
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Where each block of the result is from, through the stages that it uses."""
        through: dict[str, tuple[Block, ...]] = {}

        def original(splice: Splice) -> tuple[Block, ...]:
            return tuple(
                through[block.model][block.index] if block.model in through else block
                for block in splice.blocks
            )

        for stage in self.before:
            through[str(stage.recipe.name)] = original(stage)
        return original(self.result)


def in_order(recipes: Sequence[Recipe], place: str = "recipe") -> list[Recipe]:
    """Order stages so that each comes after those that it uses, the result last.

    The result is the stage without a name, or else the last one. Raises FrankenmergeError for
    names given twice, stages that use each other, and stages that none uses.
    """
    names = [recipe.name for recipe in recipes]
    faults = []
    if names.count(None) > 1 and len(recipes) > 1:
        expected, remedy = "one stage without a name, the result", "name the others"
        faults.append(Fault(place, expected, f"{names.count(None)}", remedy))
    for name in dict.fromkeys(name for name in names if name and names.count(name) > 1):
        where, expected = f"{place}: stage {name}", "one stage of this name"
        faults.append(Fault(where, expected, f"{names.count(name)}", "rename one of them"))
    raise_all(faults)
    result = names.index(None) if None in names else len(names) - 1
    uses = {
        number: [names.index(donor) for donor in recipe.donors if donor in names]
        for number, recipe in enumerate(recipes)
    }
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        found = " uses ".join(str(names[number] or "the result") for number in error.args[1])
        raise fail(place, "stages that use only others", found, "break the cycle") from error
    for number in order:
        if number != result and not any(number in used for used in uses.values()):
            where, expected = f"{place}: stage {names[number]}", "a stage that another one uses"
            remedy = "remove it, or remove the name of the result"
            faults.append(Fault(where, expected, "used by none", remedy))
    raise_all(faults)
    return [recipes[number] for number in order if number != result] + [recipes[result]]


def resolve_stages(
    recipes: Sequence[Recipe],
    scratch: Path,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
    place: str = "recipe",
) -> Stages:
    """Open the donors of every recipe of one file, and resolve it.

    Args:
        recipes: the stages of one file.
        scratch: an empty folder for the small files of stages that later ones use.
        download: whether donors may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        weights: whether the donors' weights will be read; headers are enough otherwise.
        opened: donors that are open already, by name.
        place: where faults are.

    Raises:
        FrankenmergeError: with everything that is wrong with any stage.
    """
    splices: list[Splice] = []
    known = dict(opened or {})
    faults: list[Fault] = []
    failed: set[str] = set()
    ordered = in_order(recipes, place)
    for recipe in ordered:
        where = f"{place}: stage {recipe.name}" if recipe.name else place
        if failed & set(recipe.donors):
            faults += method_faults(recipe, where)
            continue
        try:
            splice = _resolved(recipe, known, where, download, allow_pickle, weights)
            splices.append(splice)
            known |= splice.donors
            if recipe.name and recipe is not ordered[-1]:
                known[recipe.name] = planned(splice, scratch / recipe.name)
        except FrankenmergeError as error:
            faults += error.faults
            failed |= {recipe.name} if recipe.name else set()
    raise_all(faults)
    return Stages(tuple(splices[:-1]), splices[-1])


def _resolved(
    recipe: Recipe,
    known: Mapping[str, Checkpoint],
    place: str,
    download: bool,
    allow_pickle: bool,
    weights: bool,
) -> Splice:
    try:
        donors = open_donors(
            recipe, download=download, allow_pickle=allow_pickle, weights=weights, opened=known
        )
    except FrankenmergeError as error:
        raise FrankenmergeError(*method_faults(recipe, place), *error.faults) from error
    return resolve(recipe, donors, place)


def planned(splice: Splice, folder: Path) -> Checkpoint:
    """A stage as a donor of later ones, before it is made: its tensors' bytes are nowhere yet.

    Its tokenizer's files are written to the new folder `folder`.
    """
    folder.mkdir()
    write_files(folder, splice.tokenizer)
    if splice.generation_config is not None:
        (folder / "generation_config.json").write_bytes(splice.generation_config)
    file = folder / SINGLE_NAME
    tensors = {
        made.name: Tensor(file, made.dtype, tuple(made.shape), 0, made.bytes)
        for made in splice.operations
    }
    return Checkpoint(
        splice.recipe.name or "",
        folder,
        splice.config,
        tensors,
        whole=False,
        identity=_key_of(splice),
    )


Make = Callable[[Splice, ExitStack], Checkpoint]
"""Makes a stage and opens it; what must be closed in the end goes onto the stack."""


def execute(
    stages: Stages,
    make: Make,
    closing: ExitStack,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> Splice:
    """Make every stage that others use, in order, and return the result, bound to what was made.

    Gates of mixtures are made here, once for both executors. Keys stay those of the plans: it does
    not matter where a stage was made.

    Args:
        stages: whose donors have their weights.
        make: a stage.
        closing: what `make` puts there.
        device: the torch device on which bases of mixtures run.
        progress: of the gates.
    """
    made: dict[str, Checkpoint] = {}

    def bound(splice: Splice) -> Splice:
        used = {name: made[name] for name in splice.donors if name in made}
        rebound = replace(splice.rebound(used), planned=splice) if used else splice
        return with_gates(rebound, device=device, progress=progress)

    for stage in stages.before:
        made[str(stage.recipe.name)] = make(bound(stage), closing)
    return bound(stages.result)


def with_donors(stages: Stages, opened: Mapping[str, Checkpoint]) -> Stages:
    """The same stages with some donors opened anew, by name: those that only had headers."""
    planned_again: dict[str, Checkpoint] = {}
    splices = []
    for splice in stages.all:
        known = {**opened, **planned_again}
        used = {name: known[name] for name in splice.donors if name in known}
        bound = splice.rebound(used)
        splices.append(bound)
        for other in stages.all:
            name = str(splice.recipe.name)
            if name in stages.names and name in other.donors:
                again = replace(other.donors[name], identity=_key_of(bound))
                planned_again[name] = again
    return Stages(tuple(splices[:-1]), splices[-1])


def _key_of(splice: Splice) -> Callable[[], str]:
    return lambda: splice.key
