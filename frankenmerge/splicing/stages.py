"""The recipes of one file: brought in order, held against their donors before anything is written, merged one after the other."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.provenance import PROVENANCE
from frankenmerge.artefacts.recipe import Recipe, renamed
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.donors.shards import SINGLE_NAME
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.merging.provenance import texts_of
from frankenmerge.splicing.compatibility import recipe_faults, result_config
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import Operation, schedule
from frankenmerge.splicing.parameters import method_faults
from frankenmerge.splicing.tokenizer import tokenizer_files
from frankenmerge.storage.safetensors_header import Tensor


class Stage(NamedTuple):
    """One recipe that was found sound."""

    recipe: Recipe
    donors: dict[str, Checkpoint]
    operations: list[Operation]
    """What makes its tensors, in layer order."""


def in_order(recipes: Sequence[Recipe], place: str = "recipe") -> list[Recipe]:
    """Bring stages in an order in which each comes behind those it uses, the result last.

    The result is the stage without a name, or else the last one. Raises FrankenmergeError for names
    that stand twice, stages that use each other, and stages that none uses.
    """
    names = [recipe.name for recipe in recipes]
    faults = []
    if names.count(None) > 1 and len(recipes) > 1:
        faults.append(
            Fault(
                place,
                "one stage without a name, the result",
                f"{names.count(None)}",
                "name the others",
            )
        )
    for name in dict.fromkeys(name for name in names if name and names.count(name) > 1):
        faults.append(
            Fault(
                f"{place}: stage {name}",
                "one stage of this name",
                f"{names.count(name)}",
                "rename one of them",
            )
        )
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
        raise fail(place, "stages that use only others", found, "break the circle") from error
    for number in order:
        if number != result and not any(number in used for used in uses.values()):
            where = f"{place}: stage {names[number]}"
            faults.append(
                Fault(
                    where,
                    "a stage that another one uses",
                    "used by none",
                    "remove it, or leave the name of the result out",
                )
            )
    raise_all(faults)
    return [recipes[number] for number in order if number != result] + [recipes[result]]


def checked(
    recipes: Sequence[Recipe],
    scratch: Path,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    place: str = "recipe",
) -> list[Stage]:
    """Hold every stage against its donors' configs and headers.

    Args:
        recipes: the stages of one file.
        scratch: an empty folder for the small files of stages that later ones use.
        download: whether donors may be fetched.
        allow_pickle: whether donors that are pickles alone are converted.
        place: what faults are told to be in.

    Raises:
        FrankenmergeError: with everything that is wrong with any stage.
    """
    stages: list[Stage] = []
    planned: dict[str, Checkpoint] = {}
    faults: list[Fault] = []
    failed: set[str] = set()
    for recipe in in_order(recipes, place):
        where = f"{place}: stage {recipe.name}" if recipe.name else place
        if failed & set(recipe.donors):
            faults += method_faults(recipe, where)
            continue
        try:
            stages.append(_checked(recipe, planned, where, download, allow_pickle))
            if recipe.name:
                planned[recipe.name] = _planned(stages[-1], scratch / recipe.name)
        except FrankenmergeError as error:
            faults += error.faults
            failed |= {recipe.name} if recipe.name else set()
    raise_all(faults)
    return stages


def _checked(
    recipe: Recipe,
    planned: Mapping[str, Checkpoint],
    place: str,
    download: bool,
    allow_pickle: bool,
) -> Stage:
    faults = method_faults(recipe, place)
    try:
        donors = open_donors(
            recipe, download=download, allow_pickle=allow_pickle, weights=False, opened=planned
        )
    except FrankenmergeError as error:
        raise FrankenmergeError(*faults, *error.faults) from error
    raise_all([*faults, *recipe_faults(recipe, donors, place)])
    tokenizer_files(recipe, donors)
    return Stage(recipe, donors, schedule(recipe, donors, place))


def _planned(stage: Stage, folder: Path) -> Checkpoint:
    """A stage as a donor of later ones, before it is there: its small files in `folder`, its tensors nowhere."""
    folder.mkdir()
    config = result_config(stage.recipe, stage.donors)
    for name, content in tokenizer_files(stage.recipe, stage.donors).items():
        (folder / name).write_bytes(content)
    tensors = {
        made.name: Tensor(folder / SINGLE_NAME, made.dtype, tuple(made.shape), 0, made.bytes)
        for made in stage.operations
    }
    return Checkpoint(stage.recipe.name or "", folder, config, tensors, whole=False)


def merge_stages(
    recipes: Sequence[Recipe],
    output: Path,
    merge: Callable[[Recipe, Mapping[str, Checkpoint], Path], Any],
    *,
    download: bool = False,
    allow_pickle: bool = False,
    skipped: Callable[[str], None] = lambda _: None,
) -> Any:
    """Merge stages in order, the result into `output`, the others into folders of their names in `OUTPUT.stages`.

    A stage that is there already and was made by the same recipe from the same donors is left as it
    is; any other is made again.

    Args:
        recipes: the stages of one file, found sound.
        output: where the result goes.
        merge: writes one recipe's checkpoint to a folder.
        download: whether donors may be fetched.
        allow_pickle: whether donors that are pickles alone are converted.
        skipped: called with the names of the stages that need not be made again.

    Returns:
        What `merge` returned for the result.
    """
    *stages, result = in_order(recipes)
    folders = {
        stage.name: output.with_name(f"{output.name}.stages") / str(stage.name) for stage in stages
    }

    def placed(recipe: Recipe) -> Recipe:
        return renamed(recipe, lambda name: str(folders.get(name, name)))

    for stage in stages:
        recipe, folder = placed(stage), folders[stage.name]
        donors = open_donors(recipe, download=download, allow_pickle=allow_pickle)
        if _made_already(recipe, donors, folder):
            skipped(str(stage.name))
            continue
        _remove(folder)
        merge(recipe, donors, folder)
    recipe = placed(result)
    return merge(recipe, open_donors(recipe, download=download, allow_pickle=allow_pickle), output)


def _remove(folder: Path) -> None:
    """Remove a stage that is no longer right, under another name, so that a kill leaves nothing that would be in the way."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if (folder / PROVENANCE).is_file():
        folder.rename(old)
        shutil.rmtree(old)


def _made_already(recipe: Recipe, donors: Mapping[str, Checkpoint], folder: Path) -> bool:
    """Whether `folder` holds what `recipe` makes of `donors`, by the provenance in it."""
    try:
        told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        open_checkpoint(str(folder))
    except (OSError, ValueError, FrankenmergeError):
        return False
    fingerprints = {name: {"fingerprint": donor.fingerprint} for name, donor in donors.items()}
    made_of = hashlib.sha256(recipe.dump().encode()).hexdigest(), fingerprints, texts_of(recipe)
    return (told.get("recipe_sha256"), told.get("donors"), told.get("texts", {})) == made_of
