"""Time the searches, each compared with its baseline, alternately in one run.

Every section is a function of the options that returns its figures; `SECTIONS` names them. Times
are medians over the rounds, ratios are medians of the ratios in each round, so that other load
affects both alike. Complete search and dtypes are measured on a random GPT-2 of the `--shape`,
gradient search on a random Llama (the time does not depend on the weights), greedy search on the
`--donor`, because the number of prefixes that its features share depends on its weights. `strength`
compares what the searches find on the `--donor`, not their times.
"""

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from search_strength import strength
from search_timing import (
    LISTING_BATCH,
    SEED,
    SHAPES,
    Options,
    in_turns,
    random_features,
    random_model,
    ratio,
    seconds,
)
from transformers import PreTrainedModel

from frankenmerge.analysis.complete import BATCH, complete_search
from frankenmerge.analysis.decode import decoder_of, embedding_table
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import Tokens, greedy_search
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import backbone, block_outputs, blocks_of, embedding_of, forward
from frankenmerge.models.loading import Placement, load_model

K, SCREEN_K, LENGTH, CANDIDATES, STEPS = 10, 32, 4, 64, 10


def complete(options: Options) -> dict[str, Any]:
    """Complete search of all features.

    Its baselines are the bare forward pass over the same tokens, and the listing of the source
    document (see docs/method.md).
    """
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
    # A pass ends after the feature's block, so that its time is linear in depth: the mean over all
    # blocks is that of the first and the last one.
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
    """Run the model without its head over single tokens, in the search's batches."""
    for batch in torch.arange(tokens, device=embedding_of(model).device).split(BATCH):
        backbone(model)(input_ids=batch[:, None], use_cache=False)


@torch.no_grad()
def listing(model: PreTrainedModel, feature: Feature, tokens: int) -> int:
    """Run one step of the source document's listing for one feature.

    It collects activations one by one in a list.
    """
    activations = []
    with block_outputs(model, last=feature.block) as states:
        for batch in torch.arange(tokens, device=embedding_of(model).device).split(LISTING_BATCH):
            forward(model, input_ids=batch[:, None])
            activations += states[feature.block][:, -1, feature.neuron].flatten()
    return int(torch.argmax(torch.tensor(activations)))


def peak_extra_mb(options: Options) -> float | None:
    """The peak memory of a complete search beyond the weights, in a process of its own.

    On the CPU that is the peak of the resident set, reset before the search; None if the system
    does not record it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        extra = fresh.submit(extra_bytes, options).result()
    return None if extra is None else extra / 1e6


def extra_bytes(options: Options) -> int | None:
    """The same in bytes, in this process."""
    torch.set_num_threads(options.threads)
    model = random_model(options.shape.gpt2, options.device)
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
        complete_search(model, k=K)
        return torch.cuda.max_memory_allocated(options.device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    except OSError:
        return None
    before = resident("VmRSS")
    complete_search(model, k=K)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes from a line such as `VmHWM:  1234 kB`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def greedy(options: Options) -> dict[str, Any]:
    """Greedy search of four tokens for many features, with and without caching prefixes."""
    model = load_model(open_checkpoint(options.donor), Placement(device=options.device))
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
    """Greedy search that runs every input from its first token.

    All else is the same: features whose inputs have the same prefix share their passes, which end
    at the deepest block needed.
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
    """Gradient search for neurons of the last block, five tokens each: in one batch and one by one.

    The results of both are compared.
    """
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
    """Complete search in bfloat16, with candidates scored again in float32, and in float32 alone.

    Measured on random weights and on the donor's.
    """
    models = {
        "random": random_model(options.shape.gpt2, options.device),
        "donor": load_model(open_checkpoint(options.donor), Placement(device=options.device)),
    }
    return {name: rescored(model, options) for name, model in models.items()}


def rescored(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The share of features whose best token differs from float32's, before and after rescoring."""
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
    "strength": strength,
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
    help="Size of the random models; tiny is for a quick test.",
)
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(list(SECTIONS)),
    help="What to measure; may be repeated. [default: all]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of times that everything is timed.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Number of CPU threads."
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
    """Figures by name; those of a part have its name as a prefix."""
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
