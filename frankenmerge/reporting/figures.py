"""The page's figures as PNG and SVG files, drawn with matplotlib (the extra `plots`), for papers and model cards."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from frankenmerge.artefacts.alignment import SUFFIX
from frankenmerge.artefacts.evaluation import PredictionCheck, SeamsRecord
from frankenmerge.errors import fail
from frankenmerge.reporting.heatmaps import shortened
from frankenmerge.reporting.plots import plot_alignment, save
from frankenmerge.reporting.run import Run
from frankenmerge.reporting.sections import chosen_plan, marks_of, plans, promises, splices
from frankenmerge.reporting.sections import seams as seams_of
from frankenmerge.splicing import diagram

_INK, _SOFT, _REST = "#1d2330", "#5b6372", "#e3e6ec"
_MARKERS = "osD^xP"


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw what the run holds, each figure as PNG and as SVG; returns the files written.

    Raises FrankenmergeError for a run with nothing to draw, and for files that may not be written.
    """
    found = splices(run)
    places = seams_of(run, found, chosen_plan(found, plans(run)))
    written = []
    for ending in (".png", ".svg"):
        for name, alignment in run.alignments.items():
            path = folder / f"alignment-{name.removesuffix(SUFFIX)}{ending}"
            plot_alignment(alignment, path, marks_of(alignment, places))
            written.append(path)
        figures = {"splice": _splice(run)} if run.recipes else {}
        if told := promises(run):
            figures["prediction"] = prediction(told)
        for evaluation in run.evaluations.values():
            figures |= {
                f"seams-{Path(entry.model).stem}": seams(entry) for entry in evaluation.seams
            }
        for name, figure in figures.items():
            if figure:
                path = folder / (re.sub(r"[^\w.-]", "-", name) + ending)
                save(figure, path)
                written.append(path)
    if not written:
        expected = "alignments, recipes, evaluations with seams, or measured predictions"
        raise fail(str(run.folder), f"something to draw: {expected}", "none", "leave --figures out")
    return written


def _splice(run: Run) -> Figure | None:
    recipe = run.recipes[splices(run)[0].files[0]]
    slices = diagram.pieces_of(recipe, run.depths)
    return splice(diagram.layout(slices, run.depths)) if slices else None


def splice(found: diagram.Layout) -> Figure:
    """Which block comes from where."""
    figure = Figure(figsize=(found.width / 72, found.height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, found.width), ylim=(found.height, 0))
    axes.axis("off")
    for ribbon in found.ribbons:
        axes.add_patch(
            PathPatch(_band(ribbon), facecolor=_colour(ribbon.donor), alpha=0.22, linewidth=0)
        )
    for cell in [*found.columns, *found.slices]:
        face = _colour(cell.donor) if cell.used else _REST
        axes.add_patch(
            Rectangle(
                (cell.x, cell.y),
                cell.width,
                cell.height,
                facecolor=face,
                edgecolor="white",
                linewidth=0.7,
            )
        )
    every = 1 if found.block_height >= 12 else 10
    for cell in (cell for cell in found.columns if int(cell.label) % every == 0):
        shade = "white" if cell.used else _SOFT
        axes.text(
            cell.x + cell.width / 2,
            cell.y + cell.height / 2,
            cell.label,
            ha="center",
            va="center",
            color=shade,
            fontsize=7,
        )
    for cell in found.slices:
        if cell.height >= 12 and cell.width >= 45:
            axes.text(
                cell.x + cell.width / 2,
                cell.y + cell.height / 2,
                cell.label,
                ha="center",
                va="center",
                color="white",
                fontsize=9,
            )
    width = found.slices[0].width * len(
        [cell for cell in found.slices if cell.y == found.slices[0].y]
    )
    for y in found.seams:
        axes.plot(
            [found.middle - width / 2 - 6, found.middle + width / 2 + 6],
            [y, y],
            color=_INK,
            linewidth=1.5,
        )
    for number, y in enumerate(found.seams if diagram.numbered(found) else [], 1):
        where = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": _INK}
        axes.text(
            found.middle + width / 2 + 6,
            y,
            str(number),
            ha="center",
            va="center",
            color=_INK,
            fontsize=7,
            bbox=where,
        )
    for n, (name, x) in enumerate(zip(found.donors, found.heads, strict=True)):
        blocks = sum(cell.donor == n for cell in found.columns)
        axes.text(
            x,
            18,
            diagram.LETTERS[n % 26],
            ha="center",
            color=_colour(n),
            fontsize=12,
            fontweight="bold",
        )
        axes.text(x, 34, _plain(shortened(name)), ha="center", color=_INK, fontsize=8.5)
        axes.text(x, 48, f"{blocks} blocks", ha="center", color=_SOFT, fontsize=7.5)
    axes.text(found.middle, 34, "result", ha="center", color=_INK, fontsize=8.5)
    axes.text(found.middle, 48, f"{found.blocks} blocks", ha="center", color=_SOFT, fontsize=7.5)
    return figure


def _band(ribbon: diagram.Ribbon) -> Outline:
    (x, up, down), (to, upper, lower) = ribbon.source, ribbon.target
    bend = (x + to) / 2
    points = [
        (x, up),
        (bend, up),
        (bend, upper),
        (to, upper),
        (to, lower),
        (bend, lower),
        (bend, down),
        (x, down),
        (x, up),
    ]
    codes = [
        Outline.MOVETO,
        *[Outline.CURVE4] * 3,
        Outline.LINETO,
        *[Outline.CURVE4] * 3,
        Outline.CLOSEPOLY,
    ]
    return Outline(points, codes)


def prediction(told: Sequence[PredictionCheck]) -> Figure:
    """Predicted damage with its interval, and what was measured."""
    figure = Figure(figsize=(6.4, 1.4 + 0.42 * len(told)), layout="constrained")
    axes = figure.subplots()
    places = range(len(told))
    spans = [
        [entry.predicted - entry.low for entry in told],
        [entry.high - entry.predicted for entry in told],
    ]
    predicted, measured = (
        [getattr(entry, key) for entry in told] for key in ("predicted", "measured")
    )
    axes.errorbar(
        predicted,
        places,
        xerr=spans,
        fmt="o",
        color=diagram.COLOURS[0],
        capsize=4,
        label="predicted, 9 of 10",
    )
    axes.plot(measured, places, "D", color=diagram.COLOURS[1], label="measured")
    axes.set_yticks(places, [_plain(shortened(entry.recipe)) for entry in told])
    axes.set(
        xlabel="nats per token above the donors",
        ylim=(len(told) - 0.5, -0.5),
        xlim=(min(0, axes.get_xlim()[0]), None),
    )
    axes.grid(axis="x", color=_REST)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def seams(told: SeamsRecord) -> Figure:
    """What flows through a merged model, block by block: length, direction, and what it would say."""
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    blocks = [entry.block for entry in told.blocks]
    donors = list(
        dict.fromkeys(donor for entry in told.blocks for donor in [*entry.cosine, *entry.kl])
    )
    shown = (
        (
            "length, against the donor's",
            {"this model": [entry.norm_ratio for entry in told.blocks]},
        ),
        (
            "cosine to each donor",
            {
                shortened(donor): [entry.cosine.get(donor) for entry in told.blocks]
                for donor in donors
            },
        ),
        (
            "KL to each donor, nats",
            {shortened(donor): [entry.kl.get(donor) for entry in told.blocks] for donor in donors},
        ),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), shown, strict=True):
        for number, (label, values) in enumerate(lines.items()):
            style = {
                "color": _SOFT if len(lines) == 1 else _colour(number),
                "marker": _MARKERS[number % 6],
                "markersize": 3.5,
            }
            axes.plot(
                blocks,
                [float("nan") if value is None else value for value in values],
                label=_plain(label),
                **style,
            )
        for entry in told.blocks:
            if entry.seam:
                axes.axvline(entry.block - 0.5, color=_SOFT, linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="block of the result")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(axis="y", color=_REST)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _colour(donor: int) -> str:
    return diagram.COLOURS[donor % len(diagram.COLOURS)]


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return text.replace("$", r"\$")
