"""Can blocks of donors that never shared a basis be spliced? Single-seam splices of two donors, raw and rotated.

A splice is A's blocks `[0, i)` and B's blocks `[j, L)`, stacked as a recipe stacks them. Every
splice is measured raw; with B's slice rotated as a recipe's gauge rotations it, on text and on tokens
alone (drawn from the donors themselves: no data; the fit on text sees them too); with the best
signed permutation in place of a rotation; and with a random rotation. The first half of the text is
fitted on, windows from the end of the second half are what is measured.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.compare import read_text, shared_context
from frankenmerge.evaluation.language import encode
from frankenmerge.models.hooks import block_outputs, forward
from frankenmerge.models.loading import load_model, load_tokenizer, virtual_splice
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.splicing.gauge_fitting import SAMPLED_LENGTH, SAMPLED_ROWS, Fit
from frankenmerge.splicing.gauge_refining import Shown, refined
from frankenmerge.splicing.rotation import Rotation, procrustes, random_rotation


class Seen(NamedTuple):
    """What both donors made of the same tokens."""

    ids: Tensor
    """`[n, s]`"""
    states: tuple[list[Tensor], list[Tensor]]
    """A's and B's residual stream before the first block and behind every block, `[n, s, d]` each.
    """


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text; may be repeated.",
)
@click.option(
    "--windows",
    default=16,
    show_default=True,
    help=f"Windows of at most {SAMPLED_LENGTH} tokens that are measured, of all texts together.",
)
@click.option(
    "--refine",
    default=300,
    show_default=True,
    help="Steps of descent on the rotations of every splice; 0 for a plain fit.",
)
@click.option(
    "--maps",
    default="rotations",
    show_default=True,
    type=click.Choice(["rotations", "linear"]),
    help="What descent may reach.",
)
@click.option(
    "--splices",
    "count",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="How many of all splices are measured, evenly taken; refining one takes about a minute on two cores.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    windows: int,
    refine: int,
    maps: str,
    count: int,
    as_json: bool,
) -> None:
    """Measure single-seam splices, raw and rotated."""
    checkpoints = {name: open_checkpoint(name) for name in (donor_a, donor_b)}
    models = {
        name: load_model(checkpoint).requires_grad_(False)
        for name, checkpoint in checkpoints.items()
    }
    a, b = models[donor_a], models[donor_b]
    tokenizer = load_tokenizer(checkpoints[donor_a])
    start: Any = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    length = min(SAMPLED_LENGTH, shared_context(checkpoints.values()))
    halves = [
        _halves(
            encode(tokenizer, read_text(text).content, str(text)).ids,
            start,
            length,
            len(texts),
            windows,
        )
        for text in texts
    ]
    fitted, tested = (torch.cat(parts) for parts in zip(*halves, strict=True))
    donor_text = torch.cat(
        [sample_tokens(model, SAMPLED_ROWS // 2, length, start, seed) for seed, model in enumerate((a, b))]
    )
    seen = {"text": _seen(a, b, torch.cat([donor_text, fitted])), "probes": _seen(a, b, donor_text)}
    centred = checkpoints[donor_a].architecture.norm == "layer"
    depths = [checkpoints[name].blocks for name in (donor_a, donor_b)]
    whole = [(i, j) for i in range(1, depths[0] + 1) for j in range(depths[1])]
    seams = [
        whole[index]
        for index in np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)
    ]
    gauge = {"to": "previous"} | ({"refine": refine, "maps": maps} if refine else {})

    def measured(recipe: Recipe, fit: Fit) -> float:
        return _loss(virtual_splice(recipe, checkpoints, models, {1: fit}), tested)

    splices = []
    for i, j in track(seams, "splicing", console=Console(stderr=True)):
        recipe, raw = (
            _recipe((donor_a, 0, i), (donor_b, j, depths[1]), gauge=told) for told in (gauge, None)
        )
        row: dict[str, Any] = {
            "i": i,
            "j": j,
            "raw": _loss(virtual_splice(raw, checkpoints, models), tested),
        }
        plain = {}
        for name, shown in seen.items():
            plain[name] = procrustes(
                *(
                    _flat(states[depth])
                    for states, depth in zip(shown.states[::-1], (j, i), strict=True)
                ),
                centred=centred,
            )
            fit = Fit(plain[name], 0.0)
            if refine:
                last = {
                    donor: states[-1]
                    for donor, states in zip((donor_a, donor_b), shown.states, strict=True)
                }
                fit = fit._replace(
                    refined=refined(
                        recipe, checkpoints, models, {1: plain[name]}, Shown(shown.ids, last)
                    )[1]
                )
            row[name] = measured(recipe, fit)
        of_a, of_b = _flat(seen["text"].states[0][i]), _flat(seen["text"].states[1][j])
        row["signed_permutation"] = measured(recipe, Fit(_signed_permutation(of_a, of_b), 0.0))
        null = random_rotation(of_a.shape[1], 1000 * i + j, centred=centred)
        row["random_rotation"] = measured(
            recipe, Fit(null._replace(scale=plain["text"].scale), 0.0)
        )
        splices.append(row)
    result = _summary([_loss(model, tested) for model in (a, b)], splices, depths[1])
    click.echo(json.dumps(result)) if as_json else _print(result)


def _recipe(*parts: tuple[str, int, int], gauge: dict[str, Any] | None) -> Recipe:
    slices: list[dict] = [
        {"sources": [{"model": model, "layer_range": [start, stop]}]}
        for model, start, stop in parts
    ]
    slices[-1]["gauge"] = gauge
    return Recipe.model_validate({"slices": slices, "merge_method": "passthrough"})


@torch.no_grad()
def _seen(a: PreTrainedModel, b: PreTrainedModel, ids: Tensor) -> Seen:
    states = []
    for model in (a, b):
        with block_outputs(model) as outputs:
            forward(model, input_ids=ids)
            states.append(list(outputs))
    return Seen(ids, (states[0], states[1]))


def _flat(states: Tensor) -> Tensor:
    """`[n, s, d]` as `[n * (s - 1), d]`, without every row's first position."""
    return states[:, 1:].flatten(0, 1)


def _halves(ids: Any, start: int, length: int, texts: int, windows: int) -> tuple[Tensor, Tensor]:
    """Windows behind `start`: of the text's first half to fit on, of its end to measure; of each, a share for one of `texts`."""
    rows = torch.from_numpy(ids[1:]).unfold(0, length - 1, length - 1)
    rows = torch.cat([torch.full((len(rows), 1), start), rows], 1)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return first[: SAMPLED_ROWS // texts], second[-(windows // texts) :]


def _signed_permutation(of_a: Tensor, of_b: Tensor) -> Rotation:
    product = (of_b.double().T @ of_a.double()).numpy()
    rows, columns = linear_sum_assignment(-abs(product))
    matrix = torch.zeros(product.shape, dtype=torch.float64)
    matrix[rows, columns] = torch.from_numpy(product[rows, columns]).sign()
    return Rotation(
        matrix, float((torch.from_numpy(product) * matrix).sum() / of_b.double().square().sum())
    )


@torch.no_grad()
def _loss(model: PreTrainedModel, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits
    return float(
        functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    )


def _summary(donors: list[float], splices: list[dict[str, Any]], depth_b: int) -> dict[str, Any]:
    worse = max(donors)
    removed = {
        name: statistics.median((row["raw"] - row[name]) / (row["raw"] - worse) for row in splices)
        for name in ("text", "probes")
    }
    balanced = [row for row in splices if row["i"] >= 2 and depth_b - row["j"] >= 2]
    best = {
        name: min((row[name] for row in balanced), default=math.nan) for name in ("text", "probes")
    }
    return {
        "donor_a_nats": donors[0],
        "donor_b_nats": donors[1],
        "splices": splices,
        "median_excess_removed": removed,
        "best_balanced": best,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(
        title=f"Nats per token; the donors {result['donor_a_nats']:.2f} and {result['donor_b_nats']:.2f}"
    )
    for column in result["splices"][0]:
        table.add_column(column, justify="right")
    for row in result["splices"]:
        table.add_row(
            *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)
    for key in ("median_excess_removed", "best_balanced"):
        Console().print(
            f"{key}: " + ", ".join(f"{name} {value:.3f}" for name, value in result[key].items())
        )


if __name__ == "__main__":
    main()
