"""How much faster the searches are than doing without their shortcuts, measured side by side in one run.

Every section is a function of a donor that returns its figures; `SECTIONS` names them. Times are medians over the rounds,
ratios medians of the rounds' own ratios, so that a load that comes and goes falls on both sides.
"""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import BATCH, Tokens, greedy_search
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.models import block_outputs, blocks_of, embedding_of, forward, load_model

FEATURES, LENGTH, CANDIDATES, SEED = 64, 4, 64, 0


def random_features(model: PreTrainedModel, count: int) -> list[Feature]:
    generator = random.Random(SEED)
    blocks, width = len(blocks_of(model)), embedding_of(model).shape[1]
    return [Feature.of(generator.randint(1, blocks), generator.randrange(width)) for _ in range(count)]


@torch.no_grad()
def uncached_greedy(model: PreTrainedModel, features: Sequence[Feature]) -> list[Tokens]:
    """Greedy search that runs every input from its first token on.

    All else is the same: features whose inputs begin alike share their passes, which end at the deepest block needed.
    """
    found: list[Tokens] = [()] * len(features)
    vocabulary = torch.arange(embedding_of(model).shape[0])
    for _ in range(LENGTH):
        for prefix in dict.fromkeys(found):
            rows = [row for row, tokens in enumerate(found) if tokens == prefix]
            scores = []
            with block_outputs(model, last=max(features[row].block for row in rows)) as states:
                for tokens in vocabulary.split(BATCH):
                    before = torch.tensor(prefix, dtype=torch.long).expand(len(tokens), -1)
                    forward(model, input_ids=torch.cat([before, tokens[:, None]], dim=1))
                    scores.append(torch.stack([states[features[row].block][:, -1, features[row].neuron] for row in rows]))
            for row, best in zip(rows, torch.cat(scores, dim=1).argmax(dim=1).tolist(), strict=True):
                found[row] = (*prefix, best)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def greedy(model: PreTrainedModel, rounds: int) -> dict[str, float]:
    features = random_features(model, FEATURES)
    work: dict[str, Callable[[], Any]] = {
        "exact": lambda: greedy_search(model, features, n=LENGTH),
        "uncached": lambda: uncached_greedy(model, features),
        "screened": lambda: greedy_search(model, features, n=LENGTH, candidates=CANDIDATES),
        "one_pass": lambda: complete_search(model),
    }
    runs = [{name: timed(run) for name, run in work.items()} for _ in range(rounds)]

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(run[slow][1] / run[fast][1] for run in runs)

    (exact, _), (uncached, _), (screened, _), _ = runs[0].values()
    prefixes = sum(exact.prefixes)
    return {
        "speedup_over_uncached": ratio("uncached", "exact"),
        "recall": screened.recall,
        "unique_prefixes": prefixes,
        "exact_s": statistics.median(run["exact"][1] for run in runs),
        "over_complete_search_per_prefix": ratio("exact", "one_pass") / prefixes,
        "same_inputs_as_uncached": statistics.mean(
            tuple(ours) == theirs for ours, theirs in zip(exact.tokens.tolist(), uncached, strict=True)
        ),
        "speedup_of_screen": ratio("exact", "screened"),
        "tokens_found_by_screen": float((screened.tokens == exact.tokens)[:, 1:].mean()),
    }


SECTIONS: dict[str, Callable[[PreTrainedModel, int], dict[str, float]]] = {"greedy": greedy}


@click.command()
@click.option("--donor", default="frankenmerge/demo/donors/base", show_default=True, help="A donor's folder or hub id.")
@click.option(
    "--section", "sections", multiple=True, type=click.Choice(list(SECTIONS)), help="What to measure; may be repeated; all by default."
)
@click.option("--rounds", default=3, show_default=True, help="How often everything is timed.")
@click.option("--threads", default=1, show_default=True, help="Of the processor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor: str, sections: tuple[str, ...], rounds: int, threads: int, as_json: bool) -> None:
    """Time the searches on one donor."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(donor)
    model = load_model(checkpoint)
    measured = {name: SECTIONS[name](model, rounds) for name in sections or SECTIONS}
    made = {
        "donor": checkpoint.fingerprint,
        "features": FEATURES,
        "tokens": LENGTH,
        "candidates": CANDIDATES,
        "seed": SEED,
        "rounds": rounds,
        "threads": threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    if as_json:
        click.echo(json.dumps(measured | {"made": made}))
        return
    table = Table("search", "figure", "value", title=f"{checkpoint.name}, {rounds} rounds, {threads} threads")
    for section, figures in measured.items():
        for name, value in figures.items():
            table.add_row(section, name, f"{value:.3g}")
    Console().print(table)


if __name__ == "__main__":
    main()
