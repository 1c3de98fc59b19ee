"""`align`, `check` and `merge`: from donors to a checkpoint."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    need_matplotlib,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
    refuse_others,
    size,
    table,
)
from frankenmerge.cli.donors import (
    MEANT_FOR,
    RunOptions,
    add_inputs,
    atlas_of,
    method_option,
    neurons_option,
    tokens_option,
)
from frankenmerge.distributed import Rank, own_rank
from frankenmerge.errors import Fault, fail, raise_all

SHOWN = {
    "complete": ("jaccard", "Agreement on the 10 most exciting tokens (Jaccard)"),
    "greedy": ("greedy", "Agreement on the tokens of greedy search"),
    "gradient": ("gradient", "Agreement on the tokens of gradient search"),
}
"""The score that `align` prints for each method, and its title."""


@click.command()
@click.argument("a")
@click.argument("b")
@output_option("Where the alignment goes, NAME.alignment.safetensors.")
@method_option
@neurons_option
@tokens_option
@click.option(
    "--bos/--no-bos",
    default=False,
    show_default=True,
    help="Compare the tokens behind BOS, or alone (complete).",
)
@click.option(
    "--drawn",
    is_flag=True,
    help="Predict from tokens that the donors draw, not from random ones: both must fit into memory.",
)
@click.option(
    "--exchange",
    is_flag=True,
    help="Let blocks stand for one another too, by both tests: both must fit into memory.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the scores to this PNG or SVG file (needs matplotlib).",
)
@device_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def align(
    context: click.Context,
    a: str,
    b: str,
    output: Path,
    method: str,
    neurons: list[int] | None,
    tokens: int | None,
    bos: bool,
    drawn: bool,
    exchange: bool,
    plot: Path | None,
    device: str,
    dtype: str,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Score how donors A and B agree, block by block. Each is a donor or an atlas."""
    from frankenmerge.analysis.align import align as aligned
    from frankenmerge.artefacts.alignment import save_alignment

    refuse_others(context, method, {**MEANT_FOR, "bos": ("complete",)})
    if plot:
        need_matplotlib("--plot")
    how = RunOptions(device, dtype, download, allow_pickle)
    atlases = [atlas_of(name, how) for name in (a, b)]
    if not own_rank().first:
        return
    if method != "complete":
        atlases = _with_same_inputs((a, b), atlases, how, method, neurons, tokens)
    models = _loaded((a, b), how) if drawn or exchange else {}
    alignment = aligned(
        *atlases,
        context="bos" if bos else "plain",
        method=method,
        states=_shown(models) if drawn else None,
    )
    if exchange:
        alignment = replace(alignment, exchange=_exchanged(alignment, models))
    save_alignment(alignment, output)
    if plot:
        from frankenmerge.reporting.figures import plot_alignment

        plot_alignment(alignment, plot)
    if as_json:
        scores = {
            name: {
                "matrix": score.matrix.tolist(),
                "nulls": {null: matrix.tolist() for null, matrix in score.nulls.items()},
            }
            for name, score in alignment.scores.items()
        }
        shared = {
            "shared_neurons": alignment.provenance["shared_neurons"],
            "widths": alignment.widths,
        }
        shared |= {
            "method": method,
            "context": alignment.provenance["context"],
            "searched": alignment.provenance["searched"],
        }
        if alignment.exchange:
            tables = alignment.exchange._asdict().items()
            shared |= {
                "exchange": {name: [matrix.tolist() for matrix in pair] for name, pair in tables}
            }
        print_json(
            {
                "output": str(output),
                "donors": alignment.donors,
                "blocks": alignment.blocks,
                **shared,
                "scores": scores,
            }
        )
        return
    console = out()
    name, title = SHOWN[method]
    score = alignment.scores[name]
    columns = [str(block) for block in range(alignment.blocks[1] + 1)]
    if len(columns) <= 12:
        made = table(
            f"{title}{', behind BOS' if bos else ''}: rows A, columns B, after so many blocks",
            "",
            *columns,
        )
        for block, row in enumerate(score.matrix):
            made.add_row(str(block), *(f"{value:.2f}" for value in row))
        console.print(made)
    summary = table(
        "Mean over the blocks of equal depth, beside what chance gives",
        "score",
        "mean",
        *score.nulls,
        "residual_law",
    )
    depth = min(alignment.blocks) + 1
    for name, entry in alignment.scores.items():
        nulls = [entry.nulls.get(null) for null in (*score.nulls, "residual_law")]
        cells = [
            "" if matrix is None else f"{matrix.diagonal()[1:depth].mean():.3f}" for matrix in nulls
        ]
        summary.add_row(name, f"{entry.matrix.diagonal()[1:depth].mean():.3f}", *cells)
    console.print(summary)
    for title, matrix in _exchange_tables(alignment):
        made = table(title, "", *map(str, range(matrix.shape[1])))
        for block, row in enumerate(matrix):
            made.add_row(str(block), *(f"{value:.2f}" for value in row))
        console.print(made)
    if searched := alignment.provenance["searched"]:
        console.print(
            f"{method}: {len(searched['neurons'])} of {min(alignment.widths)} neurons, {searched['tokens']} tokens each."
        )
    if alignment.widths[0] != alignment.widths[1]:
        console.print(
            f"Widths {alignment.widths[0]} and {alignment.widths[1]}: the first {min(alignment.widths)} neurons are compared."
        )
    console.print(f"Written to {output}", markup=False)


def _exchange_tables(alignment) -> list[tuple[str, Any]]:
    """What it cost when blocks stood for one another; tables that are too wide are in the file alone."""
    if alignment.exchange is None or max(alignment.blocks) > 12:
        return []
    unit = "nats per token on random tokens"
    return [
        (f"A's block (row) replaced by B's (column), {unit}", alignment.exchange.replacement[0]),
        (f"A's blocks interchanged, {unit}", alignment.exchange.interchange[0]),
    ]


def _loaded(names: tuple[str, str], how: RunOptions) -> dict:
    """The donors in memory, by name."""
    from frankenmerge.models.loading import Placement, load_model
    from frankenmerge.splicing.opening import open_donor

    raise_all(
        Fault(
            "--drawn, --exchange",
            "donors, which are run",
            f"an atlas: {name}",
            "give the donor itself",
        )
        for name in names
        if Path(name).is_file()
    )
    donors = [
        open_donor(name, download=how.download, allow_pickle=how.allow_pickle)
        for name in dict.fromkeys(names)
    ]
    return {donor.name: load_model(donor, Placement(how.dtype, how.device)) for donor in donors}


def _shown(models: dict) -> dict:
    from frankenmerge.models.sampling import states_on_sampled

    return states_on_sampled(models)


def _exchanged(alignment, models: dict):
    from frankenmerge.evaluation.block_swaps import exchange

    a, b = zip(alignment.donors, alignment.blocks, strict=True)
    with progress("exchanging blocks", None, "changes") as advance:
        return exchange(a, b, models, advance=advance)


def _with_same_inputs(
    names: tuple[str, str],
    atlases: list,
    how: RunOptions,
    method: str,
    neurons: list[int] | None,
    tokens: int | None,
) -> list:
    """The atlases, those of donors with inputs for the same neurons and as many tokens as a given atlas has, if one is given."""
    from frankenmerge.analysis.align import check_comparable, missing_inputs
    from frankenmerge.analysis.inputs import even_neurons

    check_comparable(*atlases)  # before a search that may take hours
    given = [atlas for name, atlas in zip(names, atlases, strict=True) if Path(name).is_file()]
    raise_all(fault for atlas in given for fault in missing_inputs(atlas, method))
    made = [atlas.inputs[method] for atlas in given]
    if made and (neurons or tokens):
        told = f"{len(made[0].neurons)} neurons, {made[0].tokens.shape[2]} tokens"
        raise fail(
            "--neurons, --tokens",
            "the ones that the atlas was made with",
            f"others beside an atlas ({told})",
            "leave them out",
        )
    if made:
        neurons, tokens = made[0].neurons.tolist(), made[0].tokens.shape[2]
    neurons = neurons or even_neurons(min(atlas.width for atlas in atlases))
    return [
        atlas if Path(name).is_file() else add_inputs(name, atlas, how, method, neurons, tokens)
        for name, atlas in zip(names, atlases, strict=True)
    ]


@click.command()
@click.argument("target", metavar="RECIPE|OUTPUT", type=click.Path(path_type=Path))
@download_option
@pickle_option
@json_option
def check(target: Path, download: bool, allow_pickle: bool, as_json: bool) -> None:
    """Hold a recipe against its donors, or a finished merge against its provenance.

    For a RECIPE configs and headers are read, no weights, and it is told what it would make. For
    the folder OUTPUT of a merge every file is held against frankenmerge.json, and copied tensors,
    where their donors are at hand, against the donors' bytes.
    """
    if target.is_dir():
        _verify(target, download, allow_pickle, as_json)
    else:
        _tell(_checked(target, download, allow_pickle), as_json)


def _verify(folder: Path, download: bool, allow_pickle: bool, as_json: bool) -> None:
    from frankenmerge.merging.verify import verify

    with progress(f"comparing {folder.name}", None, "bytes") as advance:
        found = verify(folder, download=download, allow_pickle=allow_pickle, advance=advance)
    if as_json:
        print_json(found._asdict() | {"output": str(folder)})
        return
    console = out()
    console.print(
        f"{folder}: {found.shards} files and {found.tensors} tensors are what {folder / 'frankenmerge.json'} says; "
        f"{found.compared} tensors have their donor's bytes, {found.hashed} files their checksum.",
        markup=False,
    )
    for name in found.absent:
        console.print(
            f"Not compared: the tensors of {name}, which is not at hand as it was.", markup=False
        )


def _checked(path: Path, download: bool, allow_pickle: bool) -> list:
    """The sound stages of a recipe file, the result last."""
    from tempfile import TemporaryDirectory

    from frankenmerge.artefacts.recipe_file import load_recipes
    from frankenmerge.splicing.stages import checked

    with TemporaryDirectory() as scratch:
        return checked(
            load_recipes(path),
            Path(scratch),
            download=download,
            allow_pickle=allow_pickle,
            place=str(path),
        )


def _tell(stages: list, as_json: bool) -> None:
    from frankenmerge.splicing.summary import summary

    told = [(stage.recipe, summary(stage)) for stage in stages]
    if as_json:
        result, before = told[-1], told[:-1]
        named = {
            recipe.name: {"recipe": str(recipe), **found._asdict()} for recipe, found in before
        }
        print_json(
            {"recipe": str(result[0]), **result[1]._asdict()} | ({"stages": named} if named else {})
        )
        return
    console = out()
    for recipe, found in told:
        made = table(
            f"Stage {recipe.name} makes"
            if recipe is not told[-1][0]
            else "The recipe is sound. It makes",
            "",
            "",
        )
        rows = {
            "blocks": found.depth,
            "seams": found.seams,
            "tensors": f"{found.tensors:,}",
            "of these computed": f"{found.computed:,}",
            "parameters": f"{found.parameters:,}",
            "weights": f"{size(found.bytes)}, {found.dtype}",
            "memory to load": ", ".join(
                f"{size(count)} in {dtype}" for dtype, count in found.memory.items()
            ),
            "KV cache per token": size(found.kv_cache_per_token),
        }
        for name, value in rows.items():
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
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a merge that was cut off, and keep finished shards if this one fails.",
)
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    callback=_bytes,
    help="Largest file of weights.",
)
@click.option(
    "--reflink/--no-reflink",
    default=True,
    help="Rank blocks with the donors where the file system can (XFS, btrfs).",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="The torch device that computes tensors; copies need none.",
)
@click.option(
    "--allow-nan",
    is_flag=True,
    help="Go on where a computed tensor holds NaN or Inf, or is made of any.",
)
@click.option(
    "--check-finite",
    is_flag=True,
    help="Read all of the donors first, and refuse NaN and Inf in copied tensors too.",
)
@click.option(
    "--checksums",
    is_flag=True,
    help="Put the SHA-256 of every file of weights into frankenmerge.json.",
)
@click.option(
    "--push-to-hub",
    metavar="REPOSITORY",
    help="Put the finished merge into a new repository of the hub, org/name.",
)
@click.option(
    "--private", is_flag=True, help="With --push-to-hub: nobody else may see the repository."
)
@download_option
@pickle_option
@json_option
def merge(
    recipe: Path,
    output: Path,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
    **options,
) -> None:
    """Write the checkpoint that RECIPE describes to the new folder OUTPUT, complete or not at all.

    Stages that it uses are written to OUTPUT.stages, and made again only when what they are made of
    has changed. Under `accelerate launch` the processes share the work of a recipe without stages,
    shard by shard.
    """
    from functools import partial

    from frankenmerge.merging.plan import Options, output_faults, planned, room_faults
    from frankenmerge.merging.writer import merge as merged
    from frankenmerge.splicing.stages import merge_stages
    from frankenmerge.storage.hub import check_push, push

    stages, rank = _checked(recipe, download, allow_pickle), own_rank()
    if len(stages) > 1 and not rank.first:
        return
    if options["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    total = sum(operation.bytes for stage in stages for operation in stage.operations)
    if len(stages) > 1:
        donors = {name: donor for stage in stages for name, donor in stage.donors.items()}
        raise_all([*output_faults(output, donors), *room_faults(output, total)])
        rank = Rank()
    elif dry_run:
        planned(stages[0].recipe, stages[0].donors, output, Options(**options), rank, dry=True)
    if private and not push_to_hub:
        raise fail(
            "--private",
            "--push-to-hub",
            "none",
            "say which repository is meant, or leave --private out",
        )
    if push_to_hub and rank.first:
        check_push(push_to_hub)
    if dry_run:
        _tell(stages, as_json)
        return
    with progress(f"merging into {output.name}", total, "bytes") as advance:
        write = partial(merged, rank=rank, advance=advance, progress=progress, **options)
        result = merge_stages(
            [stage.recipe for stage in stages],
            output,
            write,
            download=download,
            allow_pickle=allow_pickle,
        )
    if not rank.first:
        return
    address = push(result.output, push_to_hub, private=private) if push_to_hub else None
    if as_json:
        print_json(
            result._asdict()
            | {"output": str(result.output)}
            | ({"repository": address} if address else {})
        )
        return
    made = f"{result.computed} of them computed, the others" if result.computed else "every one"
    kept = f", {result.kept} files of weights kept from an earlier run" if result.kept else ""
    rate = f"{size(result.bytes)} in {result.seconds:.1f} s"
    out().print(
        f"{result.output}: {result.tensors} tensors, {rate}, {made} its donor's bytes{kept}",
        markup=False,
    )
    if address:
        out().print(f"Put into {address}", markup=False)


@click.command()
@click.argument("narrow")
@click.argument("wide")
@click.argument("output", type=click.Path(path_type=Path))
@download_option
@pickle_option
@json_option
def widen(
    narrow: str, wide: str, output: Path, download: bool, allow_pickle: bool, as_json: bool
) -> None:
    """Write the donor NARROW in the shape of the donor WIDE to the new folder OUTPUT, so that the two can be spliced.

    It computes what it did: whatever WIDE has more of is zeros. A gauge can then rotation either into
    the other's basis.
    """
    from frankenmerge.merging.widen import widen as widened
    from frankenmerge.splicing.opening import open_donor

    donor, other = (
        open_donor(name, download=download, allow_pickle=allow_pickle) for name in (narrow, wide)
    )
    widened(donor, other, output)
    made = open_donor(str(output))
    if as_json:
        print_json(
            {
                "output": str(output),
                "tensors": len(made.tensors),
                "bytes": made.bytes,
                "parameters": made.parameters,
            }
        )
        return
    out().print(
        f"{output}: {narrow} in the shape of {wide}, {made.parameters:,} parameters, {size(made.bytes)}",
        markup=False,
    )
