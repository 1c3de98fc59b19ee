"""Measure what was planted in donors of the zoo: a repeat, and a pair to exchange blocks.

Usage: `python evals/zoo/planted.py --donors DIR --text DIR`. Prints one JSON object: for `looped`,
its loss and the change for each window of blocks run once more; for `early` and `late`, the losses
of both, of every exchange early[0:i] + late[i:], and of their mean. Losses are nats per token on
rows of 128 tokens; the change of the loss is negative where the window helps.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch
from corpus import KINDS, SKILLS, Document
from train import encode, loss_on, unrolled
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: Path):
    """A donor in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lines_of(donor: Path, text: Path, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The token ids of `text/KIND.txt` for each kind."""
    tokenizer = AutoTokenizer.from_pretrained(donor)
    return {
        kind: encode(
            tokenizer, [Document(kind, kind, (text / f"{kind}.txt").read_text("utf-8"), True)]
        )
        for kind in kinds
    }


def losses(model, lines: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats per token of each text, and their mean."""
    each = {kind: loss_on(model, line) for kind, line in lines.items()}
    return {
        kind: round(loss, 4) for kind, loss in {**each, "mean": np.mean([*each.values()])}.items()
    }


def repeats(donors: Path, text: Path) -> dict:
    """The loss of `looped`, and its change for every window run once more."""
    model = load(donors / "looped")
    lines = lines_of(donors / "looped", text, KINDS)
    depth = model.config.num_hidden_layers
    plain, windows = losses(model, lines), {}
    for start in range(depth):
        for stop in range(start + 1, depth + 1):
            with unrolled(model, (start, stop), 2):
                repeated = losses(model, lines)
            windows[f"{start}:{stop}"] = {
                kind: round(repeated[kind] - plain[kind], 4) for kind in plain
            }
    return {"looped": plain, "repeated": windows}


def exchanges(donors: Path, text: Path) -> dict:
    """The losses of `early`, `late`, their exchanges at every boundary and their mean."""
    early, late = load(donors / "early"), load(donors / "late")
    lines = lines_of(donors / "early", text, (*SKILLS, *KINDS))
    skills = {kind: lines[kind] for kind in SKILLS}
    ordinary = {kind: lines[kind] for kind in KINDS}

    def measured(model) -> dict[str, dict[str, float]]:
        return {"skills": losses(model, skills), "ordinary": losses(model, ordinary)}

    found = {"base": measured(load(donors / "base")), "early": measured(early)}
    found["late"] = measured(late)
    mean = load(donors / "early")
    for ours, theirs in zip(mean.parameters(), late.parameters(), strict=True):
        ours.data.lerp_(theirs.data, 0.5)
    found["mean of both"] = measured(mean)
    exchange = load(donors / "late")
    for index in range(early.config.num_hidden_layers):
        exchange.model.layers[index] = early.model.layers[index]
        boundary = index + 1
        found[f"early[0:{boundary}] + late[{boundary}:]"] = measured(exchange)
    return found


@click.command()
@click.option("--donors", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--only",
    type=click.Choice(["repeats", "exchanges"]),
    help="Measure only these. [default: both]",
)
def main(donors: Path, text: Path, only: str | None) -> None:
    """Measure the planted donors in DONORS on the held-out texts in TEXT."""
    torch.set_num_threads(1)
    found = {}
    if only != "exchanges":
        found["repeats"] = repeats(donors, text)
    if only != "repeats":
        found["exchanges"] = exchanges(donors, text)
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
