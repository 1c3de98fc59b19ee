"""`evaluate`: checkpoints and recipes on text, beside their donors."""

import json
from pathlib import Path
from typing import NamedTuple

import click
from rich.table import Table

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    max_memory_option,
    offload_option,
    out,
    pickle_option,
    print_json,
    progress,
    table,
)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL|RECIPE...")
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path), help="A UTF-8 text file; may be repeated.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window. [default: what every model was made for, at most 2048]")
@device_option
@max_memory_option
@offload_option
@dtype_option
@download_option
@pickle_option
@json_option
def evaluate(
    models: tuple[str, ...], texts: tuple[Path, ...], context: int | None, device: str, max_memory: dict | None, offload: Path | None,
    dtype: str, download: bool, allow_pickle: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure how well MODELS predict text. A recipe is run as a virtual splice: nothing is written.

    Every donor of a recipe is measured beside it.
    """
    from frankenmerge.evaluation.compare import compare, read_text

    shown = [read_text(text) for text in texts]
    with progress("evaluating", None, "tokens") as advance:
        results, bench = compare(
            models, shown, context=context, dtype=dtype, device=device, max_memory=max_memory, offload=offload, download=download,
            allow_pickle=allow_pickle, progress=advance,
        )  # fmt: skip
    if as_json:
        told = [
            {"name": result.name, "role": result.role, **result.total.as_json(),
             "texts": {name: loss.as_json() for name, loss in result.losses.items()}}
            for result in results
        ]  # fmt: skip
        promises = [promise._asdict() for promise in kept_promises(results)]
        print_json(
            {"models": told, "predictions": promises, "dtype": dtype, "context": bench.context, "texts": [str(text) for text in texts]}
        )
        return
    out().print(results_table(results, "On text (bits per byte; lower is better)"))
    out().print(f"Windows of {bench.context} tokens, {dtype}.")
    for promise in kept_promises(results):
        verdict = "the prediction held" if promise.held else "the prediction did not hold"
        around = f"{promise.predicted:.3f} ({promise.low:.3f} to {promise.high:.3f}) nats per token above its donors"
        out().print(f"{Path(promise.recipe).name}: predicted {around}, measured {promise.measured:.3f}: {verdict}.")


class Promise(NamedTuple):
    """What a plan predicted of a recipe, and what was measured."""

    recipe: str
    predicted: float
    low: float
    high: float
    measured: float
    held: bool


def kept_promises(results) -> list[Promise]:
    """Hold recipes against the evidence files in their folders, where one tells of them."""
    from frankenmerge.planning.prediction import donor_loss
    from frankenmerge.recipe import load_recipe

    losses = {result.name: result.total.nats_per_token for result in results if result.role != "recipe"}
    promises = []
    for result in (result for result in results if result.role == "recipe"):
        recipe = load_recipe(Path(result.name))
        if told := _foretold(Path(result.name).parent, str(recipe)):
            measured = result.total.nats_per_token - donor_loss(recipe.blocks, losses)
            low, high = told["interval"]
            promises.append(Promise(result.name, told["predicted_damage"], low, high, measured, low <= measured <= high))
    return promises


def _foretold(folder: Path, summary: str) -> dict | None:
    for path in sorted(folder.glob("*.evidence.json")):
        try:
            plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
            return next(entry for entry in plans if entry["summary"] == summary and "interval" in entry)
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            continue  # another program's file, or another recipe's evidence: nothing is foretold there
    return None


def results_table(results, title: str) -> Table:
    """Results as a table: bits per byte for every text, then the totals."""
    several = len(results[0].losses) > 1
    columns = [Path(name).stem for name in results[0].losses] if several else []
    made = table(title, "model", *columns, "bits/byte", "perplexity", "nats/token", "tokens")
    for result in results:
        total = result.total
        cells = [f"{loss.bits_per_byte:.3f}" for loss in result.losses.values()] if several else []
        name = f"{Path(result.name).name} (donor)" if result.role == "donor" else Path(result.name).name
        made.add_row(
            name, *cells, f"{total.bits_per_byte:.3f}", f"{total.perplexity:,.1f}", f"{total.nats_per_token:.3f}", f"{total.tokens:,}"
        )
    return made
