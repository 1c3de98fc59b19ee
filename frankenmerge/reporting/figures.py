"""The figures of a run: each is described here once, for the page and for files."""

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from frankenmerge.artefacts.alignment import SUFFIX, Alignment
from frankenmerge.artefacts.evaluation import (
    Evaluation,
    PredictionCheck,
    RetentionRecord,
    SeamsRecord,
    TaskDifferenceRecord,
)
from frankenmerge.artefacts.features import SUFFIX as FEATURES_SUFFIX
from frankenmerge.artefacts.gain import SUFFIX as GAIN_SUFFIX
from frankenmerge.artefacts.gain import GainFile
from frankenmerge.artefacts.provenance import HealingRecord
from frankenmerge.artefacts.sweep import SUFFIX as SWEEP_SUFFIX
from frankenmerge.errors import fail
from frankenmerge.reporting import svg
from frankenmerge.reporting.charts import Bar, Line, bars, lines
from frankenmerge.reporting.fronts import front_chart
from frankenmerge.reporting.heatmaps import Mark, alignment_figure
from frankenmerge.reporting.labels import recipe_name, shortened, task_name
from frankenmerge.reporting.run import Run
from frankenmerge.reporting.sections import (
    chosen_plan,
    explained_plan,
    gain_in_words,
    marks_of,
    prediction_checks,
    seams_of,
    splices,
    task_verdict,
    verdict,
)
from frankenmerge.reporting.svg import Drawing
from frankenmerge.reporting.windows import sweep_figure
from frankenmerge.splicing import diagram

_CHARTS = 4


class BlockChart(NamedTuple):
    """A chart of a merged model by block, and how to read it."""

    explanation: str
    drawing: Drawing


def prediction(checks: Sequence[PredictionCheck]) -> Drawing:
    """Predicted damage with its interval, and what was measured."""
    rows = [
        Bar(
            recipe_name(check.recipe),
            check.predicted,
            check.low,
            check.high,
            check.measured,
            "in the interval" if check.held else "outside the interval",
        )
        for check in checks
    ]
    return bars(
        rows,
        "Predicted and measured damage",
        "nats per token above the donors",
        value="predicted, 90 % interval",
        other="measured",
    )


def gains(found: GainFile) -> Drawing:
    """Plans and controls against the best donor, which is the line at 0."""
    controls = [
        Bar(name, control.gain, *control.interval, verdict=note)
        for name, control, note in (
            ("uniform average", found.controls.average, "control"),
            ("ensemble of the donors", found.controls.ensemble, "ceiling, no single model"),
        )
        if control
    ]
    plans = [
        Bar(plan.summary, plan.gain, *plan.interval, verdict=gain_in_words(plan.interval))
        for plan in found.plans
    ]
    donor = shortened(found.controls.best_donor.name)
    axis = f"nats per {found.unit} won; 0 is the best donor, {donor}"
    return bars([*plans, *controls], "Gain against the best donor", axis)


def differences(evaluation: Evaluation) -> Drawing:
    """Paired differences between models and donors, with their intervals."""
    rows = [
        Bar(
            f"{shortened(entry.model)} vs. {shortened(entry.donor)}",
            entry.bits_per_byte,
            *(entry.interval or (None, None)),
            verdict=verdict(entry.interval),
        )
        for entry in evaluation.differences
    ]
    axis = "bits per byte; left of the line the merge is better"
    return bars(rows, "Difference from each donor", axis)


def task_differences(differences: Sequence[TaskDifferenceRecord]) -> Drawing:
    """Paired differences between models and donors on tasks, with their intervals."""
    several = len({entry.model for entry in differences}) > 1
    rows = [
        Bar(
            f"{task_name(entry.task)} {entry.metric}"
            + (f", {shortened(entry.model)}" if several else "")
            + f" vs. {shortened(entry.donor)}",
            entry.difference,
            *entry.interval,
            verdict=task_verdict(entry),
        )
        for entry in differences
    ]
    axis = "difference of accuracies; right of the line the merge is better"
    return bars(rows, "Difference from each donor on tasks", axis)


def block_charts(record: SeamsRecord) -> list[BlockChart]:
    """The hidden states of a merged model by block: norm, direction, and prediction."""
    blocks = record.blocks
    numbered = enumerate((entry for entry in blocks if entry.seam), 1)
    seams = [(entry.block - 0.5, str(number)) for number, entry in numbered]
    donors = list(dict.fromkeys(donor for entry in blocks for donor in [*entry.cosine, *entry.kl]))
    cosine, kl = (
        [
            Line(
                shortened(donor),
                [(entry.block, getattr(entry, key).get(donor)) for entry in blocks],
                number,
            )
            for number, donor in enumerate(donors)
        ]
        for key in ("cosine", "kl")
    )
    norm = [Line("this model", [(entry.block, entry.norm_ratio) for entry in blocks], 5)]
    alone = [(entry.block, entry.kl_alone) for entry in blocks]
    kl.append(Line("the donor alone", alone, 5, broken=True))
    charts = (
        (
            "Norm of the hidden state",
            "The norm of the hidden state relative to the donor's after the same block; 1 means "
            "that it is unchanged.",
            norm,
            "ratio",
        ),
        (
            "Direction of the hidden state",
            "Cosine similarity with the donor's hidden state after the same block, or with another "
            "donor's after the block of that number; 1 is the same direction.",
            cosine,
            "cosine",
        ),
        (
            "Prediction at this depth",
            "KL divergence of the prediction that the final norm and the head make from the hidden "
            "state here, from each donor's own prediction; 0 is the same. The broken line is the "
            "unmodified donor, whose first blocks are far from its prediction too.",
            kl,
            "nats",
        ),
    )
    return [
        BlockChart(explanation, lines(series, title, axis, seams=seams))
        for title, explanation, series, axis in charts
        if any(value is not None for line in series if not line.broken for _, value in line.points)
    ]


def retention(records: Sequence[RetentionRecord]) -> Drawing:
    """The share of each donor's features that every block preserves, and chance."""
    series = []
    blocks = sorted({block.block for record in records for block in record.blocks})
    several = len({record.model for record in records}) > 1
    for number, record in enumerate(records):
        kept = {block.block: block.kept for block in record.blocks}
        label = shortened(record.donor)
        label += f" in {shortened(record.model)}" if several else ""
        series.append(Line(label, [(block, kept.get(block)) for block in blocks], number))
        if record.chance is not None:
            chance = [(block, record.chance) for block in blocks]
            series.append(Line(f"{label}, by chance", chance, number, broken=True))
    return lines(series, "Features preserved", "share of features preserved")


def healing(record: HealingRecord) -> Drawing:
    """The loss that decided when to stop, above its least value, by step."""
    least = min(point.nats for point in record.curve)
    points = [(point.step, point.nats - least) for point in record.curve]
    axis = "nats per token above the least"
    title = f"Healing: {record.scope}, towards {record.teacher}"
    return lines([Line(record.scope, points, 0)], title, axis, by="step")


def plot_alignment(alignment: Alignment, path: Path, marks: Sequence[Mark] = ()) -> None:
    """Draw the scores of an alignment to a PNG or SVG file.

    Raises:
        FrankenmergeError: for another kind of file, for one that cannot be written, and for PNG
            without the extra `plots`.
    """
    svg.save(svg.standalone(alignment_figure(alignment, marks)), path)


def write_figures(run: Run, folder: Path) -> list[Path]:
    """Write every figure of a run as PNG and as SVG; returns the paths.

    Raises:
        FrankenmergeError: for a run without figures, for files that cannot be written, and without
            the extra `plots`.
    """
    figures = list(_figures(run))
    if not figures:
        expected = "alignments, recipes, evaluations, or measured predictions"
        raise fail(str(run.folder), f"results to draw: {expected}", "none", "omit --figures")
    texts: dict[str, str] = {}
    for name, text in figures:
        file = re.sub(r"[^\w.-]", "-", name)
        numbered = (f"{file}-{number}" if number > 1 else file for number in count(1))
        texts[next(each for each in numbered if each not in texts)] = text
    written = []
    for ending in (".png", ".svg"):
        for file, text in texts.items():
            svg.save(text, folder / (file + ending))
            written.append(folder / (file + ending))
    return written


def _figures(run: Run) -> Iterator[tuple[str, str]]:
    """Name and SVG of every figure."""
    shown = splices(run)
    plan = explained_plan(run, shown, chosen_plan(run, shown))
    places = seams_of(run, shown, plan)
    for file, alignment in run.alignments.items():
        drawing = alignment_figure(alignment, marks_of(alignment, places))
        yield f"alignment-{file.removesuffix(SUFFIX)}", svg.standalone(drawing)
    if shown:
        pieces = diagram.pieces_of(run.recipes[shown[0].files[0]], run.depths)
        if pieces:
            splice = diagram.svg(pieces, run.depths, "splice")
            yield "splice", svg.with_light_colours(splice)
    for file, found in run.gains.items():
        stem = file.removesuffix(GAIN_SUFFIX)
        yield f"gain-{stem}", svg.standalone(gains(found))
        if found.tasks:
            yield f"gain-tasks-{stem}", svg.standalone(task_differences(found.tasks))
    for file, sweep in run.sweeps.items():
        yield f"sweep-{file.removesuffix(SWEEP_SUFFIX)}", svg.standalone(sweep_figure(sweep))
    for file, searched in run.searched.items():
        if fronts := [front_chart(each) for each in searched.features if each.front]:
            title = f"Activation and fluency of inputs of {shortened(searched.donor)}"
            yield (
                f"fronts-{file.removesuffix(FEATURES_SUFFIX)}",
                svg.standalone(_row(fronts, title)),
            )
    for file, merged in run.merges.items():
        if merged.healing:
            yield f"healing-{Path(file).parent.name}", svg.standalone(healing(merged.healing))
    if checks := prediction_checks(run):
        yield "prediction", svg.standalone(prediction(checks))
    for file, evaluation in run.evaluations.items():
        stem = Path(file).stem
        if evaluation.differences:
            yield f"differences-{stem}", svg.standalone(differences(evaluation))
        if evaluation.task_differences:
            yield f"tasks-{stem}", svg.standalone(task_differences(evaluation.task_differences))
        for record in evaluation.seams:
            name = f"seams-{Path(record.model).stem}"
            if charts := [chart.drawing for chart in block_charts(record)]:
                title = f"Hidden states of {shortened(record.model)} by block"
                yield name, svg.standalone(_row(charts, title))
        if evaluation.retention:
            yield f"retention-{stem}", svg.standalone(retention(evaluation.retention))


def _row(charts: Sequence[Drawing], title: str) -> Drawing:
    """Charts side by side, at most `_CHARTS` in a row, each under its title."""
    described = "; ".join(f"{chart.title}: {chart.description}" for chart in charts)
    rows = [charts[first : first + _CHARTS] for first in range(0, len(charts), _CHARTS)]
    shown = [[svg.titled(chart) for chart in row] for row in rows]
    return svg.combined(shown, title, described)
