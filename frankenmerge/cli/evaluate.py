"""`evaluate`: checkpoints and recipes on text, beside their donors."""

from pathlib import Path

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
        print_json({"models": told, "dtype": dtype, "context": bench.context, "texts": [str(text) for text in texts]})
        return
    out().print(results_table(results, "On text (bits per byte; lower is better)"))
    out().print(f"Windows of {bench.context} tokens, {dtype}.")


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
