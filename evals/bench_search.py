"""How fast the searches are, each beside what it is to be measured by, in turns within one run.

Every section is a function of the options that returns its figures; `SECTIONS` names them. Times
are medians over the rounds, ratios medians of the rounds' own ratios, so that a load that comes and
goes falls on both sides. Complete search and dtypes are measured on a random GPT-2 of the
`--shape`, gradient search on a random Llama (the time does not depend on the weights), greedy
search on the `--donor`, whose weights say how many prefixes its features share.
"""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from frankenmerge.analysis.complete import BATCH, complete_search
from frankenmerge.analysis.decode import decoder_of, embedding_table
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import Tokens, greedy_search
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import backbone, block_outputs, blocks_of, embedding_of, forward
from frankenmerge.models.loading import load_model

K, SCREEN_K, LENGTH, CANDIDATES, STEPS, SEED = 10, 32, 4, 64, 10, 0
LISTING_BATCH = 1000
"""The batch of the document's listing."""


class Shape(NamedTuple):
    """How large the random models and the searches are."""

    gpt2: dict[str, Any]
    llama: dict[str, Any]
    features: int
    """Of the greedy and the gradient search."""
    listed: int
    """How many tokens the document's listing is timed on."""


SHAPES = {
    "small": Shape(
        gpt2={
            "model_type": "gpt2"
        },  # whose defaults are GPT-2 small: 12 blocks, 768 wide, 50,257 tokens
        llama={
            "model_type": "llama",
            "hidden_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 352,
            "vocab_size": 1024,
            "max_position_embeddings": 128,
        },
        features=64,
        listed=4 * LISTING_BATCH,
    ),
    "tiny": Shape(
        gpt2={
            "model_type": "gpt2",
            "n_layer": 3,
            "n_embd": 16,
            "n_head": 2,
            "vocab_size": 300,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        llama={
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 64,
            "max_position_embeddings": 32,
        },
        features=8,
        listed=100,
    ),
}


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    donor: str
    shape: Shape
    rounds: int
    threads: int
    device: str


Run = dict[str, tuple[Any, float]]
"""What each piece of work returned in one round, and its seconds."""


def in_turns(work: Mapping[str, Callable[[], Any]], options: Options) -> list[Run]:
    """Time every piece of work once a round, one after the other, in turns forwards and backwards."""
    return [
        {
            name: timed(work[name], options.device)
            for name in list(work)[:: 1 if number % 2 == 0 else -1]
        }
        for number in range(options.rounds)
    ]


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def seconds(runs: list[Run], name: str) -> float:
    return statistics.median(run[name][1] for run in runs)


def ratio(runs: list[Run], slow: str, fast: str) -> float:
    return statistics.median(run[slow][1] / run[fast][1] for run in runs)


def random_model(fields: Mapping[str, Any], device: str) -> PreTrainedModel:
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(device).eval()


def random_features(model: PreTrainedModel, count: int) -> list[Feature]:
    generator = random.Random(SEED)
    blocks, width = len(blocks_of(model)), embedding_of(model).shape[1]
    return [
        Feature.of(generator.randint(1, blocks), generator.randrange(width)) for _ in range(count)
    ]


def complete(options: Options) -> dict[str, Any]:
    """Every block and neuron, beside the bare forward pass over the same tokens and beside the document's own listing."""
    model = random_model(options.shape.gpt2, options.device)
    blocks, (vocabulary, width) = len(blocks_of(model)), embedding_of(model).shape
    listed = min(options.shape.listed, vocabulary)
    work: dict[str, Callable[[], Any]] = {
        "ours": lambda: complete_search(model, k=K),
        "bare": lambda: bare_forward(model, vocabulary),
        "first": lambda: listing(model, Feature.of(1, 0), listed),
        "last": lambda: listing(model, Feature.of(blocks, width - 1), listed),
        "whole": lambda: complete_search(model, k=K, shortcut=False),
    }
    bare_forward(model, min(BATCH, vocabulary))  # warms up
    runs = in_turns(work, options)
    # A pass ends behind the feature's block, so that its time grows evenly with depth: the mean of
    # both ends is that of all.
    per_feature = [(run["first"][1] + run["last"][1]) / 2 * vocabulary / listed for run in runs]
    per_table = [
        each * blocks * width / run["ours"][1] for each, run in zip(per_feature, runs, strict=True)
    ]
    return {
        "ours_s": seconds(runs, "ours"),
        "bare_forward_s": seconds(runs, "bare"),
        "ours_over_bare": ratio(runs, "ours", "bare"),
        "document_listing_s_per_feature": statistics.median(per_feature),
        "document_listing_tokens_timed": listed,
        "document_listing_over_ours": statistics.median(per_table),
        "peak_extra_mb": peak_extra_mb(options),
        "values_only_saves": 1 - 1 / ratio(runs, "whole", "ours"),
        "blocks": blocks,
        "width": width,
        "tokens": vocabulary,
    }


@torch.no_grad()
def bare_forward(model: PreTrainedModel, tokens: int) -> None:
    """Run the model without its head over single tokens, in the search's batches, looking at nothing."""
    for batch in torch.arange(tokens, device=embedding_of(model).device).split(BATCH):
        backbone(model)(input_ids=batch[:, None], use_cache=False)


@torch.no_grad()
def listing(model: PreTrainedModel, feature: Feature, tokens: int) -> int:
    """Take one step of the document's listing for one feature: its activations are gathered one by one in a list."""
    activations = []
    with block_outputs(model, last=feature.block) as states:
        for batch in torch.arange(tokens, device=embedding_of(model).device).split(LISTING_BATCH):
            forward(model, input_ids=batch[:, None])
            activations += states[feature.block][:, -1, feature.neuron].flatten()
    return int(torch.argmax(torch.tensor(activations)))


def peak_extra_mb(options: Options) -> float | None:
    """The memory beyond the weights that a complete search takes at its peak, in a process of its own.

    On the processor the resident set's high water mark, reset before the search; None where the
    system keeps none.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        extra = fresh.submit(extra_bytes, options).result()
    return None if extra is None else extra / 1e6


def extra_bytes(options: Options) -> int | None:
    torch.set_num_threads(options.threads)
    model = random_model(options.shape.gpt2, options.device)
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
        complete_search(model, k=K)
        return torch.cuda.max_memory_allocated(options.device) - before
    try:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # sets the high water mark to what is resident now
    except OSError:
        return None
    before = resident("VmRSS")
    complete_search(model, k=K)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes, of a line such as `VmHWM:  1234 kB`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def greedy(options: Options) -> dict[str, Any]:
    """Four tokens for many features, beside running every input from its first token on."""
    model = load_model(open_checkpoint(options.donor), device=options.device)
    features = random_features(model, options.shape.features)
    work: dict[str, Callable[[], Any]] = {
        "exact": lambda: greedy_search(model, features, n=LENGTH),
        "uncached": lambda: uncached_greedy(model, features),
        "screened": lambda: greedy_search(model, features, n=LENGTH, candidates=CANDIDATES),
        "one_pass": lambda: complete_search(model),
    }
    runs = in_turns(work, options)
    exact, uncached, screened = (runs[0][name][0] for name in ("exact", "uncached", "screened"))
    prefixes = sum(exact.prefixes)
    return {
        "speedup_over_uncached": ratio(runs, "uncached", "exact"),
        "recall": screened.recall,
        "unique_prefixes": prefixes,
        "exact_s": seconds(runs, "exact"),
        "over_complete_search_per_prefix": ratio(runs, "exact", "one_pass") / prefixes,
        "same_inputs_as_uncached": statistics.mean(
            tuple(ours) == theirs
            for ours, theirs in zip(exact.tokens.tolist(), uncached, strict=True)
        ),
        "speedup_of_screen": ratio(runs, "exact", "screened"),
        "tokens_found_by_screen": float((screened.tokens == exact.tokens)[:, 1:].mean()),
    }


@torch.no_grad()
def uncached_greedy(model: PreTrainedModel, features: Sequence[Feature]) -> list[Tokens]:
    """Greedy search that runs every input from its first token on.

    All else is the same: features whose inputs begin alike share their passes, which end at the
    deepest block needed.
    """
    found: list[Tokens] = [()] * len(features)
    device = embedding_of(model).device
    vocabulary = torch.arange(embedding_of(model).shape[0], device=device)
    for _ in range(LENGTH):
        for prefix in dict.fromkeys(found):
            rows = [row for row, tokens in enumerate(found) if tokens == prefix]
            scores = []
            with block_outputs(model, last=max(features[row].block for row in rows)) as states:
                for tokens in vocabulary.split(BATCH):
                    before = torch.tensor(prefix, dtype=torch.long, device=device).expand(
                        len(tokens), -1
                    )
                    forward(model, input_ids=torch.cat([before, tokens[:, None]], dim=1))
                    scores.append(
                        torch.stack(
                            [
                                states[features[row].block][:, -1, features[row].neuron]
                                for row in rows
                            ]
                        )
                    )
            for row, best in zip(
                rows, torch.cat(scores, dim=1).argmax(dim=1).tolist(), strict=True
            ):
                found[row] = (*prefix, best)
    return found


def gradient(options: Options) -> dict[str, Any]:
    """Neurons of the last block, five tokens each, all in one batch beside one at a time, and how far the results lie apart."""
    model = random_model(options.shape.llama, options.device)
    features = [
        Feature(len(blocks_of(model)), range(neuron, neuron + 1))
        for neuron in range(options.shape.features)
    ]
    decoder = decoder_of(embedding_table(model), excluded=None)

    def search(batch: int) -> torch.Tensor:
        return gradient_search(
            model, features, steps=STEPS, batch=batch, decoder=decoder
        ).embeddings

    search(len(features))  # warms up
    runs = in_turns(
        {"together": lambda: search(len(features)), "alone": lambda: search(1)}, options
    )
    return {
        "speedup_over_single": ratio(runs, "alone", "together"),
        "batched_s": seconds(runs, "together"),
        "single_s": seconds(runs, "alone"),
        "largest_difference": (runs[0]["together"][0] - runs[0]["alone"][0]).abs().max().item(),
    }


def dtype(options: Options) -> dict[str, Any]:
    """Complete search in bfloat16, its candidates scored again in float32, beside float32 alone; random weights and a donor's."""
    models = {
        "random": random_model(options.shape.gpt2, options.device),
        "donor": load_model(open_checkpoint(options.donor), device=options.device),
    }
    return {name: rescored(model, options) for name, model in models.items()}


def rescored(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The share of all features of all blocks whose best token differs from float32's, after the screen and after rescoring."""
    half = deepcopy(model).bfloat16()
    vocabulary = embedding_of(model).shape[0]

    def screened() -> tuple[TopTokens, TopTokens, int]:
        screen = complete_search(half, k=SCREEN_K)
        union = np.unique(screen.tokens)
        return (
            screen,
            complete_search(model, k=1, masked=np.setdiff1d(np.arange(vocabulary), union).tolist()),
            len(union),
        )

    runs = in_turns({"exact": lambda: complete_search(model, k=1), "screened": screened}, options)
    exact, (screen, again, union) = runs[0]["exact"][0], runs[0]["screened"][0]

    def differ(found: TopTokens) -> float:
        return float((found.tokens[1:, :, 0] != exact.tokens[1:, :, 0]).mean())

    return {
        "differ_before_rescoring": differ(screen),
        "differ_after_rescoring": differ(again),
        "candidates_rescored": union,
        "of_tokens": vocabulary,
        "float32_s": seconds(runs, "exact"),
        "screened_s": seconds(runs, "screened"),
        "speedup_over_float32": ratio(runs, "exact", "screened"),
    }


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "complete": complete,
    "greedy": greedy,
    "gradient": gradient,
    "dtype": dtype,
}


@click.command()
@click.option(
    "--donor",
    default="frankenmerge/demo/donors/base",
    show_default=True,
    help="A donor's folder or hub id.",
)
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    default="small",
    show_default=True,
    help="Of the random models; tiny is a quick try.",
)
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(list(SECTIONS)),
    help="What to measure; may be repeated; all by default.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="How often everything is timed.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Of the processor."
)
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor: str,
    shape: str,
    sections: tuple[str, ...],
    rounds: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Time the searches."""
    torch.set_num_threads(threads)
    options = Options(donor, SHAPES[shape], rounds, threads, device)
    try:
        fingerprint = open_checkpoint(donor).fingerprint
        measured = {name: SECTIONS[name](options) for name in sections or SECTIONS}
    except FrankenmergeError as error:
        raise click.ClickException(str(error)) from error
    made = {
        "donor": fingerprint,
        "shape": shape,
        "k": K,
        "screen_k": SCREEN_K,
        "features": options.shape.features,
        "tokens": LENGTH,
        "candidates": CANDIDATES,
        "gradient_steps": STEPS,
        "seed": SEED,
        "rounds": rounds,
        "threads": threads,
        "device": device,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if as_json:
        click.echo(json.dumps(measured | {"made": made}))
        return
    table = Table(
        "search", "figure", "value", title=f"{shape}, {rounds} rounds, {threads} threads, {device}"
    )
    for section, figures in measured.items():
        for name, value in flat(figures):
            table.add_row(section, name, "-" if value is None else f"{value:.3g}")
    Console().print(table)


def flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float | None]]:
    """Figures by name, those of a part behind its own."""
    return [
        pair
        for name, value in figures.items()
        for pair in (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else [(f"{prefix}{name}", value)]
        )
    ]


if __name__ == "__main__":
    main()
