"""Bits per byte of a model with another's tokenizer, by every approximation and by mergekit.

The donor's tokenizer and embedding are all that is used of it; texts are only measured on.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import click
from mergekit_peer import checked_run, peer_version

from frankenmerge.artefacts.recipe import transplant_recipe
from frankenmerge.artefacts.recipe_schema import Approximation
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text, read_text
from frankenmerge.splicing.resolve import resolve
from frankenmerge.workflows.transplanting import measured, tokens_of


@click.command()
@click.option("--model", required=True, help="The model that gets another tokenizer.")
@click.option("--donor", required=True, help="The donor of the tokenizer.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text; may be repeated.",
)
@click.option("--anchors", default=16, show_default=True, help="Tokens that one is combined from.")
@click.option(
    "--peer", type=click.Path(path_type=Path), help="An environment with mergekit; without it ours."
)
def main(model: str, donor: str, texts: tuple[Path, ...], anchors: int, peer: Path | None) -> None:
    """Print one JSON object."""
    read = [read_text(text) for text in texts]
    donors = {name: open_checkpoint(name) for name in (model, donor)}
    found: dict[str, list[float]] = {}
    before: list[float] = []
    counts: dict[str, int] = {}
    for approximation in get_args(Approximation):
        splice = resolve(transplant_recipe(model, donor, approximation, anchors), donors)
        measures = measured(splice, read)
        before = [each.before for each in measures]
        found[approximation] = [each.after for each in measures]
        if approximation == "pieces":
            counts = tokens_of(splice)._asdict()
    if peer:
        for name, options in {"default": [], "as many": ["--k", str(anchors)]}.items():
            found[f"mergekit, {name}"] = _peer(model, donor, read, peer / "bin", options)
    version = peer_version(peer / "bin" / "python") if peer else None
    click.echo(
        json.dumps(
            {
                "model": model,
                "donor": donor,
                "tokens": counts,
                "texts": [text.name for text in read],
                "own": before,
                "bits_per_byte": found,
                "mergekit": version,
            }
        )
    )


def _peer(
    model: str, donor: str, texts: list[Text], binaries: Path, options: list[str]
) -> list[float]:
    with TemporaryDirectory() as folder:
        output = str(Path(folder) / "out")
        checked_run([binaries / "mergekit-tokensurgeon", model, donor, output, "--quiet", *options])
        bench = Bench(texts, {output: open_checkpoint(output)})
        return [loss.bits_per_byte for loss in bench.checkpoint(output).losses.values()]


if __name__ == "__main__":
    main()
