"""Plot what searches find against their passes, and the fronts of fluent inputs.

Usage: `python evals/feature_figures.py FOLDER RESULT.json ...`, with what
`bench_search.py --section strength --json` prints for each donor. Fronts are of the demo's `base`.
"""

import json
from collections import defaultdict
from pathlib import Path

import click
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from frankenmerge.analysis.analyze import token_texts
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.reporting import svg
from frankenmerge.reporting.fronts import front_chart
from frankenmerge.workflows.feature_records import feature_records
from frankenmerge.workflows.searches import SearchOptions, search

NAMES = {
    "greedy": ("greedy", "s"),
    "beam_16": ("beam of 16", "D"),
    "plain_ascent": ("plain coordinate ascent", "^"),
    "ascent": ("ascent", "o"),
    "ascent_16_candidates": ("ascent, 16 candidates", "o"),
    "ascent_64_candidates": ("ascent, 64 candidates", "o"),
    "gradient": ("gradient, restarted", "v"),
    "random": ("random inputs", "x"),
}
"""Searches, their labels and marks."""
FRONTS = {2: [0, 32], 6: [0, 32]}
"""Neurons of blocks whose fronts are drawn."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(folder: Path, results: tuple[Path, ...]) -> None:
    """Write `searches.png` and `fronts.svg` to FOLDER."""
    strength(results, folder / "searches.png")
    svg.save(svg.standalone(fronts()), folder / "fronts.svg")


def strength(results: tuple[Path, ...], path: Path) -> None:
    """Activation and passes by search: small marks are donors, large ones their means."""
    found = defaultdict(list)
    for result in results:
        for name, row in json.loads(result.read_text())["strength"].items():
            found[name].append((row["passes"], row["activation"]))
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (name, (label, mark)) in enumerate(NAMES.items()):
        passes, activations = np.array(found[name]).T
        colour = f"C{number}"
        axis.scatter(passes, activations, s=10, alpha=0.4, color=colour, marker=mark)
        axis.scatter(
            passes.mean(), activations.mean(), s=70, color=colour, marker=mark, label=label
        )
    axis.set(
        xscale="log",
        xlabel="passes of the vocabulary per neuron",
        ylabel="activation, standard deviations of random inputs",
    )
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def fronts() -> svg.Drawing:
    """The fronts of some neurons of the demo's `base`."""
    checkpoint = open_checkpoint("frankenmerge/demo/donors/base")
    vocabulary, rows = token_texts(checkpoint), []
    for block, neurons in FRONTS.items():
        options = SearchOptions([block], neurons=neurons, tokens=6, fluent=True)
        records = feature_records(search(checkpoint, "ascent", options), vocabulary)
        rows.append([svg.titled(front_chart(each)) for each in records])
    return svg.combined(rows, "Activation and fluency of inputs of base")


if __name__ == "__main__":
    main()
