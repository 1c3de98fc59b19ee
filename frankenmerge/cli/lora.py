"""`extract-lora`: the difference of two checkpoints as a LoRA."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import (
    download_option,
    json_option,
    out,
    pickle_option,
    print_json,
    print_remarks,
    progress,
    size,
    table,
)
from frankenmerge.cli.from_mergekit import mergekit_options
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.merging.lora_plan import LoraOptions, LoraPlan
    from frankenmerge.workflows.extracting import Extracted

_LISTED = 24
"""Up to so many matrices are listed one by one; more are summed up by kind."""


@click.command("extract-lora")
@click.argument("model")
@click.argument("base")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--rank", "--max-rank", type=int, help="Rank of every matrix; 32 if nothing else is given."
)
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    help="Instead: for each matrix the smallest rank that keeps this share of the difference's "
    "squared norm.",
)
@click.option(
    "--error",
    type=float,
    metavar="BOUND",
    help="Instead: for each matrix the smallest rank whose error, over the difference's norm, is "
    "at most this.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Data type of the factors; reported errors include the rounding.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Torch device that multiplies; on cpu numpy does.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of large matrices.")
@click.option("--dry-run", is_flag=True, help="Check everything and report what would be written.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted extraction, and keep finished matrices if this one fails.",
)
@click.option(
    "--push-to-hub",
    metavar="REPOSITORY",
    help="Upload the adapter to a new repository of the hub, org/name.",
)
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@download_option
@pickle_option
@json_option
@mergekit_options
def extract_lora(
    model: str,
    base: str,
    output: Path,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
    cuda: bool,
    **options: Any,
) -> None:
    """Write what makes BASE into MODEL as a LoRA for peft to the new folder OUTPUT.

    Linear maps that differ become products of two thin matrices; embeddings, heads, norms and
    biases that differ are held in full. `BASE+OUTPUT` then is MODEL in recipes, as far as the rank
    allows.
    """
    from frankenmerge.merging.lora_plan import LoraOptions, compared_headers
    from frankenmerge.splicing.opening import open_named
    from frankenmerge.storage.hub import check_push, push
    from frankenmerge.workflows.extracting import extract_lora as extracted
    from frankenmerge.workflows.extracting import planned_lora

    if cuda:
        options["device"] = "cuda"
    chosen = LoraOptions(**options)
    if private and not push_to_hub:
        remedy = "name the repository, or leave --private out"
        raise fail("--private", "--push-to-hub", "none", remedy)
    if push_to_hub:
        check_push(push_to_hub)
    opening = partial(open_named, (model, base), download=download, allow_pickle=allow_pickle)
    headers = opening(weights=False)
    compared_headers(headers[model], headers[base])  # before weights are fetched
    opened = opening()
    plan = planned_lora(opened[model], opened[base], output, chosen, progress=progress)
    print_remarks(plan.remarks)
    if dry_run:
        _print_plan(plan, chosen, as_json)
        return
    result = extracted(plan, output, chosen, progress=progress)
    address = push(result.output, push_to_hub, private=private) if push_to_hub else None
    if as_json:
        also: dict[str, Any] = {"repository": address} if address else {}
        print_json(_as_json(result) | also | {"remarks": list(plan.remarks)})
        return
    _print_extracted(result)
    if address:
        out().print(f"Uploaded to {address}", markup=False)


def _as_json(result: "Extracted") -> dict[str, Any]:
    modules = [
        {"name": module.name, "rank": module.rank, "error": module.error}
        for module in result.modules
    ]
    shown = {"output": str(result.output), "tensors": result.tensors, "bytes": result.bytes}
    return shown | {"seconds": result.seconds, "modules": modules, "saved": list(result.saved)}


def _print_plan(plan: "LoraPlan", options: "LoraOptions", as_json: bool) -> None:
    from frankenmerge.merging.lora_files import saved_kinds
    from frankenmerge.merging.lora_writer import least_bytes

    found = {
        "matrices": len(plan.maps),
        "saved": list(plan.saved_modules),
        "biases": [pair.name for pair in plan.biases],
        "bytes" if options.fixed_rank else "least_bytes": least_bytes(plan, options),
    }
    if as_json:
        print_json(found | {"remarks": list(plan.remarks)})
        return
    made = table("The LoRA can be extracted. It has:", "", "")
    made.add_row("matrices as factors", str(len(plan.maps)))
    made.add_row("modules in full", ", ".join(saved_kinds(plan.saved_modules)) or "none")
    made.add_row("biases", str(len(plan.biases)))
    least = "" if options.fixed_rank else "at least "
    made.add_row("weights", f"{least}{size(least_bytes(plan, options))}")
    out().print(made)


def _print_extracted(result: "Extracted") -> None:
    from frankenmerge.merging.lora_files import by_kind, saved_kinds, total_error

    console, modules = out(), result.modules
    if len(modules) > _LISTED:
        made = table("Relative error", "map", "matrices", "rank", "mean", "largest")
        for row in by_kind(modules):
            shown = row.kind, str(row.count), row.ranks, f"{row.mean:.3g}", f"{row.largest:.3g}"
            made.add_row(*shown)
        console.print(made)
    else:
        made = table("Relative error", "matrix", "rank", "error")
        for module in sorted(modules, key=lambda module: -module.error):
            made.add_row(module.name, str(module.rank), f"{module.error:.3g}")
        console.print(made)
    if result.saved:
        console.print(f"Held in full: {', '.join(saved_kinds(result.saved))}", markup=False)
    left = f"{total_error(modules):.3g} of the maps' difference is left out; "
    rate = f"{size(result.bytes)} in {result.seconds:.1f} s"
    console.print(f"{result.output}: {result.tensors} tensors; {left}{rate}", markup=False)
