"""What was said of a model before, by a plan, a search or healing, and what is measured now."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from frankenmerge.artefacts import evidence
from frankenmerge.artefacts import gain as artefact
from frankenmerge.artefacts.bootstrap import COVERAGE
from frankenmerge.artefacts.evaluation import GainCheck, HealingCheck, PredictionCheck
from frankenmerge.artefacts.evidence import PlanRecord
from frankenmerge.artefacts.gain import GainFile, GainPlanRecord
from frankenmerge.artefacts.provenance import (
    HEALING,
    HealingRecord,
    load_healing,
    load_provenance,
)
from frankenmerge.artefacts.recipe import Recipe, key_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.bench import Result
from frankenmerge.evaluation.intervals import gain
from frankenmerge.planning.prediction import INTERVAL_COVERAGE
from frankenmerge.splicing.resolve import Splice

_T = TypeVar("_T")


def check_predictions(
    results: Iterable[Result], splices: Mapping[str, Splice], files: Mapping[str, Path]
) -> list[PredictionCheck]:
    """Compare recipes with the evidence in their folders, where some is about them.

    Args:
        results: of the recipes and of all their donors.
        splices: the recipes, by the names of their results.
        files: the recipes' files, by the same names.
    """
    results = list(results)
    losses = {result.name: result.total.nats_per_token for result in results}
    checks = []
    for result in results:
        splice, file = splices.get(result.name), files.get(result.name)
        if splice and file and (plan := planned_for(splice, file)):
            known = splice.shares.keys() <= losses.keys()
            if known:
                low, high = plan.interval
                checks.append(
                    check_prediction(result, splice, plan.predicted_damage, (low, high), losses)
                )
    return checks


def check_prediction(
    result: Result,
    splice: Splice,
    predicted: float,
    interval: tuple[float, float],
    losses: Mapping[str, float],
) -> PredictionCheck:
    """Compare what was predicted of a recipe with its result.

    Args:
        result: of the recipe.
        splice: the recipe, resolved.
        predicted: nats per token above the donors' own loss.
        interval: 90 % interval of it.
        losses: the donors' own, nats per token by name.
    """
    measured = result.total.nats_per_token - donors_loss(splice, losses)
    low, high = interval
    return PredictionCheck(
        recipe=result.name,
        predicted=predicted,
        low=low,
        high=high,
        measured=measured,
        held=low <= measured <= high,
    )


def donors_loss(splice: Splice, losses: Mapping[str, float]) -> float:
    """What damage is measured from: the donors' own losses, each by its share of the blocks."""
    return sum(losses[name] * share for name, share in splice.shares.items())


def planned_for(splice: Splice, file: Path) -> PlanRecord | None:
    """What was planned for a recipe, by the evidence files in its folder.

    A plan is the recipe's when its key is. Of several such plans, that of the evidence file named
    after the recipe's counts, or else the one written last. Plans of version 0.1 have no key: it
    is computed from their recipe, where the donors have the names that they have here.
    """
    plans = _beside(file, evidence.SUFFIX, lambda path: evidence.load(path).plans)
    return next(
        (
            plan
            for plan in plans
            if (plan.key or _key_in_01(plan, splice, file.parent)) == splice.key
        ),
        None,
    )


def check_gains(
    results: Iterable[Result],
    splices: Mapping[str, Splice],
    files: Mapping[str, Path],
    seed: int,
) -> list[GainCheck]:
    """Compare recipes with the gains in their folders, where some are theirs.

    Args:
        results: of the recipes and of all their donors.
        splices: the recipes, by the names of their results.
        files: the recipes' files, by the same names.
        seed: of the resamples.
    """
    by_name = {result.name: result for result in results}
    checks = []
    for name, splice in splices.items():
        donors = {source.model for source in splice.recipe.sources}
        searched = _searched_for(splice, files[name]) if name in files else None
        if searched is None or not donors | {name} <= by_name.keys():
            continue
        found, plan = searched
        losses = {donor: by_name[donor].losses for donor in sorted(donors)}
        measured, interval = gain(by_name[name].losses, losses, seed)
        best = min(losses, key=lambda donor: by_name[donor].total.nats_per_token)
        checks.append(
            GainCheck(
                recipe=name,
                predicted=plan.gain,
                predicted_interval=plan.text_interval or plan.interval,
                predicted_coverage=INTERVAL_COVERAGE if plan.text_interval else COVERAGE,
                on=found.on,
                best_donor=best,
                measured=measured,
                measured_interval=interval,
            )
        )
    return checks


def check_healings(results: Iterable[Result], folders: Mapping[str, Path]) -> list[HealingCheck]:
    """Report what healing has changed, of the models that were healed, next to their loss here.

    Args:
        results: of the models.
        folders: of the models, by the names of their results.
    """
    checks = []
    for result in results:
        folder = folders.get(result.name)
        if folder and (record := _healing(folder)):
            checks.append(
                HealingCheck(
                    model=result.name,
                    before=record.before,
                    after=record.after,
                    on=record.measured_on,
                    measured=result.total.nats_per_token,
                )
            )
    return checks


def _healing(folder: Path) -> HealingRecord | None:
    """How a checkpoint or an adapter was healed."""
    if (path := folder / HEALING).is_file():
        return load_healing(path)
    record = load_provenance(folder)
    return record.healing if record else None


def _searched_for(splice: Splice, file: Path) -> tuple[GainFile, GainPlanRecord] | None:
    """What was won by a recipe where it was searched for, by the files of gains in its folder."""
    files = _beside(file, artefact.SUFFIX, lambda path: [artefact.load(path)])
    pairs = ((found, plan) for found in files for plan in found.plans)
    return next(((found, plan) for found, plan in pairs if plan.key == splice.key), None)


def _beside(file: Path, suffix: str, read: Callable[[Path], list[_T]]) -> Iterator[_T]:
    """What the files of a kind in a recipe's folder hold.

    Those of the file named after the recipe's come first, then those of the one written last.
    """
    paths = sorted(file.parent.glob(f"*{suffix}"))
    named = [file.name.startswith(path.name.removesuffix(suffix) + ".") for path in paths]
    order = {path: (own, path.stat().st_mtime) for path, own in zip(paths, named, strict=True)}
    for path in sorted(paths, key=order.__getitem__, reverse=True):
        try:
            yield from read(path)
        except FrankenmergeError:
            continue  # another program's file


def _key_in_01(plan: PlanRecord, splice: Splice, folder: Path) -> str | None:
    """The key of a plan without one; None where its donors are not the splice's."""
    prints = {name: donor.fingerprint for name, donor in splice.donors.items()}
    # A recipe's file may name donors relative to its folder.
    prints |= {
        str(Path(name).relative_to(folder)): each
        for name, each in prints.items()
        if Path(name).is_relative_to(folder)
    }
    recipe = Recipe.model_validate(plan.recipe)
    return key_of(recipe, prints, splice.texts) if set(recipe.donors) <= prints.keys() else None
