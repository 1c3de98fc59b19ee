"""`align`, `plan`, `check` and `merge`: from donors to a checkpoint."""

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
@click.argument("alignments", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the best recipe goes; its evidence goes beside it."
)
@click.option("--depth", type=click.IntRange(1), help="Blocks of the result. [default: half as many again as the deepest donor has]")
@click.option("--max-seams", type=click.IntRange(1), default=4, show_default=True, help="Most seams.")
@click.option("--min-slice", type=click.IntRange(1), default=2, show_default=True, help="Fewest blocks of a slice.")
@click.option(
    "--protect-first", type=click.IntRange(0), default=1, show_default=True, help="Blocks at a donor's beginning that only begin."
)
@click.option("--protect-last", type=click.IntRange(0), default=1, show_default=True, help="Blocks at a donor's end that only end.")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="How many recipes to write.")
@json_option
def plan(
    alignments: tuple[Path, ...], output: Path, depth: int | None, max_seams: int, min_slice: int, protect_first: int, protect_last: int,
    top: int, as_json: bool,
) -> None:  # fmt: skip
    """Choose the splices that ALIGNMENTS predict to do the least damage, and write them as recipes.

    Every donor of the alignments is used. The evidence for every seam is written beside the recipe, as NAME.evidence.json.
    """
    from frankenmerge.alignment import load_alignment
    from frankenmerge.planning.plan import plan as planned
    from frankenmerge.planning.search import Constraints

    loaded = [load_alignment(path) for path in alignments]
    deepest = max(blocks for alignment in loaded for blocks in alignment.blocks)
    constraints = Constraints(depth or deepest * 3 // 2, max_seams, min_slice, protect_first, protect_last)
    plans = planned(loaded, constraints, top=top)
    paths = write_plans(plans, output, constraints)
    if as_json:
        print_json(_plans_as_json(plans, constraints) | {"written": [str(path) for path in paths]})
        return
    console = out()
    made = table(f"Plans of {constraints.depth} blocks", "recipe", "seams", "damage", "file")
    for path, entry in zip(paths, plans, strict=True):
        made.add_row(str(entry.recipe), str(len(entry.seams)), f"{entry.predicted_damage:.3f}", path.name)
    console.print(made)
    for number, seam in enumerate(plans[0].seams, 1):
        print_seam(console, number, seam)
    console.print("Damage is a sum of seam costs; it ranks plans and is not in nats.")


def write_plans(plans, output: Path, constraints) -> list[Path]:
    """Write the best recipe to `output`, the others to NAME.2.yaml and on, the evidence of all to NAME.evidence.json."""
    import json

    from frankenmerge.files import write_file

    paths = [output, *(output.with_name(f"{output.stem}.{rank}{output.suffix}") for rank in range(2, len(plans) + 1))]
    for path, entry in zip(paths, plans, strict=True):
        write_file(path, entry.recipe.dump().encode())
    told = json.dumps(_plans_as_json(plans, constraints), indent=1, ensure_ascii=False) + "\n"
    write_file(output.with_suffix(".evidence.json"), told.encode())
    return paths


def _plans_as_json(plans, constraints) -> dict:
    return {"plans": [entry.as_json() for entry in plans], "constraints": vars(constraints)}


def print_seam(console, number: int, seam) -> None:
    """Show one seam's evidence: scores beside their nulls, and the neurons that agree and disagree most."""
    after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
    kind = f"{seam.skipped} skipped" if seam.skipped > 0 else f"{-seam.skipped} gone through again" if seam.skipped else "same depth"
    nulls = list(dict.fromkeys(null for entry in seam.nulls.values() for null in entry))
    made = table(f"Seam {number}: {after} -> {before} ({kind})", "score", "here", *nulls)
    for name, value in seam.scores.items():
        made.add_row(name, f"{value:.3f}", *(f"{seam.nulls[name][null]:.3f}" if null in seam.nulls[name] else "" for null in nulls))
    console.print(made)
    agree = "; ".join(f"{entry['neuron']}: {' '.join(map(repr, entry['shared'][:3])) or 'nothing'}" for entry in seam.agree[:3])
    console.print(f"  Neurons that agree most, with the tokens they share: {agree}", markup=False)
    disagree = "; ".join(
        f"{entry['neuron']}: {' '.join(map(repr, entry['tokens'][0][:2]))} | {' '.join(map(repr, entry['tokens'][1][:2]))}"
        for entry in seam.disagree[:2]
    )
    console.print(f"  Neurons that agree least, with each donor's tokens: {disagree}", markup=False)
    if seam.by_chance:
        console.print("  [bold red]No better than chance:[/] these donors share no basis here; expect noise behind this seam.")


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
    whose = "those of turned slices computed, the others" if any(part.gauge for part in loaded.slices) else "every one"
    out().print(f"{result.output}: {result.tensors} tensors, {rate}, {whose} as the donor has them", markup=False)
