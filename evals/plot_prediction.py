"""Plot predicted against measured damage of splices.

Usage: `python evals/plot_prediction.py OUT.png NAME=RESULT.json ...`. Results are what
`splice_prediction.py --json` prints. Upper row: predicted from states; lower row: measured on
sampled tokens.
"""

import json
from pathlib import Path

import click
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

ROWS = {"predicted": "predicted from states", "drawn": "damage on sampled tokens"}
"""Keys of the results, and the labels of their axes."""
LEAST = 0.005
"""Smallest damage that is plotted, in nats per token; less is plotted here."""


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("results", nargs=-1, required=True)
def main(output: Path, results: tuple[str, ...]) -> None:
    """Plot one column for every NAME=RESULT.json; nats per token, both axes logarithmic."""
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
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        measured = np.maximum(LEAST, result["damage"]["measured"])
        for row, (kind, label) in enumerate(ROWS.items()):
            axis, predicted = axes[row, column], np.maximum(LEAST, result["damage"][kind])
            for part, what, colour in (
                (slice(result["splices"]), "one seam", "tab:blue"),
                (slice(result["splices"], None), "more", "tab:orange"),
            ):
                axis.scatter(
                    measured[part], predicted[part], s=6, alpha=0.6, color=colour, label=what
                )
            axis.plot([LEAST, 10], [LEAST, 10], color="grey", linewidth=0.8)
            axis.set(xscale="log", yscale="log", xlim=(LEAST, 10), ylim=(LEAST, 10))
            rho = result[kind]
            axis.set_title(f"{name}: rho {rho['all']:.2f}, {rho['multi_seam']:.2f}", fontsize=9)
            axis.set_ylabel(label if column == 0 else "")
            axis.set_xlabel("measured on text" if row else "")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
