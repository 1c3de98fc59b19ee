"""`align`, `check` and `merge`: from donors to a checkpoint."""

import re
from pathlib import Path

import click

from frankenmerge.cli.console import device_option, download_option, dtype_option, json_option, out, print_json, progress, size, table
from frankenmerge.cli.donors import atlas_of
from frankenmerge.processes import own_share


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the alignment goes, NAME.alignment.safetensors."
)
@click.option("--bos/--no-bos", default=False, show_default=True, help="Compare the tokens behind BOS, or alone.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the scores to this PNG or SVG file (needs matplotlib).")
@device_option
@dtype_option
@download_option
@json_option
def align(
    a: str, b: str, output: Path, bos: bool, plot: Path | None, device: str, dtype: str, download: bool, as_json: bool
) -> None:  # fmt: skip
    """Score how donors A and B agree, block by block. Each is a donor or an atlas."""
    from frankenmerge.alignment import save_alignment
    from frankenmerge.analysis.align import align as aligned

    atlases = [atlas_of(name, device=device, dtype=dtype, download=download) for name in (a, b)]
    if not own_share().first:
        return
    alignment = aligned(*atlases, context="bos" if bos else "plain")
    save_alignment(alignment, output)
    if plot:
        from frankenmerge.reporting.plots import plot_alignment

        plot_alignment(alignment, plot)
    if as_json:
        scores = {
            name: {"matrix": score.matrix.tolist(), "nulls": {null: matrix.tolist() for null, matrix in score.nulls.items()}}
            for name, score in alignment.scores.items()
        }
        shared = {"shared_neurons": alignment.provenance["shared_neurons"], "widths": alignment.widths}
        print_json({"output": str(output), "donors": alignment.donors, "blocks": alignment.blocks, **shared, "scores": scores})
        return
    console = out()
    score = alignment.scores["jaccard"]
    columns = [str(block) for block in range(alignment.blocks[1] + 1)]
    if len(columns) <= 12:
        made = table("Agreement on the 10 most exciting tokens (Jaccard): rows A, columns B, after so many blocks", "", *columns)
        for block, row in enumerate(score.matrix):
            made.add_row(str(block), *(f"{value:.2f}" for value in row))
        console.print(made)
    summary = table("Mean over the blocks of equal depth, beside what chance gives", "score", "mean", *score.nulls, "residual_law")
    depth = min(alignment.blocks) + 1
    for name, entry in alignment.scores.items():
        nulls = [entry.nulls.get(null) for null in (*score.nulls, "residual_law")]
        cells = ["" if matrix is None else f"{matrix.diagonal()[1:depth].mean():.3f}" for matrix in nulls]
        summary.add_row(name, f"{entry.matrix.diagonal()[1:depth].mean():.3f}", *cells)
    console.print(summary)
    if alignment.widths[0] != alignment.widths[1]:
        console.print(f"Widths {alignment.widths[0]} and {alignment.widths[1]}: the first {min(alignment.widths)} neurons are compared.")
    console.print(f"Written to {output}", markup=False)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@download_option
@json_option
def check(recipe: Path, download: bool, as_json: bool) -> None:
    """Hold RECIPE against its donors' configs and headers, reading no weights, and tell what it would make."""
    from frankenmerge.recipe import load_recipe, open_donors
    from frankenmerge.splice import validated

    loaded = load_recipe(recipe)
    donors = open_donors(loaded, download=download)
    validated(loaded, donors, str(recipe))
    _tell_schedule(loaded, donors, as_json)


def _tell_schedule(recipe, donors, as_json: bool) -> None:
    from frankenmerge.checkpoint import BYTES_OF
    from frankenmerge.merging.schedule import schedule

    copies = schedule(recipe, donors)
    total = sum(copy.tensor.bytes for copy in copies)
    parameters = sum(copy.tensor.bytes // BYTES_OF[copy.tensor.dtype] for copy in copies)
    if as_json:
        print_json({"recipe": str(recipe), "depth": len(recipe.blocks), "tensors": len(copies), "parameters": parameters, "bytes": total})
        return
    console = out()
    made = table("The recipe is sound. It makes", "", "")
    for name, value in (("blocks", len(recipe.blocks)), ("seams", len(recipe.seams)), ("tensors", f"{len(copies):,}"),
                        ("parameters", f"{parameters:,}"), ("weights", size(total))):  # fmt: skip
        made.add_row(name, str(value))
    console.print(made)
    console.print(str(recipe), markup=False)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(_context, _parameter, value: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", value.upper())
    count = float(match[1]) * _UNITS[match[2] or "B"] if match else 0
    if not 1 <= count < 1 << 63:
        raise click.BadParameter(f"{value!r} is no size; write for example 5GB or 500MB")
    return int(count)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything and tell what would be written.")
@click.option("--shard-size", default="5GB", show_default=True, callback=_bytes, help="Largest file of weights.")
@download_option
@json_option
def merge(recipe: Path, output: Path, dry_run: bool, shard_size: int, download: bool, as_json: bool) -> None:
    """Write the checkpoint that RECIPE describes to the new folder OUTPUT, complete or not at all."""
    from frankenmerge.merging.schedule import schedule
    from frankenmerge.merging.writer import check_output
    from frankenmerge.merging.writer import merge as merged
    from frankenmerge.recipe import load_recipe, open_donors
    from frankenmerge.splice import validated

    loaded = load_recipe(recipe)
    donors = open_donors(loaded, download=download)
    validated(loaded, donors, str(recipe))
    total = sum(copy.tensor.bytes for copy in schedule(loaded, donors))
    if dry_run:
        check_output(output, donors, total)
        _tell_schedule(loaded, donors, as_json)
        return
    with progress(f"merging into {output.name}", total, "bytes") as advance:
        result = merged(loaded, donors, output, shard_size=shard_size, progress=advance)
    if as_json:
        print_json(result._asdict() | {"output": str(result.output)})
        return
    rate = f"{size(result.bytes)} in {result.seconds:.1f} s"
    out().print(f"{result.output}: {result.tensors} tensors, {rate}, every one its donor's bytes", markup=False)
