"""From artefacts to what the page's template shows: plain values and finished SVG, section by section."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.evaluation import (
    Evaluation,
    PredictionCheck,
    RetentionRecord,
    SeamsRecord,
)
from frankenmerge.artefacts.evidence import PlanRecord, SeamRecord
from frankenmerge.artefacts.provenance import TensorRecord
from frankenmerge.artefacts.recipe import Block, Seam
from frankenmerge.reporting import charts, heatmaps
from frankenmerge.reporting.features import Table, aligned_features, feature_tables
from frankenmerge.reporting.heatmaps import Mark, shortened
from frankenmerge.reporting.labels import NULLS, SCORES, Named, null_named, score_named
from frankenmerge.reporting.run import Run
from frankenmerge.splicing import diagram

TABLED = 17
"""Up to so many rows and columns a heatmap's values are also given as a table."""
VERIFIED = " (plan --verify)"
"""BlockComparison the name of a recipe that `plan` measured itself."""


class Splice(NamedTuple):
    """A recipe to show."""

    files: list[str]
    """Those that hold it."""
    summary: str
    text: str
    svg: Markup
    method: str


class Panel(NamedTuple):
    """One score of an alignment."""

    name: str
    words: Named
    svg: Markup
    nulls: list[tuple[Named, Markup, float]]
    """(words, heatmap, mean)."""
    mean: float
    rows: list[list[float]]


class Map(NamedTuple):
    """An alignment."""

    file: str
    donors: tuple[str, str]
    panels: list[Panel]
    marks: list[Mark]
    numbers: dict[str, Any]


def splices(run: Run) -> list[Splice]:
    """The recipes, each once; what was merged or else what was planned best stands first."""
    planned = [plan.summary for evidence in run.evidence.values() for plan in evidence.plans[:1]]
    order = sorted(
        run.recipes,
        key=lambda name: (Path(name).parent == Path(), str(run.recipes[name]) not in planned, name),
    )
    found: dict[str, Splice] = {}
    for name in order:
        recipe = run.recipes[name]
        if recipe.dump() in found:
            found[recipe.dump()].files.append(name)
            continue
        slices = diagram.pieces_of(recipe, run.depths)
        drawn = (
            diagram.svg(slices, run.depths, f"splice{len(found)}", alone=False) if slices else ""
        )
        found[recipe.dump()] = Splice(
            [name], str(recipe), run.texts[name], Markup(drawn), recipe.merge_method
        )
    return list(found.values())


def plans(run: Run) -> list[PlanRecord]:
    """Every plan of every file of evidence."""
    return [plan for evidence in run.evidence.values() for plan in evidence.plans]


def chosen_plan(found: Sequence[Splice], known: Sequence[PlanRecord]) -> PlanRecord | None:
    """The plan of the recipe that is shown first; without a recipe the best one."""
    if not found:
        return known[0] if known else None
    return next((plan for plan in known if plan.summary == found[0].summary), None)


def seam_said(seam: SeamRecord) -> str:
    """Where a seam lies, in words."""
    kind = (
        f"{seam.skipped_blocks} skipped"
        if seam.skipped_blocks > 0
        else f"{-seam.skipped_blocks} gone through again"
    )
    after, before = (
        f"{shortened(place.model)} block {place.block}" for place in (seam.after, seam.before)
    )
    return f"{after} to {before}, {kind if seam.skipped_blocks else 'same depth'}"


def seam_scores(seam: SeamRecord) -> list[tuple[Named, float, list[float | None]]]:
    """The scores at a seam that have nulls: (words, value, its nulls in the order of `NULLS`)."""
    order = [*SCORES, *seam.scores]
    named = sorted((name for name in seam.scores if seam.nulls.get(name)), key=order.index)
    return [
        (score_named(name), seam.scores[name], [seam.nulls[name].get(null) for null in NULLS])
        for name in named
    ]


def seams(run: Run, found: Sequence[Splice], plan: PlanRecord | None) -> list[Seam]:
    """The seams of the recipe that is shown first, or else of the plan."""
    if found and (recipe := run.recipes[found[0].files[0]]).stack.slices:
        return recipe.seams
    told = plan.seams if plan else []
    return [
        Seam(*(Block(place.model, place.block) for place in (seam.after, seam.before)))
        for seam in told
    ]


def maps(run: Run, seams: Sequence[Seam]) -> list[Map]:
    """The alignments, seams marked where they lie."""
    return [
        _map(name, alignment, marks_of(alignment, seams))
        for name, alignment in run.alignments.items()
    ]


def marks_of(alignment: Alignment, seams: Sequence[Seam]) -> list[Mark]:
    """Where seams lie in the matrix of an alignment; those between other donors are left out."""
    rows, columns = alignment.blocks
    found = []
    for number, seam in enumerate(seams, 1):
        left, entered = (
            (seam.after.model, seam.after.index + 1),
            (seam.before.model, seam.before.index),
        )
        for (a, row), (b, column) in ((left, entered), (entered, left)):
            if (a, b) == alignment.donors and row <= rows and column <= columns:
                found.append(Mark(row, column, str(number)))
                break
    return found


def _map(name: str, alignment: Alignment, marks: list[Mark]) -> Map:
    panels, a, b = [], *(shortened(donor) for donor in alignment.donors)
    for score_name, score in heatmaps.scores_with_nulls(alignment).items():
        words = score_named(score_name)
        drawn = heatmaps.svg(
            score.matrix, alignment.donors, marks, f"{words.title}, {a} against {b}"
        )
        nulls = [
            (
                null_named(null),
                Markup(
                    heatmaps.svg(
                        matrix, alignment.donors, marks, null_named(null).title, small=True
                    )
                ),
                _mean(matrix),
            )
            for null, matrix in sorted(score.nulls.items())
        ]
        rows = score.matrix.tolist() if max(score.matrix.shape) <= TABLED else []
        panels.append(Panel(score_name, words, Markup(drawn), nulls, _mean(score.matrix), rows))
    return Map(name, (a, b), panels, marks, heatmaps.numbers(alignment, marks))


def _mean(matrix: np.ndarray) -> float:
    """The mean over cells of equal depth, the embedding left out."""
    depth = min(matrix.shape)
    return (
        float(np.nanmean(matrix.diagonal()[min(1, depth - 1) : depth]))
        if np.isfinite(matrix).any()
        else float("nan")
    )


def features(run: Run) -> tuple[list[str], list[Table]]:
    """Donors and their tables of features: from atlases, and from alignments where a donor's atlas is not there."""
    donors = list(run.features)
    for alignment in run.alignments.values():
        known = {donor.fingerprint for donor in donors}
        donors += [donor for donor in aligned_features(alignment) if donor.fingerprint not in known]
    return [shortened(donor.donor) for donor in donors], feature_tables(donors) if donors else []


def promises(run: Run) -> list[PredictionCheck]:
    """What was predicted and then measured: by `evaluate` on its texts, and by `plan --verify` on its own."""
    told = [
        promise for evaluation in run.evaluations.values() for promise in evaluation.predictions
    ]
    for plan in plans(run):
        if plan.measured_damage is not None:
            low, high = plan.interval
            held = low <= plan.measured_damage <= high
            told.append(
                PredictionCheck(
                    recipe=plan.summary + VERIFIED,
                    predicted=plan.predicted_damage,
                    low=low,
                    high=high,
                    measured=plan.measured_damage,
                    held=held,
                )
            )
    return told


def promise_chart(told: Sequence[PredictionCheck]) -> Markup:
    """Predictions with their intervals, and what was measured."""
    rows = [
        charts.Bar(
            recipe_name(entry.recipe),
            entry.predicted,
            entry.low,
            entry.high,
            entry.measured,
            "held" if entry.held else "did not hold",
        )
        for entry in told
    ]
    return Markup(
        charts.bars(
            rows,
            "promises",
            "Predicted and measured damage",
            "nats per token above the donors",
            value="predicted, 9 of 10",
            other="measured",
        )
    )


def recipe_name(name: str) -> str:
    """What a promise was made of, as far as a label has room."""
    return diagram.visible(name) if name.endswith(VERIFIED) else shortened(name)


def difference_chart(evaluation: Evaluation, name: str) -> Markup:
    """Paired differences between models and donors, with their intervals."""
    rows = [
        charts.Bar(
            f"{shortened(entry.model)} against {shortened(entry.donor)}",
            entry.bits_per_byte,
            *(entry.interval or (None, None)),
            said=verdict(entry.interval),
        )
        for entry in evaluation.differences
    ]
    return Markup(
        charts.bars(
            rows,
            name,
            "Difference to each donor",
            "bits per byte; left of the line the merge is better",
        )
    )


def verdict(interval: tuple[float, float] | None) -> str:
    """A paired difference in a word; nothing is said without an interval."""
    if interval is None:
        return ""
    return "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "no clear difference"


def diagnostics(told: SeamsRecord, name: str) -> list[tuple[str, str, Markup]]:
    """Charts of what flows through a merged model: (title, how to read it, chart)."""
    blocks = told.blocks
    seams = [
        (entry.block - 0.5, str(number))
        for number, entry in enumerate((entry for entry in blocks if entry.seam), 1)
    ]
    donors = list(dict.fromkeys(donor for entry in blocks for donor in [*entry.cosine, *entry.kl]))
    norm = [charts.Line("this model", [(entry.block, entry.norm_ratio) for entry in blocks], 5)]
    cosine, kl = (
        [
            charts.Line(
                shortened(donor),
                [(entry.block, getattr(entry, key).get(donor)) for entry in blocks],
                n,
            )
            for n, donor in enumerate(donors)
        ]
        for key in ("cosine", "kl")
    )
    kl.append(
        charts.Line(
            "the donor alone", [(entry.block, entry.kl_alone) for entry in blocks], 5, broken=True
        )
    )
    shown = (
        (
            "Length of the stream",
            "The hidden state's length over that of the donor behind the same block; 1 is as at home.",
            norm,
            "ratio",
        ),
        (
            "Direction of the stream",
            "Cosine to the donor's hidden state behind the same block, to another donor's behind the "
            "block of that number; 1 is the same direction.",
            cosine,
            "cosine",
        ),
        (
            "What it would say here",
            "How far what final norm and head would read here is from each donor's own prediction (KL "
            "divergence); 0 is the same. The broken line is the donor alone, which is far off in its first blocks too.",
            kl,
            "nats",
        ),
    )
    return [
        (title, how, Markup(charts.lines(series, f"{name}-{number}", title, axis, seams=seams)))
        for number, (title, how, series, axis) in enumerate(shown)
        if any(value is not None for line in series for _, value in line.points if not line.broken)
    ]


def retention_chart(told: Sequence[RetentionRecord], name: str) -> Markup:
    """The share of each donor's features that every block kept, beside chance."""
    series = []
    blocks = sorted({block.block for entry in told for block in entry.blocks})
    for number, entry in enumerate(told):
        kept = {block.block: block.kept for block in entry.blocks}
        whose = (
            f"{shortened(entry.donor)} in {shortened(entry.model)}"
            if len({e.model for e in told}) > 1
            else shortened(entry.donor)
        )
        series.append(charts.Line(whose, [(block, kept.get(block)) for block in blocks], number))
        if entry.chance is not None:
            series.append(
                charts.Line(
                    f"{whose}, by chance",
                    [(block, entry.chance) for block in blocks],
                    number,
                    broken=True,
                )
            )
    return Markup(charts.lines(series, name, "Features kept", "share of features kept"))


class Passage(NamedTuple):
    """A piece of a sample."""

    text: str
    invalid: bool


def sample_rows(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, list[Passage]]]]]:
    """Samples by prompt: (prompt, [(model, passages)])."""
    found: dict[str, list] = {}
    for model in evaluation.models:
        for sample in model.samples or []:
            found.setdefault(sample.prompt, []).append(
                (shortened(model.name), list(passages(sample.text, sample.invalid)))
            )
    return list(found.items())


def passages(text: str, invalid: Iterable[str]) -> Iterator[Passage]:
    """Cut a text into invalid words and what lies between them."""
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
    """The texts of the first model, where there are several."""
    names = list(evaluation.models[0].texts) if evaluation.models else []
    return names if len(names) > 1 else []


def title(run: Run, found: Sequence[Splice], plan: PlanRecord | None) -> str:
    """What the page is called."""
    if not found:
        return plan.summary if plan else run.folder.resolve().name
    recipe = run.recipes[found[0].files[0]]
    donors = list(dict.fromkeys(shortened(source.model) for source in recipe.sources))
    names = " and ".join(filter(None, [", ".join(donors[:-1]), donors[-1]]))
    blocks = _blocks(recipe)
    return f"{blocks} blocks of {names}" if blocks else f"{names}, merged"


def facts(
    found: Sequence[Splice], plan: PlanRecord | None, told: Sequence[PredictionCheck], run: Run
) -> list[tuple[str, str]]:
    """The figures on top of the page."""
    shown: list[tuple[str, str]] = []
    if plan:
        shown += [("Blocks", str(plan.depth)), ("Seams", str(len(plan.seams)))]
        low, high = plan.interval
        if chance := sum(seam.by_chance for seam in plan.seams):
            shown.append(
                ("Seams no better than chance", f"{chance}: these donors share no basis there")
            )
        shown.append(
            ("Predicted damage", f"{plan.predicted_damage:z.2f} nats ({low:z.2f} to {high:z.2f})")
        )
    elif found:
        blocks = _blocks(run.recipes[found[0].files[0]])
        shown += (
            [("Blocks", blocks), ("Seams", str(len(run.recipes[found[0].files[0]].seams)))]
            if blocks
            else []
        )
    paths = [Path(file) for file in found[0].files] if found else []
    names = {
        found[0].summary + VERIFIED if found else "",
        *(path.name for path in paths),
        *(path.parent.name for path in paths),
    }
    if ours := next(
        (entry for entry in told if names & {entry.recipe, Path(entry.recipe).name}), None
    ):
        held = "the prediction held" if ours.held else "the prediction did not hold"
        shown.append(("Measured damage", f"{ours.measured:.2f} nats: {held}"))
    for evaluation in run.evaluations.values():
        if ours := next((model for model in evaluation.models if model.role != "donor"), None):
            shown.append(("Bits per byte", f"{ours.bits_per_byte:.3f}"))
            donors = [model.bits_per_byte for model in evaluation.models if model.role == "donor"]
            shown += [("Best donor", f"{min(donors):.3f}")] if donors else []
            break
    return shown


def _blocks(recipe: Any) -> str:
    return str(len(recipe.blocks)) if recipe.stack.slices else ""


def methods(tensors: Mapping[str, TensorRecord]) -> list[tuple[str, int]]:
    """The number of a checkpoint's tensors by the method that made them."""
    return list(Counter(tensor.method for tensor in tensors.values()).items())
