"""How excited do the gradient searches leave a neuron? Each one's single token, against all tokens of the vocabulary.

0 is the vocabulary's mean, what a random token gives, and 1 its best token, what complete search
finds. Measure on neurons that no setting was chosen on.
"""

import json

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
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


def excitement(model: PreTrainedModel) -> np.ndarray:
    """`[l+1, d, v]`: 0 for the vocabulary's mean, 1 for its best token."""
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
    help="A block; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor: str, first: int, last: int, blocks: tuple[int, ...], as_json: bool) -> None:
    """Measure the searches on some neurons of some blocks."""
    checkpoint = open_checkpoint(donor)
    model = load_model(checkpoint)
    reached = excitement(model)
    features = [Feature.of(block, neuron) for block in blocks for neuron in range(first, last + 1)]

    def by_block(values) -> list[float]:
        return np.asarray(values, dtype=np.float64).reshape(len(blocks), -1).mean(axis=1).tolist()

    def told(search: str, tokens, gap=None) -> dict:
        values = [
            reached[feature.block, feature.neuron, token]
            for feature, (token,) in zip(features, tokens.tolist(), strict=True)
        ]
        return {
            "search": search,
            "excitement": by_block(values),
            "gap": None if gap is None else by_block(gap),
        }

    rows = [
        told(
            f"embedding gradient, {name}",
            gradient_search(model, features, tokens=1, optimizer=name).tokens,
        )
        for name in ("descent", "adam")
    ]
    settings = [(temperatures, step) for temperatures, steps in PRIORS.items() for step in steps]
    for temperatures, step in track(settings, "searching", console=Console(stderr=True)):
        found = prior_search(model, features, tokens=1, temperatures=temperatures, step=step)
        rows.append(
            told(
                f"prior, temperature {temperatures[0]} to {temperatures[1]}, step {step}",
                found.tokens,
                found.gap,
            )
        )
    made = {"donor": checkpoint.fingerprint, "neurons": [first, last], "blocks": blocks}
    if as_json:
        click.echo(json.dumps({"searches": rows, "made": made}))
        return
    table = Table(
        "search",
        *(f"block {block}" for block in blocks),
        "1 - max(a)",
        title=f"{donor}, neurons {first} to {last}",
    )
    for row in rows:
        gaps = "" if row["gap"] is None else ", ".join(f"{gap:.3f}" for gap in row["gap"])
        table.add_row(row["search"], *(f"{value:.2f}" for value in row["excitement"]), gaps)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
