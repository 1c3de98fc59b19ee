"""Draw what splices were foretold to lose against what they lost: `python evals/plot_prediction.py OUT.png NAME=RESULT.json ...`.

Results are what `splice_prediction.py --json` prints. Upper row: predicted from states; lower row:
measured on drawn tokens.
"""

import json
from pathlib import Path

import click
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

ROWS = {"predicted": "predicted from states", "drawn": "damage on drawn tokens"}
LEAST = 0.005


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("results", nargs=-1, required=True)
def main(output: Path, results: tuple[str, ...]) -> None:
    """Draw one column for every NAME=RESULT.json; nats per token, both axes logarithmic."""
    figure, axes = pyplot.subplots(
        2,
        len(results),
        figsize=(3 * len(results), 5.6),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, entry in enumerate(results):
        name, _, path = entry.partition("=")
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = np.maximum(LEAST, told["damage"]["measured"])
        for row, (kind, label) in enumerate(ROWS.items()):
            axis, foretold = axes[row, column], np.maximum(LEAST, told["damage"][kind])
            for part, what, colour in (
                (slice(told["splices"]), "one seam", "tab:blue"),
                (slice(told["splices"], None), "more", "tab:orange"),
            ):
                axis.scatter(
                    measured[part], foretold[part], s=6, alpha=0.6, color=colour, label=what
                )
            axis.plot([LEAST, 10], [LEAST, 10], color="grey", linewidth=0.8)
            axis.set(xscale="log", yscale="log", xlim=(LEAST, 10), ylim=(LEAST, 10))
            axis.set_title(
                f"{name}: rho {told[kind]['all']:.2f}, {told[kind]['multi_seam']:.2f}", fontsize=9
            )
            axis.set_ylabel(label if column == 0 else "")
            axis.set_xlabel("measured on text" if row else "")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
