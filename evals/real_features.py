"""The source document's questions about features (see docs/method.md), asked of any real Llama.

Are features aligned across layers? Is the first greedy token the same in all blocks? Does the
trained model differ from an untrained one? Of every figure the null is printed: permuted neurons,
random weights of the same config, and what the residual stream alone explains.

Greedy inputs are built from a sample of the vocabulary, in which are the best tokens of the
features: the first token is that of all the vocabulary, the others are the best of the sample.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from frankenmerge.analysis.align import probe_correlation, top_jaccard
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.artefacts.atlas import Atlas, TopTokens
from frankenmerge.artefacts.token_overlap import token_agreement
from frankenmerge.cli.console import numbers
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.models.loading import load_model, untrained_model
from frankenmerge.workflows.atlases import atlas_of

SHALLOW = 12
"""Up to this block the document finds the first greedy token to be the same."""
LLAMA_7B: dict[int, tuple[str, str, str, str]] = {
    1: ("Hein", "cyl", "inf", "travers"),
    4: ("</s>", "cyl", "character", "</s>"),
    8: ("</s>", "cyl", "</s>", "</s>"),
    12: ("</s>", "cyl", "character", "</s>"),
    16: ("1", " dataframe", "</s>", "</s>"),
    20: ("</s>", " Cés", " .=", "�"),
    24: ("</s>", "aussian", "</s>", "1"),
}
"""First tokens of the document's greedy inputs of features 0 to 3, by block."""
GREEDY, FEATURES = 4, 4
"""Tokens of a greedy input, and the features that are searched: the document's."""
RESAMPLES = 2000


class Best(NamedTuple):
    """The best tokens of a model."""

    name: str
    tokens: np.ndarray
    """`[blocks, d]`: of every neuron of every chosen block."""


def best_tokens(atlas: Atlas, blocks: Sequence[int], name: str, context: str = "plain") -> Best:
    return Best(name, atlas.top[context].tokens[list(blocks), :, 0])


def at_blocks(atlas: Atlas, blocks: Sequence[int]) -> Atlas:
    """An atlas of these blocks alone."""
    chosen = list(blocks)
    top = {name: TopTokens(*(part[chosen] for part in each)) for name, each in atlas.top.items()}
    return replace(
        atlas, top=top, probes=atlas.probes[chosen], probe_scale=atlas.probe_scale[chosen]
    )


def agreement(best: Best) -> tuple[np.ndarray, np.ndarray]:
    """Whether each neuron has the same token in two blocks, `[b, b, d]`, and for other neurons."""
    found = token_agreement(best.tokens[..., None], best.tokens[..., None])
    return found.detail, found.permuted


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over neurons."""
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pairs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours, and the first with the last."""
    return [*zip(range(len(blocks) - 1), range(1, len(blocks)), strict=True), (0, len(blocks) - 1)]


def layers(
    trained: Atlas, untrained: Sequence[Atlas], blocks: Sequence[int]
) -> list[dict[str, Any]]:
    """Agreement of pairs of blocks of the same model, trained and untrained, with the nulls."""
    own, null = agreement(best_tokens(trained, blocks, "trained"))
    bos = agreement(best_tokens(trained, blocks, "bos", "bos"))[0] if "bos" in trained.top else None
    others = np.mean([agreement(best_tokens(each, blocks, ""))[0] for each in untrained], axis=0)
    width = trained.width
    here = at_blocks(trained, blocks)
    jaccard, correlation = (
        score(here, here, "plain", width) for score in (top_jaccard, probe_correlation)
    )
    control = [
        probe_correlation(each, each, "plain", width)
        for each in (at_blocks(atlas, blocks) for atlas in untrained)
    ]
    rows = []
    for i, j in pairs_of(blocks):
        pair = i, j
        low, high = interval(own[i, j] - others[i, j])
        rows.append(
            {
                "blocks": (blocks[i], blocks[j]),
                "same token": float(own[i, j].mean()),
                "after BOS": None if bos is None else float(bos[i, j].mean()),
                "untrained": float(others[i, j].mean()),
                "permuted neurons": float(null[i, j]),
                "trained minus untrained": [low, high],
                "top 10 (Jaccard)": float(jaccard.matrix[pair]),
                "Jaccard, permuted": float(jaccard.nulls["permuted_neurons"][pair]),
                "correlation": float(correlation.matrix[pair]),
                "residual law": float(correlation.nulls["residual_law"][pair]),
                "correlation, untrained": float(np.mean([each.matrix[pair] for each in control])),
                "residual law, untrained": float(
                    np.mean([each.nulls["residual_law"][pair] for each in control])
                ),
            }
        )
    return rows


def same_first(best: Best, blocks: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Share of neurons whose best token is the same in all of some blocks, and of other neurons."""
    generator = np.random.default_rng(seed)
    found: dict[str, Any] = {"model": best.name}
    shallow = sum(block <= SHALLOW for block in blocks)
    for name, count in (("shallow", shallow), ("all", len(blocks))):
        tokens = best.tokens[:count]
        same = (tokens == tokens[0]).all(axis=0)
        permuted = [
            np.stack([row[generator.permutation(len(row))] for row in tokens]) for _ in range(20)
        ]
        null = np.mean([(each == each[0]).all(axis=0).mean() for each in permuted])
        found[name] = {
            "share": float(same.mean()),
            "interval": interval(same.astype(float)),
            "permuted neurons": float(null),
        }
    tokens, counts = np.unique(best.tokens, return_counts=True)
    found["distinct"] = len(tokens)
    found["commonest"] = [
        [int(token), int(count)]
        for count, token in sorted(zip(counts, tokens, strict=True), reverse=True)[:3]
    ]
    return found


def document_row() -> dict[str, Any]:
    """The same of the document's Llama-7b, of its four features."""
    columns = list(zip(*LLAMA_7B.values(), strict=True))
    shallow = sum(block <= SHALLOW for block in LLAMA_7B)
    return {
        "shallow": sum(len(set(column[:shallow])) == 1 for column in columns),
        "shallow without the first": sum(len(set(column[1:shallow])) == 1 for column in columns),
        "all": sum(len(set(column)) == 1 for column in columns),
        "neighbours": [
            sum(a == b for a, b in zip(LLAMA_7B[i], LLAMA_7B[j], strict=True))
            for i, j in zip(list(LLAMA_7B), list(LLAMA_7B)[1:], strict=False)
        ],
    }


def greedy(
    model: PreTrainedModel, best: Best, blocks: Sequence[int], sample: int, seed: int
) -> np.ndarray:
    """Greedy inputs `[blocks, features, n]` of a sample of the vocabulary, as its tokens."""
    chosen = np.random.default_rng(seed).choice(model.config.vocab_size, sample, replace=False)
    tokens = np.union1d(chosen, best.tokens[:, :FEATURES])
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight.detach()[torch.from_numpy(tokens)].clone()
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    features = [Feature.of(block, neuron) for block in blocks for neuron in range(FEATURES)]
    found = greedy_search(model, features, n=GREEDY).tokens
    return tokens[found].reshape(len(blocks), FEATURES, GREEDY)


def later_tokens(found: np.ndarray) -> list[dict[str, float]]:
    """By position: how often two blocks have the same token for a feature, and for another one."""
    rows = []
    for position in range(found.shape[2]):
        tokens = found[:, :, position, None]
        overlap = token_agreement(tokens, tokens)
        pairs = np.triu_indices(len(found), 1)
        rows.append(
            {
                "same token": float(overlap.matrix[pairs].mean()),
                "other features": float(overlap.permuted[pairs].mean()),
            }
        )
    return rows


def measured(
    checkpoint: Checkpoint, blocks: list[int], seeds: Sequence[int], sample: int
) -> dict[str, Any]:
    """Everything that is printed."""
    trained = atlas_of(checkpoint)
    untrained = [atlas_of(checkpoint, untrained=seed) for seed in seeds]
    bests = [best_tokens(trained, blocks, "trained")]
    if "bos" in trained.top:
        bests.append(best_tokens(trained, blocks, "trained, after BOS", "bos"))
    bests += [
        best_tokens(each, blocks, f"untrained, seed {seed}")
        for seed, each in zip(seeds, untrained, strict=True)
    ]
    words = trained.vocabulary
    found = {
        "model": checkpoint.name,
        "blocks": blocks,
        "neurons": trained.width,
        "layers": layers(trained, untrained, blocks),
        "first": [same_first(best, blocks) for best in bests],
        "document": document_row(),
        "complete": {
            best.name: [[words[token] for token in row[:FEATURES]] for row in best.tokens]
            for best in bests
        },
    }
    if sample:
        models = {"trained": lambda: load_model(checkpoint)}
        models |= {
            f"untrained, seed {seed}": lambda seed=seed: untrained_model(checkpoint, seed)
            for seed in seeds[:1]
        }
        named = {best.name: best for best in bests}
        inputs = {
            name: greedy(load(), named[name], blocks, sample, 0) for name, load in models.items()
        }
        found["greedy"] = {
            name: {
                "inputs": [
                    [[words[token] for token in tokens] for tokens in block] for block in each
                ],
                "positions": later_tokens(each),
            }
            for name, each in inputs.items()
        }
    for each in found["first"]:
        each["commonest"] = [[words[token], count] for token, count in each["commonest"]]
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(*found["layers"][0], title="Features of two blocks of one model", box=None)
    for row in found["layers"]:
        table.add_row(*map(_cell, row.values()))
    console.print(table)
    table = Table(
        *(
            "",
            f"to block {SHALLOW}",
            "95 %",
            "permuted",
            "all blocks",
            "95 %",
            "permuted",
            "commonest",
        ),
        title="The same best token in several blocks: share of neurons",
        box=None,
    )
    for row in found["first"]:
        cells = [_cell(value) for part in ("shallow", "all") for value in row[part].values()]
        common = ", ".join(f"{word!r} {count}" for word, count in row["commonest"])
        table.add_row(row["model"], *cells, common)
    console.print(table)
    console.print(f"The document's Llama-7b, of four features: {found['document']}")
    for name, rows in found["complete"].items():
        table = Table("block", *map(str, range(FEATURES)), title=f"Best tokens, {name}", box=None)
        for block, cells in zip(found["blocks"], rows, strict=True):
            table.add_row(str(block), *map(repr, cells))
        console.print(table)
    for name, each in found.get("greedy", {}).items():
        table = Table("block", *map(str, range(FEATURES)), title=f"Greedy inputs, {name}", box=None)
        for block, cells in zip(found["blocks"], each["inputs"], strict=True):
            table.add_row(str(block), *(repr("".join(cell)) for cell in cells))
        console.print(table)
        console.print(f"By position: {each['positions']}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_cell, value))
    return "" if value is None else str(value)


@click.command()
@click.argument("donor", type=click.Path(path_type=Path))
@click.option(
    "--blocks",
    callback=numbers,
    default="1,4,8,12,16,20,24",
    show_default=True,
    help="Blocks, counted from 1.",
)
@click.option(
    "--untrained",
    "seeds",
    type=int,
    multiple=True,
    default=(0,),
    show_default=True,
    help="Seed of random weights, the control. May be repeated.",
)
@click.option(
    "--sample",
    default=256,
    show_default=True,
    help="Tokens of the vocabulary for greedy inputs; 0 for none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor: Path, blocks: list[int], seeds: tuple[int, ...], sample: int, as_json: bool
) -> None:
    """Print the tables for DONOR."""
    found = measured(open_checkpoint(str(donor)), blocks, seeds, sample)
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found, Console(width=200, highlight=False))


if __name__ == "__main__":
    main()
