"""Can blocks of donors that never shared a basis be spliced? All single-seam splices of two donors, raw and turned.

A splice is A's blocks `[0, i)` and B's blocks `[j, L)`. Every splice is measured raw; with B's slice turned by a fit on text, and
on tokens alone (drawn from the donors themselves: no data; the fit on text sees them too); with the best signed permutation in place
of a rotation; and with a random rotation. The first half of the text is fitted on, windows of the second half are what is measured.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.analysis.turning import Shown, Turns, at_seam, fit_over_blocks, flat, refine, show, turning
from frankenmerge.architectures import quantity
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.drawing import drawn
from frankenmerge.evaluation.compare import read_text, shared_context
from frankenmerge.evaluation.language import encode
from frankenmerge.gauge import Turn, procrustes, random_turn
from frankenmerge.models import load_model, load_tokenizer, virtual_splice
from frankenmerge.recipe import Block, recipe_of

LONGEST = 128
ROWS = 256
"""Windows that are fitted on, at most: of text, and drawn from the donors."""


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option("--text", "texts", required=True, multiple=True, type=click.Path(path_type=Path), help="A text; may be repeated.")
@click.option(
    "--windows", default=16, show_default=True, help=f"Windows of at most {LONGEST} tokens that are measured, of all texts together."
)
@click.option("--joint", default=400, show_default=True, help="Steps of descent on the turns of all seams together; 0 for none.")
@click.option("--steps", default=0, show_default=True, help="Steps of descent on a seam's own turns; with neither, a plain fit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor_a: str, donor_b: str, texts: tuple[Path, ...], windows: int, joint: int, steps: int, as_json: bool) -> None:
    """Measure every single-seam splice, raw and turned."""
    checkpoints = {name: open_checkpoint(name) for name in (donor_a, donor_b)}
    models = {name: load_model(checkpoint).requires_grad_(False) for name, checkpoint in checkpoints.items()}
    a, b = models[donor_a], models[donor_b]
    tokenizer = load_tokenizer(checkpoints[donor_a])
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    length = min(LONGEST, shared_context(checkpoints.values()))
    halves = [_halves(encode(tokenizer, read_text(text).content, str(text)).ids, start, length, len(texts), windows) for text in texts]
    fitted, tested = (torch.cat(parts) for parts in zip(*halves, strict=True))
    centred = checkpoints[donor_a].architecture.norm == "layer"
    depths = [quantity(checkpoints[name].config, "blocks") or 0 for name in (donor_a, donor_b)]
    seams = [(i, j) for i in range(1, depths[0] + 1) for j in range(depths[1])]
    slices = {}
    for j in range(depths[1]):
        recipe = recipe_of([Block(donor_b, index) for index in range(j, depths[1])])
        slices[j] = virtual_splice(recipe, checkpoints, models).requires_grad_(False)

    donor_text = torch.cat([drawn(model, ROWS // 2, length, start, seed) for seed, model in enumerate((a, b))])
    shown = {"text": show(a, b, torch.cat([fitted, donor_text])), "probes": show(a, b, donor_text)}
    test = show(a, b, tested)
    near = [(i, j) for i, j in seams if i >= j - 2]
    turns = {}
    for name, seen in shown.items():
        turns[name] = refine(fit_over_blocks(seen, centred=centred), seen, slices, near, steps=joint, centred=centred) if joint else None

    def measured(i: int, j: int, turn: Turn | list[Turn]) -> float:
        chosen = turn if isinstance(turn, list) else [turn] * (depths[1] - j + 1)
        return _nats(slices[j], chosen, test.states[0][i], tested)

    splices = []
    for i, j in track(seams, "splicing", console=Console(stderr=True)):
        states = {name: [flat(seen.states[0][i]), flat(seen.states[1][j])] for name, seen in shown.items()}
        plain = {name: procrustes(of_b, of_a, centred=centred) for name, (of_a, of_b) in states.items()}
        row: dict[str, Any] = {"i": i, "j": j, "raw": measured(i, j, Turn(torch.eye(plain["text"].matrix.shape[0]).double()))}
        for name, seen in shown.items():
            row[name] = measured(i, j, _own(turns[name], plain[name], seen, slices, (i, j), steps, centred))
        row["signed_permutation"] = measured(i, j, _signed_permutation(*states["text"]))
        null = random_turn(plain["text"].matrix.shape[0], 1000 * i + j, centred=centred)
        row["random_rotation"] = measured(i, j, null._replace(scale=plain["text"].scale))
        splices.append(row)
    result = _summary([_loss(model(input_ids=tested).logits, tested) for model in (a, b)], splices, depths[1])
    click.echo(json.dumps(result)) if as_json else _print(result)


def _halves(ids: Any, start: int, length: int, texts: int, windows: int) -> tuple[Tensor, Tensor]:
    """Windows behind `start`: of the text's first half to fit on, of its second to measure; of each, a share for one of `texts`."""
    rows = torch.from_numpy(ids[1:]).unfold(0, length - 1, length - 1)
    rows = torch.cat([torch.full((len(rows), 1), start), rows], 1)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return first[: ROWS // texts], second[: windows // texts]


def _own(
    turns: Turns | None, plain: Turn, shown: Shown, slices: dict[int, PreTrainedModel], seam: tuple[int, int], steps: int, centred: bool
) -> Turn | list[Turn]:
    """A seam's turns: the plain fit, or refined ones."""
    if turns is None and not steps:
        return plain
    turns = turns or fit_over_blocks(shown, centred=centred)
    return at_seam(refine(turns, shown, slices, [seam], steps=steps, centred=centred) if steps else turns, shown, *seam)


def _signed_permutation(of_a: Tensor, of_b: Tensor) -> Turn:
    product = (of_b.double().T @ of_a.double()).numpy()
    rows, columns = linear_sum_assignment(-abs(product))
    matrix = torch.zeros(product.shape, dtype=torch.float64)
    matrix[rows, columns] = torch.from_numpy(product[rows, columns]).sign()
    return Turn(matrix, float((torch.from_numpy(product) * matrix).sum() / of_b.double().square().sum()))


@torch.no_grad()
def _nats(model: PreTrainedModel, turns: Sequence[Turn], states: Tensor, ids: Tensor) -> float:
    with turning(model, [turn.matrix.float() for turn in turns], [turn.scale for turn in turns], [states]):
        return _loss(model(input_ids=ids, use_cache=False).logits, ids)


def _loss(logits: Tensor, ids: Tensor) -> float:
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).detach())


def _summary(donors: list[float], splices: list[dict[str, Any]], depth_b: int) -> dict[str, Any]:
    worse = max(donors)
    removed = {name: statistics.median((row["raw"] - row[name]) / (row["raw"] - worse) for row in splices) for name in ("text", "probes")}
    balanced = [row for row in splices if row["i"] >= 2 and depth_b - row["j"] >= 2]
    best = {name: min(row[name] for row in balanced) for name in ("text", "probes")}
    return {
        "donor_a_nats": donors[0],
        "donor_b_nats": donors[1],
        "splices": splices,
        "median_excess_removed": removed,
        "best_balanced": best,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"Nats per token; the donors {result['donor_a_nats']:.2f} and {result['donor_b_nats']:.2f}")
    for column in result["splices"][0]:
        table.add_column(column, justify="right")
    for row in result["splices"]:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    for key in ("median_excess_removed", "best_balanced"):
        Console().print(f"{key}: " + ", ".join(f"{name} {value:.3f}" for name, value in result[key].items()))


if __name__ == "__main__":
    main()
