"""From artefacts to what the page's template shows: values and drawings, section by section."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.evaluation import Evaluation, PredictionCheck, TaskDifferenceRecord
from frankenmerge.artefacts.evidence import PlanRecord, SeamRecord
from frankenmerge.artefacts.gain import GainPlanRecord
from frankenmerge.artefacts.provenance import PROVENANCE, TensorRecord
from frankenmerge.artefacts.recipe import Block, Recipe, Seam
from frankenmerge.artefacts.recipe_label import label
from frankenmerge.artefacts.scores import NULLS, SCORES, ScoreInfo, null_info, score_info
from frankenmerge.reporting import heatmaps
from frankenmerge.reporting.features import Table, aligned_features, feature_tables
from frankenmerge.reporting.heatmaps import Mark
from frankenmerge.reporting.labels import VERIFIED, shortened
from frankenmerge.reporting.run import Run
from frankenmerge.reporting.svg import Drawing
from frankenmerge.splicing import diagram

TABLED = 17
"""Rows and columns up to which a heatmap's values are also given as a table."""


SIGNIFICANCE = 0.05
"""The level of tests on tasks."""


class RecipeView(NamedTuple):
    """A recipe to show."""

    files: list[str]
    """The files that contain it."""
    summary: str
    label: str
    """With the numbers that tell similar recipes apart."""
    text: str
    svg: Markup
    method: str


class NullMap(NamedTuple):
    """A score under a null model."""

    info: ScoreInfo
    drawing: Drawing
    mean: float


class Panel(NamedTuple):
    """One score of an alignment."""

    name: str
    info: ScoreInfo
    drawing: Drawing
    nulls: list[NullMap]
    mean: float
    rows: list[list[float]]
    """The values, where there are few enough for a table."""


class AlignmentView(NamedTuple):
    """An alignment to show."""

    file: str
    donors: tuple[str, str]
    panels: list[Panel]
    marks: list[Mark]
    numbers: dict[str, Any]


def splices(run: Run) -> list[RecipeView]:
    """The recipes without duplicates: merged ones first, then the best plan, then the others."""
    planned = [plan.summary for evidence in run.evidence.values() for plan in evidence.plans[:1]]
    order = sorted(
        run.recipes,
        key=lambda name: (Path(name).parent == Path(), str(run.recipes[name]) not in planned, name),
    )
    views: dict[str, RecipeView] = {}
    for name in order:
        recipe = run.recipes[name]
        if recipe.dump() in views:
            views[recipe.dump()].files.append(name)
            continue
        pieces = diagram.pieces_of(recipe, run.depths)
        svg = diagram.svg(pieces, run.depths, f"splice{len(views)}", alone=False) if pieces else ""
        views[recipe.dump()] = RecipeView(
            [name],
            str(recipe),
            label(recipe),
            run.texts[name],
            Markup(svg),
            recipe.merge_method,
        )
    return list(views.values())


def plans(run: Run) -> list[PlanRecord]:
    """The plans of all evidence files."""
    return [plan for evidence in run.evidence.values() for plan in evidence.plans]


def chosen_plan(run: Run, views: Sequence[RecipeView]) -> PlanRecord | None:
    """The plan of the recipe that is shown first; without a recipe the best plan.

    Plans are identified by their keys, where the recipe was merged; else by their summaries.
    """
    known = plans(run)
    if not views:
        return known[0] if known else None
    keys = _merged_keys(run, views[0])
    matches = [plan for plan in known if plan.key in keys]
    matches += [
        plan
        for plan in known
        if plan.summary == views[0].summary and (plan.key is None or not keys)
    ]
    return matches[0] if matches else None


def _merged_keys(run: Run, view: RecipeView) -> set[str]:
    """The keys of a recipe's checkpoints."""
    origins = ((Path(file).parent / PROVENANCE).as_posix() for file in view.files)
    keys = (run.merges[name].key for name in origins if name in run.merges)
    return {key for key in keys if key}


def explained_plan(
    run: Run, views: Sequence[RecipeView], plan: PlanRecord | None
) -> PlanRecord | None:
    """The plan whose seams are explained.

    That of the recipe that is shown first; the best one where this has no slices.
    """
    if plan or (views and run.recipes[views[0].files[0]].stack.slices):
        return plan
    return next(iter(plans(run)), None)


def chosen_gain(run: Run, views: Sequence[RecipeView]) -> GainPlanRecord | None:
    """What was won by the recipe that is shown first, if it was searched for by its gain."""
    known = [plan for found in run.gains.values() for plan in found.plans]
    if not views:
        return known[0] if known else None
    keys = _merged_keys(run, views[0])
    matches = (
        plan
        for plan in known
        if (plan.key in keys if keys else plan.recipe == _content(run, views[0]))
    )
    return next(matches, None)


def _content(run: Run, view: RecipeView) -> dict[str, Any]:
    return run.recipes[view.files[0]].model_dump(exclude_none=True)


def seam_in_words(seam: SeamRecord) -> str:
    """The blocks that meet at a seam, and how many are skipped or repeated."""
    skipped = seam.skipped_blocks
    kind = f"{skipped} skipped" if skipped > 0 else f"{-skipped} repeated"
    after, before = (
        f"{shortened(place.model)} block {place.block}" for place in (seam.after, seam.before)
    )
    return f"{after} to {before}, {kind if skipped else 'same depth'}"


def seam_scores(seam: SeamRecord) -> list[tuple[ScoreInfo, float, list[float | None]]]:
    """The scores at a seam that have nulls: (info, value, its nulls in the order of `NULLS`)."""
    order = [*SCORES, *seam.scores]
    named = sorted((name for name in seam.scores if seam.nulls.get(name)), key=order.index)
    return [
        (score_info(name), seam.scores[name], [seam.nulls[name].get(null) for null in NULLS])
        for name in named
    ]


def seams_of(run: Run, views: Sequence[RecipeView], plan: PlanRecord | None) -> list[Seam]:
    """The seams of the recipe that is shown first; without a recipe those of the plan."""
    if views and (recipe := run.recipes[views[0].files[0]]).stack.slices:
        return recipe.seams
    return [
        Seam(*(Block(place.model, place.block) for place in (seam.after, seam.before)))
        for seam in (plan.seams if plan else [])
    ]


def alignment_views(run: Run, seams: Sequence[Seam]) -> list[AlignmentView]:
    """The alignments, with marks at the seams."""
    return [
        _alignment_view(name, alignment, marks_of(alignment, seams))
        for name, alignment in run.alignments.items()
    ]


def marks_of(alignment: Alignment, seams: Sequence[Seam]) -> list[Mark]:
    """The cells of seams in an alignment's matrix; seams between other donors are left out."""
    rows, columns = alignment.blocks
    marks = []
    for number, seam in enumerate(seams, 1):
        left, entered = (
            (seam.after.model, seam.after.index + 1),
            (seam.before.model, seam.before.index),
        )
        for (a, row), (b, column) in ((left, entered), (entered, left)):
            if (a, b) == alignment.donors and row <= rows and column <= columns:
                marks.append(Mark(row, column, str(number)))
                break
    return marks


def _alignment_view(name: str, alignment: Alignment, marks: list[Mark]) -> AlignmentView:
    donors, panels = alignment.donors, []
    a, b = (shortened(donor) for donor in donors)
    for score_name, score in heatmaps.scores_with_nulls(alignment).items():
        info = score_info(score_name)
        nulls = []
        for null, matrix in sorted(score.nulls.items()):
            title = null_info(null).title
            drawing = heatmaps.heatmap(matrix, donors, marks, title, small=True)
            nulls.append(NullMap(null_info(null), drawing, _mean(matrix)))
        drawing = heatmaps.heatmap(score.matrix, donors, marks, f"{info.title}, {a} and {b}")
        rows = score.matrix.tolist() if max(score.matrix.shape) <= TABLED else []
        panels.append(Panel(score_name, info, drawing, nulls, _mean(score.matrix), rows))
    return AlignmentView(name, (a, b), panels, marks, heatmaps.numbers(alignment, marks))


def _mean(matrix: np.ndarray) -> float:
    """The mean of the cells of equal depth, without the embedding."""
    depth = min(matrix.shape)
    return (
        float(np.nanmean(matrix.diagonal()[min(1, depth - 1) : depth]))
        if np.isfinite(matrix).any()
        else float("nan")
    )


def constraints(run: Run) -> list[dict[str, Any]]:
    """The constraints of the plans in the folder, those of several plans once."""
    found = [evidence.constraints.as_json() for evidence in run.evidence.values()]
    return [each for place, each in enumerate(found) if each not in found[:place]]


def features(run: Run) -> tuple[list[str], list[Table]]:
    """Donors and their tables of features, from atlases or else from alignments."""
    donors = list(run.features)
    for alignment in run.alignments.values():
        if alignment.of_images:  # their top-activating images are in their atlases
            continue
        known = {donor.fingerprint for donor in donors}
        donors += [donor for donor in aligned_features(alignment) if donor.fingerprint not in known]
    return [shortened(donor.donor) for donor in donors], feature_tables(donors) if donors else []


def prediction_checks(run: Run) -> list[PredictionCheck]:
    """Predictions that were measured: by `evaluate`, and by `plan --verify`."""
    checks = [check for evaluation in run.evaluations.values() for check in evaluation.predictions]
    for plan in plans(run):
        if plan.measured_damage is not None:
            low, high = plan.interval
            checks.append(
                PredictionCheck(
                    recipe=plan.summary + VERIFIED,
                    predicted=plan.predicted_damage,
                    low=low,
                    high=high,
                    measured=plan.measured_damage,
                    held=low <= plan.measured_damage <= high,
                )
            )
    return checks


def gain_in_words(interval: tuple[float, float]) -> str:
    """Whether a gain is above 0 beyond chance."""
    low, high = interval
    return "gain confirmed" if low > 0 else "worse than the donor" if high < 0 else "no gain shown"


def verdict(interval: tuple[float, float] | None) -> str:
    """A paired difference in a word; empty without an interval."""
    if interval is None:
        return ""
    return "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "no clear difference"


def task_verdict(entry: TaskDifferenceRecord) -> str:
    """A paired difference on a task in a word, after Holm's correction."""
    if entry.p_holm > SIGNIFICANCE:
        return "no clear difference"
    return "better" if entry.difference > 0 else "worse"


def on_text(evaluation: Evaluation) -> list[tuple[str, float]]:
    """Role and bits per byte of every model that was measured on text."""
    return [
        (model.role, model.bits_per_byte)
        for model in evaluation.models
        if model.bits_per_byte is not None
    ]


class Passage(NamedTuple):
    """A part of a sample."""

    text: str
    invalid: bool


def sample_rows(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, list[Passage]]]]]:
    """Samples by prompt: (prompt, [(model, passages)])."""
    by_prompt: dict[str, list] = {}
    for model in evaluation.models:
        for sample in model.samples or []:
            by_prompt.setdefault(sample.prompt, []).append(
                (shortened(model.name), list(passages(sample.text, sample.invalid)))
            )
    return list(by_prompt.items())


def passages(text: str, invalid: Iterable[str]) -> Iterator[Passage]:
    """Split a text into invalid words and the text between them."""
    words = sorted({word for word in invalid if word}, key=lambda word: (-len(word), word))
    if not words:
        yield Passage(text, False)
        return
    for number, part in enumerate(
        re.split(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", text)
    ):
        if part:
            yield Passage(part, number % 2 == 1)


def text_names(evaluation: Evaluation) -> list[str]:
    """The names of the texts, where there are several."""
    names = list(evaluation.models[0].texts) if evaluation.models else []
    return names if len(names) > 1 else []


def title(run: Run, views: Sequence[RecipeView], plan: PlanRecord | None) -> str:
    """The title of the page."""
    if not views:
        return plan.summary if plan else run.folder.resolve().name
    recipe = run.recipes[views[0].files[0]]
    donors = list(dict.fromkeys(shortened(source.model) for source in recipe.sources))
    names = " and ".join(filter(None, [", ".join(donors[:-1]), donors[-1]]))
    blocks = _blocks(recipe)
    return f"{blocks} blocks of {names}" if blocks else f"{names}, merged"


def facts(
    views: Sequence[RecipeView],
    plan: PlanRecord | None,
    checks: Sequence[PredictionCheck],
    run: Run,
) -> list[tuple[str, str]]:
    """The figures at the top of the page: (name, value)."""
    rows = _plan_facts(plan) if plan else _recipe_facts(run, views)
    if gain := chosen_gain(run, views):
        low, high = gain.interval
        rows.append(("Gain over the best donor", f"{gain.gain:.3f} nats ({low:.3f} to {high:.3f})"))
    paths = [Path(file) for file in views[0].files] if views else []
    names = {
        views[0].summary + VERIFIED if views else "",
        *(path.name for path in paths),
        *(path.parent.name for path in paths),
    }
    for check in checks:
        if names & {check.recipe, Path(check.recipe).name}:
            place = "in" if check.held else "outside"
            measured = f"{check.measured:.2f} nats, {place} the predicted interval"
            rows.append(("Measured damage", measured))
            break
    for evaluation in run.evaluations.values():
        measured = on_text(evaluation)
        merges = [bits for role, bits in measured if role != "donor"]
        donors = [bits for role, bits in measured if role == "donor"]
        if merges:
            rows.append(("Bits per byte", f"{merges[0]:.3f}"))
            rows += [("Best donor", f"{min(donors):.3f}")] if donors else []
            break
    return rows


def _plan_facts(plan: PlanRecord) -> list[tuple[str, str]]:
    rows = [("Blocks", str(plan.depth)), ("Seams", str(len(plan.seams)))]
    if chance := sum(seam.by_chance for seam in plan.seams):
        rows.append(("Seams at chance level", str(chance)))
    low, high = plan.interval
    damage = f"{plan.predicted_damage:z.2f} nats ({low:z.2f} to {high:z.2f})"
    return [*rows, ("Predicted damage", damage)]


def _recipe_facts(run: Run, views: Sequence[RecipeView]) -> list[tuple[str, str]]:
    recipe = run.recipes[views[0].files[0]] if views else None
    if recipe is None or not recipe.stack.slices:
        return []
    return [("Blocks", _blocks(recipe)), ("Seams", str(len(recipe.seams)))]


def _blocks(recipe: Recipe) -> str:
    return str(len(recipe.blocks)) if recipe.stack.slices else ""


def methods(tensors: Mapping[str, TensorRecord]) -> list[tuple[str, int]]:
    """The number of a checkpoint's tensors by the method that made them."""
    return list(Counter(tensor.method for tensor in tensors.values()).items())
