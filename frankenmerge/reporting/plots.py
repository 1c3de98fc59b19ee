"""Static figures, drawn with matplotlib (the extra `plots`)."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.errors import fail
from frankenmerge.reporting.heatmaps import Mark
from frankenmerge.storage.atomic import write_file

TITLES = {
    "argmax": "same best token",
    "jaccard": "top tokens shared (Jaccard)",
    "correlation": "correlation on random tokens",
    "rank_correlation": "rank correlation on random tokens",
    "greedy": "same tokens by greedy search",
    "gradient": "same tokens by gradient search",
}


def plot_alignment(alignment: Alignment, path: Path, marks: Iterable[Mark] = ()) -> None:
    """Draw every score that neurons have as a heatmap, its null in the title, to a PNG or SVG file; seams as numbered boxes.

    Raises FrankenmergeError for another kind of file, or one that may not be written.
    """
    names = [name for name, score in alignment.scores.items() if score.detail.shape[2]]
    figure = Figure(figsize=(4.4 * len(names), 5.2), layout="constrained")
    a, b = (Path(donor).name for donor in alignment.donors)
    image = None
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        score = alignment.scores[name]
        image = axes.imshow(score.matrix, vmin=0, vmax=1, cmap="viridis", origin="upper")
        chance = ", ".join(
            f"{said}: {round(float(score.nulls[null].mean()), 2) + 0:.2f}"
            for null, said in (("permuted_neurons", "by chance"), ("residual_law", "residual law"))
            if null in score.nulls
        )
        axes.set(
            title=f"{TITLES.get(name, name)}\n{chance}",
            xlabel=f"{b}, after so many blocks",
            ylabel=f"{a}, after so many blocks",
        )
        if max(score.matrix.shape) <= 12:
            _write_values(axes, score.matrix)
        for mark in marks:
            box = (mark.column - 0.5, mark.row - 0.5)
            axes.add_patch(Rectangle(box, 1, 1, fill=False, edgecolor="white", linewidth=3.5))
            axes.add_patch(Rectangle(box, 1, 1, fill=False, edgecolor="black", linewidth=1.5))
            where = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black"}
            axes.text(
                mark.column + 0.5,
                mark.row - 0.5,
                mark.label,
                ha="center",
                va="center",
                fontsize=6,
                bbox=where,
            )
    figure.colorbar(image, ax=figure.axes, shrink=0.8)  # pyright: ignore[reportArgumentType]
    figure.suptitle(f"Where {a} and {b} agree about what their neurons mean")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG or SVG file, the same bytes for the same figure.

    Raises FrankenmergeError for another kind of file, or one that may not be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise fail(
            str(path),
            "a file name that ends in .png or .svg",
            path.suffix or "no ending",
            "choose another name",
        )
    drawn = BytesIO()
    # Without these entries the same figure gives other bytes tomorrow.
    unstamped = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with rc_context({"svg.hashsalt": "frankenmerge"}):
        figure.savefig(
            drawn, format=path.suffix[1:], dpi=110, bbox_inches="tight", metadata=unstamped
        )
    write_file(path, drawn.getvalue())


def _write_values(axes, matrix: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        shade = "black" if value > 0.6 else "white"
        axes.text(
            column,
            row,
            f"{value:.2f}".lstrip("0") or "0",
            ha="center",
            va="center",
            fontsize=7,
            color=shade,
        )
