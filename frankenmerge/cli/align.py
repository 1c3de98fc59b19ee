"""`align`: score how two donors agree, block by block."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmerge.artefacts.scores import SCORES
from frankenmerge.cli.console import (
    check_plot,
    device_option,
    download_option,
    dtype_option,
    json_option,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
    refuse_others,
    table,
)
from frankenmerge.cli.donors import (
    INPUT_METHODS,
    MEANT_FOR,
    images_option,
    method_option,
    neurons_option,
    tokens_option,
)
from frankenmerge.cli.dry_run import dry_run_option, print_cost
from frankenmerge.distributed import own_rank

if TYPE_CHECKING:
    import numpy as np

    from frankenmerge.artefacts.alignment import Alignment, ModuleScores

SHOWN = {"complete": "jaccard", **{method: method for method in (*INPUT_METHODS, "pixels")}}
"""The score whose matrix `align` prints, by method."""
WIDEST = 12
"""Blocks up to which a matrix is printed."""


@click.command()
@click.argument("a")
@click.argument("b")
@output_option("Where to write the alignment, NAME.alignment.safetensors.")
@method_option
@neurons_option
@tokens_option
@images_option
@click.option(
    "--bos/--no-bos",
    default=False,
    show_default=True,
    help="Compare tokens after BOS instead of tokens alone (complete).",
)
@click.option(
    "--sampled",
    is_flag=True,
    help="Base predictions on tokens that the donors generate, not on random ones. "
    "Both donors must fit into memory.",
)
@click.option(
    "--exchange",
    is_flag=True,
    help="Also measure what exchanging blocks costs. Both donors must fit into memory.",
)
@click.option(
    "--modules",
    is_flag=True,
    help="Also score the exchange of attention, MLP and every linear map with those of the same "
    "block and its neighbours. Both donors must fit into memory.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Plot the scores to this SVG or PNG file (PNG needs frankenmerge[plots]).",
)
@dry_run_option
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
    plot: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score how donors A and B agree, block by block. Each is a donor or an atlas."""
    refuse_others(context, options["method"], {**MEANT_FOR, "bos": ("complete",)})
    if plot:
        check_plot("--plot", plot)
    if dry_run:
        _print_plan(a, b, options, as_json=as_json)
        return
    from frankenmerge.artefacts.alignment import save_alignment
    from frankenmerge.workflows.aligning import AlignOptions, align_donors

    neurons = options["neurons"]
    options["neurons"] = None if neurons is None else tuple(neurons)
    alignment = align_donors(a, b, AlignOptions(**options), progress=progress)
    if not own_rank().first:
        return
    save_alignment(alignment, output)
    if plot:
        from frankenmerge.reporting.figures import plot_alignment

        plot_alignment(alignment, plot)
    if as_json:
        print_json({"output": str(output), **_as_json(alignment)})
    else:
        _print(alignment, options["bos"])
        out().print(f"Written to {output}", markup=False)


def _print_plan(a: str, b: str, options: dict[str, Any], *, as_json: bool) -> None:
    """What the command would take."""
    from frankenmerge.splicing.opening import open_donor
    from frankenmerge.workflows.costs import align_cost

    opening = {key: options[key] for key in ("download", "allow_pickle")}
    donors = [
        Path(name) if Path(name).is_file() else open_donor(name, **opening, weights=False)
        for name in (a, b)
    ]
    dtype, device = options["dtype"], options["device"]
    runs = any(options[key] for key in ("sampled", "exchange", "modules"))
    cost = align_cost(donors, dtype=dtype, method=options["method"], runs=runs)
    print_cost("align", cost, dtype=dtype, device=device, as_json=as_json)


def _as_json(alignment: "Alignment") -> dict[str, Any]:
    keys = ("method", "context", "searched")
    found: dict[str, Any] = {
        "donors": alignment.donors,
        "blocks": alignment.blocks,
        "shared_neurons": alignment.provenance["shared_neurons"],
        "widths": alignment.widths,
        **{key: alignment.provenance[key] for key in keys},
    }
    if alignment.exchange:
        found["exchange"] = {
            name: [matrix.tolist() for matrix in pair]
            for name, pair in alignment.exchange._asdict().items()
        }
    if alignment.modules:
        found["modules"] = {
            name: [_known(table[row]) for table in alignment.modules.replacement]
            for row, name in enumerate(alignment.modules.names)
        }
    found["scores"] = {
        name: {
            "matrix": score.matrix.tolist(),
            "nulls": {null: matrix.tolist() for null, matrix in score.nulls.items()},
        }
        for name, score in alignment.scores.items()
    }
    return found


def _known(matrix: "np.ndarray") -> list[list[float | None]]:
    """A matrix with None for what was not scored."""
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


def _print(alignment: "Alignment", bos: bool) -> None:
    console, method = out(), alignment.provenance["method"]
    name = SHOWN[method]
    shown = alignment.scores[name]
    if alignment.blocks[1] < WIDEST:
        after = ", after BOS" if bos else ""
        title = f"{SCORES[name].title}{after} (rows A, columns B, number of blocks)"
        console.print(matrix_table(title, shown.matrix))
    console.print(_means(alignment, list(shown.nulls)))
    if alignment.exchange is not None and max(alignment.blocks) <= WIDEST:
        unit = "nats per token on random tokens"
        replaced, swapped = alignment.exchange.replacement[0], alignment.exchange.interchange[0]
        console.print(matrix_table(f"A's block (row) replaced by B's (column), {unit}", replaced))
        console.print(matrix_table(f"A's blocks interchanged, {unit}", swapped))
    if alignment.modules is not None and min(alignment.blocks) <= WIDEST:
        console.print(_modules_table(alignment.modules))
    narrow = min(alignment.widths)
    if searched := alignment.provenance["searched"]:
        neurons, tokens = len(searched["neurons"]), searched["tokens"]
        each = f", {tokens} tokens each" if tokens else ""
        console.print(f"{method}: {neurons} of {narrow} neurons{each}.")
    if alignment.widths[0] != alignment.widths[1]:
        widths = " and ".join(map(str, alignment.widths))
        console.print(f"Widths {widths}: the first {narrow} neurons are compared.")


def matrix_table(title: str, matrix: "np.ndarray") -> Table:
    """A matrix as a table, rows and columns numbered from 0."""
    made = table(title, "", *map(str, range(matrix.shape[1])))
    for number, row in enumerate(matrix):
        made.add_row(str(number), *(f"{value:.2f}" for value in row))
    return made


def _modules_table(modules: "ModuleScores") -> Table:
    """How little A's blocks change with a module of B's same block."""
    count = min(modules.replacement[0].shape[1:])
    title = "A's module replaced by B's of the same block: 1 - relative change of the stream after"
    made = table(title, "module", *map(str, range(count)))
    for name, matrix in zip(modules.names, modules.replacement[0], strict=True):
        made.add_row(name, *(f"{value:.2f}" for value in matrix.diagonal()))
    return made


def _means(alignment: "Alignment", nulls: list[str]) -> Table:
    columns = [*nulls, "residual_law"]
    made = table("Mean over blocks of equal depth, and under each null", "score", "mean", *columns)
    depth = min(alignment.blocks) + 1
    for name, score in alignment.scores.items():
        cells = [
            "" if matrix is None else f"{matrix.diagonal()[1:depth].mean():.3f}"
            for matrix in (score.nulls.get(null) for null in columns)
        ]
        made.add_row(name, f"{score.matrix.diagonal()[1:depth].mean():.3f}", *cells)
    return made
