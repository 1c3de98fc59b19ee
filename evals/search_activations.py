"""How close do gradient searches come to the top-activating token of a neuron?

The activation for the single token of each search is compared with those of all tokens of the
vocabulary: 0 is their mean, the expected result of a random token, and 1 their maximum, which
complete search finds. Measure on neurons that no setting was chosen on.
"""

import json
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.prior import prior_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.loading import load_model

PRIORS = {
    (1.0, 1.0): (0.01, 0.1, 1.0),
    (0.1, 0.1): (10.0,),
    (0.03, 0.03): (0.2, 0.4),
    (0.01, 0.01): (0.1, 1.0),
    (0.05, 0.02): (0.2,),
    (0.1, 0.01): (0.3, 0.1),
}
"""Temperatures of the softmax at the first and the last step, each with the steps tried."""


def relative_activations(model: PreTrainedModel) -> np.ndarray:
    """Activations for single tokens, `[l+1, d, v]`: 0 is the vocabulary's mean, 1 its best."""
    every = complete_search(model, k=len(embedding_of(model)))
    values = np.empty_like(every.values)
    np.put_along_axis(values, every.tokens.astype(np.int64), every.values, axis=2)
    mean = values.mean(axis=2, keepdims=True)
    return (values - mean) / (values.max(axis=2, keepdims=True) - mean)


@click.command()
@click.option(
    "--donor",
    default="frankenmerge/demo/donors/base",
    show_default=True,
    help="A donor's folder or hub id.",
)
@click.option("--first", default=64, show_default=True, help="The first neuron.")
@click.option("--last", default=127, show_default=True, help="The last neuron.")
@click.option(
    "--block",
    "blocks",
    default=(1, 4, 8),
    show_default=True,
    multiple=True,
    help="A block, 1-based; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor: str, first: int, last: int, blocks: tuple[int, ...], as_json: bool) -> None:
    """Measure the searches on a range of neurons of each block."""
    checkpoint = open_checkpoint(donor)
    model = load_model(checkpoint)
    relative = relative_activations(model)
    features = [Feature.of(block, neuron) for block in blocks for neuron in range(first, last + 1)]

    def by_block(values: Any) -> list[float]:
        return np.asarray(values, dtype=np.float64).reshape(len(blocks), -1).mean(axis=1).tolist()

    def row(search: str, tokens: Tensor, gap: Tensor | None = None) -> dict[str, Any]:
        values = [
            relative[feature.block, feature.neuron, token]
            for feature, (token,) in zip(features, tokens.tolist(), strict=True)
        ]
        return {
            "search": search,
            "excitement": by_block(values),
            "gap": None if gap is None else by_block(gap),
        }

    rows = [
        row(
            f"embedding gradient, {name}",
            gradient_search(model, features, tokens=1, optimizer=name).tokens,
        )
        for name in ("descent", "adam")
    ]
    settings = [(temperatures, step) for temperatures, steps in PRIORS.items() for step in steps]
    for temperatures, step in track(settings, "searching", console=Console(stderr=True)):
        found = prior_search(model, features, tokens=1, temperatures=temperatures, step=step)
        rows.append(
            row(
                f"prior, temperature {temperatures[0]} to {temperatures[1]}, step {step}",
                found.tokens,
                found.gap,
            )
        )
    origin = {"donor": checkpoint.fingerprint, "neurons": [first, last], "blocks": blocks}
    if as_json:
        click.echo(json.dumps({"searches": rows, "made": origin}))
        return
    table = Table(
        "search",
        *(f"block {block}" for block in blocks),
        "1 - max(a)",
        title=f"Relative activation: {donor}, neurons {first} to {last}",
    )
    for each in rows:
        gaps = "" if each["gap"] is None else ", ".join(f"{gap:.3f}" for gap in each["gap"])
        table.add_row(each["search"], *(f"{value:.2f}" for value in each["excitement"]), gaps)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
