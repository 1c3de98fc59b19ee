"""Static figures, drawn with matplotlib (the extra `plots`)."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from frankenmerge.alignment import Alignment
from frankenmerge.errors import fail
from frankenmerge.files import write_file

TITLES = {
    "argmax": "same best token",
    "jaccard": "top tokens shared (Jaccard)",
    "correlation": "correlation on random tokens",
    "rank_correlation": "rank correlation on random tokens",
    "greedy": "same tokens by greedy search",
    "gradient": "same tokens by gradient search",
}


def plot_alignment(alignment: Alignment, path: Path) -> None:
    """Draw every score that neurons have as a heatmap, its null in the title, to a PNG or SVG file.

    Raises FrankenmergeError for another kind of file, or one that may not be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise fail(str(path), "a file name that ends in .png or .svg", path.suffix or "no ending", "choose another name")
    names = [name for name, score in alignment.scores.items() if score.detail.shape[2]]
    figure = Figure(figsize=(4.4 * len(names), 5.2), layout="constrained")
    a, b = (Path(donor).name for donor in alignment.donors)
    image = None
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        score = alignment.scores[name]
        image = axes.imshow(score.matrix, vmin=0, vmax=1, cmap="viridis", origin="upper")
        chance = float(score.nulls["permuted_neurons"].mean())
        axes.set(
            title=f"{TITLES.get(name, name)}\nby chance: {round(chance, 2) + 0:.2f}",
            xlabel=f"{b}, after so many blocks",
            ylabel=f"{a}, after so many blocks",
        )
        if max(score.matrix.shape) <= 12:
            _write_values(axes, score.matrix)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)  # pyright: ignore[reportArgumentType]
    figure.suptitle(f"Where {a} and {b} agree about what their neurons mean")
    drawn = BytesIO()
    # Without these entries the same alignment gives the same bytes.
    unstamped = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with rc_context({"svg.hashsalt": "frankenmerge"}):
        figure.savefig(drawn, format=path.suffix[1:], dpi=110, bbox_inches="tight", metadata=unstamped)
    write_file(path, drawn.getvalue())


def _write_values(axes, matrix: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        shade = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{value:.2f}".lstrip("0") or "0", ha="center", va="center", fontsize=7, color=shade)
