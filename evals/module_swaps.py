"""Do scores of single maps predict what exchanging a single linear map costs?

Every linear map of A's block `i` is replaced by the same map of B's block `i`, `i - 1` and `i + 1`,
and the loss on a text measured, as well as the divergence from A's own predictions. Scores are
computed on random tokens, as those of `align`, and no exchanged model is run for them: "stream
after the block" is the score of `align --modules`. Prints
Spearman's rho of every score with minus the loss and with minus the divergence. Usage:

    python evals/module_swaps.py --donor-a A --donor-b B --text FILE [--text FILE]
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from frankenmerge.analysis.align import align
from frankenmerge.analysis.modules import module_scores
from frankenmerge.analysis.probes import random_probes
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import blocks_of, embedding_of
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.models.passes import enter, run_block
from frankenmerge.workflows.atlases import atlas_of

ROWS, LENGTH = 8, 128
"""Windows of the texts, and tokens in each."""
RESAMPLES = 1000
GROUPS = {"same block": {0}, "off by one": {-1, 1}, "all": {-1, 0, 1}}
"""By the difference between the two blocks' indices."""


class Swap(NamedTuple):
    """A's map of one block, replaced by B's of another."""

    name: str
    block: int
    other: int


class Measured(NamedTuple):
    """What the exchanges did, and what every score says, all `[swaps]`."""

    loss: np.ndarray
    """Nats per token above A's own."""
    divergence: np.ndarray
    """From A's own predictions, nats per token."""
    scores: dict[str, np.ndarray]


def maps_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a block by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def swaps_of(a: nn.ModuleList, b: nn.ModuleList) -> list[Swap]:
    """Every map, with those of blocks that are at most one away."""
    return [
        Swap(name, block, other)
        for block in range(len(a))
        for other in (block - 1, block, block + 1)
        for name in maps_of(a[block])
        if 0 <= other < len(b)
    ]


@contextmanager
def exchanged(a: nn.ModuleList, b: nn.ModuleList, swap: Swap) -> Iterator[None]:
    """A with one map of B's within the context."""
    path, _, last = swap.name.rpartition(".")
    parent = a[swap.block].get_submodule(path)
    own = getattr(parent, last)
    setattr(parent, last, b[swap.other].get_submodule(swap.name))
    try:
        yield
    finally:
        setattr(parent, last, own)


class Recorded(NamedTuple):
    """A donor on the probes, without their first positions."""

    inputs: dict[tuple[str, int], Tensor]
    """Of every map, `[n, in]`."""
    outputs: dict[tuple[str, int], Tensor]
    """`[n, out]`."""
    states: list[Tensor]
    """What enters every block, `[b, s, d]`."""
    calls: list
    """Every block's other arguments."""


@torch.no_grad()
def recorded(model, ids: Tensor) -> Recorded:
    """Run a donor, and keep what enters and leaves every map."""
    inputs, outputs, handles = {}, {}, []

    def keep(key: tuple[str, int], _module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs[key] = args[0][:, 1:].flatten(0, 1)
        outputs[key] = output[:, 1:].flatten(0, 1)

    for index, block in enumerate(blocks_of(model)):
        for name, module in maps_of(block).items():
            handles.append(module.register_forward_hook(partial(keep, (name, index))))
    states, calls = enter(model, ids)
    entering = [states]
    for block, call in zip(blocks_of(model), calls, strict=True):
        entering.append(run_block(block, entering[-1], call))
    for handle in handles:
        handle.remove()
    return Recorded(inputs, outputs, entering, calls)


def correlation(x: Tensor, y: Tensor) -> float:
    """Mean over indices of the correlation over probes of `[n, d]` with `[n, d]`."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    size = (x.norm(dim=0) * y.norm(dim=0)).clamp_min(1e-12)
    return ((x * y).sum(dim=0) / size).mean().item()


def nearness(x: Tensor, y: Tensor) -> float:
    """One minus the relative error, a mean over probes `[..., d]`."""
    size = (x.norm(dim=-1) * y.norm(dim=-1)).sqrt().clamp_min(1e-12)
    return 1 - ((x - y).norm(dim=-1) / size).mean().item()


@torch.no_grad()
def scores_of(a, b, swap: Swap, of_a: Recorded, of_b: Recorded) -> dict[str, float]:
    """Every score of one exchange; 1 is full agreement."""
    name, block, other = swap
    mine, theirs = (blocks_of(model) for model in (a, b))
    own = mine[block].get_submodule(name)
    guest = theirs[other].get_submodule(name)
    x = of_a.inputs[name, block]
    found = {
        "weight cosine": torch.cosine_similarity(
            own.weight.flatten(), guest.weight.flatten(), dim=0
        ).item(),
        "map's inputs": correlation(x, of_b.inputs[name, other]),
        "map's outputs": correlation(of_a.outputs[name, block], of_b.outputs[name, other]),
        "outputs on A's inputs": nearness(of_a.outputs[name, block], guest(x)),
    }
    found["map's inputs and outputs"] = (found["map's inputs"] + found["map's outputs"]) / 2
    before, after = of_a.states[block], of_a.states[block + 1]
    with exchanged(mine, theirs, swap):
        changed = run_block(mine[block], before, of_a.calls[block])
    found["block's write on A's inputs"] = nearness(
        (after - before)[:, 1:], (changed - before)[:, 1:]
    )
    return found


@torch.no_grad()
def measured(a, b, swaps: list[Swap], text: Tensor, scores: dict[str, np.ndarray]) -> Measured:
    """Run A with every exchange on `text` `[rows, length]`."""
    mine, theirs = (blocks_of(model) for model in (a, b))

    def predictions() -> tuple[float, Tensor]:
        logits = a(input_ids=text, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss = -logits.gather(2, text[:, 1:, None]).mean().item()
        return loss, logits

    own_loss, own = predictions()
    losses, divergences = [], []
    for swap in swaps:
        with exchanged(mine, theirs, swap):
            loss, changed = predictions()
        losses.append(loss - own_loss)
        divergences.append((own.exp() * (own - changed)).sum(-1).mean().item())
    return Measured(np.array(losses), np.array(divergences), scores)


def rho(score: np.ndarray, cost: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rho with minus the cost, and its 95 % interval over exchanges."""
    random = np.random.default_rng(0)
    value = spearmanr(score, -cost).statistic
    resampled = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(cost), len(cost))
        resampled.append(spearmanr(score[rows], -cost[rows]).statistic)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(value), float(low), float(high)


@click.command()
@click.option("--donor-a", required=True, help="The donor whose maps are replaced.")
@click.option("--donor-b", required=True, help="The donor of the replacements.")
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures here.")
def main(donor_a: str, donor_b: str, texts: tuple[Path, ...], output: Path | None) -> None:
    """Measure every exchange and print how well each score ranks them."""
    torch.set_num_threads(1)
    donors = [open_checkpoint(name) for name in (donor_a, donor_b)]
    a, b = (load_model(donor) for donor in donors)
    ids = torch.from_numpy(random_probes(len(embedding_of(a))))
    of_a, of_b = recorded(a, ids), recorded(b, ids)
    swaps = swaps_of(blocks_of(a), blocks_of(b))
    scores = defaultdict(list)
    blocks = align(*(atlas_of(donor) for donor in donors)).scores
    modules = module_scores(a, b)
    for swap in swaps:
        row = modules.names.index(swap.name)
        own = modules.replacement[0][row, swap.block, swap.other]
        scores["stream after the block"].append(own)
        for name, value in scores_of(a, b, swap, of_a, of_b).items():
            scores[name].append(value)
        for name in ("correlation", "jaccard", "relative_error", "influence"):
            scores[f"block's input: {name}"].append(blocks[name].matrix[swap.block, swap.other])
            after = blocks[name].matrix[swap.block + 1, swap.other + 1]
            scores[f"block's output: {name}"].append(after)
    tokenizer = load_tokenizer(donors[0])
    share = ROWS // len(texts)
    lines = [torch.tensor(tokenizer.encode(path.read_text("utf-8"))) for path in texts]
    text = torch.cat([line[: share * LENGTH].reshape(share, LENGTH) for line in lines])
    found = measured(a, b, swaps, text, {k: np.array(v) for k, v in scores.items()})
    result = tables(found, swaps)
    printed = Table(title=f"{Path(donor_a).name} with maps of {Path(donor_b).name}")
    columns = [(group, cost) for group in GROUPS for cost in ("loss", "divergence")]
    for column in ("score", *(f"{group}, {cost}" for group, cost in columns)):
        printed.add_column(column, justify="left" if column == "score" else "right")
    for name in found.scores:
        cells = (result[group][cost].get(name) for group, cost in columns)
        printed.add_row(name, *("" if c is None else f"{c[0]:.2f}" for c in cells))
    Console(width=180).print(printed)
    if output:
        output.write_text(
            json.dumps(
                {
                    "rho": result,
                    "swaps": swaps,
                    "loss": found.loss.tolist(),
                    "divergence": found.divergence.tolist(),
                    "scores": {name: values.tolist() for name, values in found.scores.items()},
                }
            )
        )


def tables(found: Measured, swaps: list[Swap]) -> dict[str, dict[str, dict[str, tuple]]]:
    """Rho with its interval by group, cost and score; groups where a score is constant lack it."""
    result: dict = {}
    for group, apart in GROUPS.items():
        chosen = np.array([swap.other - swap.block in apart for swap in swaps])
        result[group] = {
            cost: {
                name: rho(values[chosen], getattr(found, cost)[chosen])
                for name, values in found.scores.items()
                if np.ptp(values[chosen]) > 1e-6
            }
            for cost in ("loss", "divergence")
        }
    return result


if __name__ == "__main__":
    main()
