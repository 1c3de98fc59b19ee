"""Does the predicted damage rank exchanges of single modules? Beside what is simpler.

Every module of a donor is replaced by that of the other donor's block of the same index, or of the
next or previous one, and the loss is measured on a text and as the divergence on sampled tokens.
Prints Spearman's rho of every score with both, over all linear maps, over attentions and MLPs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.modules import module_calls, module_damage
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.models.sampling import sample_unprompted

WINDOW, ROWS = 128, 16


class Swap(NamedTuple):
    """A module of the first donor's block `i`, replaced by that of the second's block `j`."""

    i: int
    j: int
    path: str


Values = Mapping[Swap, float]


@contextmanager
def swapped(host: PreTrainedModel, guest: PreTrainedModel, swap: Swap) -> Iterator[None]:
    """The host with one module of the guest."""
    parent, _, name = swap.path.rpartition(".")
    holder = blocks_of(host)[swap.i].get_submodule(parent)
    own = getattr(holder, name)
    setattr(holder, name, blocks_of(guest)[swap.j].get_submodule(swap.path))
    try:
        yield
    finally:
        setattr(holder, name, own)


@torch.no_grad()
def loss_on(model: PreTrainedModel, ids: Tensor) -> float:
    """Nats per token of a text in windows."""
    losses = [float(model(input_ids=rows, labels=rows).loss) * len(rows) for rows in ids.split(16)]
    return sum(losses) / len(ids)


@torch.no_grad()
def predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log probabilities `[b, s, v]`."""
    return model(input_ids=ids).logits.log_softmax(-1)


def weight_distances(
    host: PreTrainedModel, guest: PreTrainedModel, swaps: list[Swap]
) -> dict[Swap, float]:
    """One minus the cosine of the weights of linear maps."""
    found: dict[Swap, float] = {}
    for swap in swaps:
        one, other = (
            blocks_of(model)[index].get_submodule(swap.path)
            for model, index in ((host, swap.i), (guest, swap.j))
        )
        if isinstance(one, nn.Linear | Conv1D):
            weights = [each.state_dict()["weight"].flatten() for each in (one, other)]
            found[swap] = 1 - float(torch.cosine_similarity(*weights, dim=0))
    return found


@torch.no_grad()
def boundary_errors(
    host: PreTrainedModel, guest: PreTrainedModel, swaps: list[Swap], ids: Tensor
) -> dict[str, dict[Swap, float]]:
    """How different inputs and outputs of two modules are in their own donors, relative."""
    paths = sorted({swap.path for swap in swaps})
    with module_calls(blocks_of(host), paths) as own:
        host(input_ids=ids)
    with module_calls(blocks_of(guest), paths) as other:
        guest(input_ids=ids)
    inputs: dict[Swap, float] = {}
    outputs: dict[Swap, float] = {}
    for swap in swaps:
        one, two = own[swap.i, swap.path], other[swap.j, swap.path]
        inputs[swap] = float((one.input - two.input).norm() / one.input.norm())
        outputs[swap] = float((one.output - two.output).norm() / one.output.norm())
    return {"inputs in both donors": inputs, "outputs in both donors": outputs}


def rho(score: Values, target: Values, swaps: list[Swap]) -> float:
    found: Any = spearmanr([score[each] for each in swaps], [target[each] for each in swaps])
    return float(found.statistic)


@click.command()
@click.option("--donor-a", required=True, help="The donor whose modules are replaced.")
@click.option("--donor-b", required=True, help="The donor that the modules are from.")
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--characters", default=4000, show_default=True, help="Of every text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str, donor_b: str, texts: tuple[Path, ...], characters: int, as_json: bool
) -> None:
    """Exchange all modules of one index, or one apart, and compare with what was predicted."""
    donors = [open_checkpoint(name) for name in (donor_a, donor_b)]
    host, guest = (load_model(donor) for donor in donors)
    tokenizer = load_tokenizer(donors[0])
    content = [text.read_text(encoding="utf-8")[:characters] for text in texts]
    tokens = [
        token
        for each in content
        for token in tokenizer(each, add_special_tokens=False, verbose=False).input_ids
    ]
    ids = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
    sampled = torch.cat([sample_unprompted(model, ROWS) for model in (host, guest)])
    tables = module_damage(host, guest, sampled)
    swaps = [
        Swap(i, j, path)
        for path, table in tables.items()
        if path
        for i, j in np.argwhere(np.isfinite(table)).tolist()
        if donor_a != donor_b or i != j
    ]
    before, own = loss_on(host, ids), predictions(host, sampled)
    on_text: dict[Swap, float] = {}
    divergence: dict[Swap, float] = {}
    for swap in swaps:
        with swapped(host, guest, swap):
            on_text[swap] = loss_on(host, ids) - before
            found = predictions(host, sampled)
            divergence[swap] = float((own.exp() * (own - found)).sum(-1).mean())
    alignment = align(*(analyze(donor) for donor in donors))
    scores: dict[str, Values] = {
        "predicted damage": {swap: float(tables[swap.path][swap.i, swap.j]) for swap in swaps},
        "of the whole block": {swap: float(tables[""][swap.i, swap.j]) for swap in swaps},
        "weights' cosine": weight_distances(host, guest, swaps),
        **boundary_errors(host, guest, swaps, sampled),
    }
    for name in ("correlation", "influence", "neighbours", "jaccard"):
        matrix = alignment.scores[name].matrix
        scores[f"block: {name}"] = {swap: -float(matrix[swap.i, swap.j]) for swap in swaps}
    maps = [swap for swap in swaps if swap in scores["weights' cosine"]]
    groups = {
        "maps": maps,
        "maps of one index": [swap for swap in maps if swap.i == swap.j],
        "maps one apart": [swap for swap in maps if swap.i != swap.j],
        "attentions and MLPs": [swap for swap in swaps if swap not in maps],
    }
    result = {
        group: {
            name: {
                "text": rho(score, on_text, chosen),
                "divergence": rho(score, divergence, chosen),
            }
            for name, score in scores.items()
            if chosen and chosen[0] in score
        }
        for group, chosen in groups.items()
        if len(chosen) > 3
    }
    if as_json:
        click.echo(json.dumps({"a": donor_a, "b": donor_b, "spearman": result}))
        return
    for group, found in result.items():
        chosen = groups[group]
        costs = [on_text[swap] for swap in chosen]
        title = f"{group}: {len(chosen)} exchanges, {min(costs):+.3f} to {max(costs):+.3f} nats"
        printed = Table(title=f"Spearman's rho, {title}")
        for column in ("score", "loss on text", "divergence on sampled tokens"):
            printed.add_column(column, justify="left" if column == "score" else "right")
        for name, each in found.items():
            printed.add_row(name, *(f"{value:.2f}" for value in each.values()))
        Console().print(printed)


if __name__ == "__main__":
    main()
