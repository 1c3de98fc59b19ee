"""`features`: the document's tables, for any donor and by every method."""

import math
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    max_memory_option,
    numbers,
    offload_option,
    out,
    pickle_option,
    print_json,
    progress,
    refuse_others,
    table,
)
from frankenmerge.cli.searches import METHODS, SearchOptions, recovered
from frankenmerge.errors import fail

SEARCHES = tuple(METHODS)
MEANT_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("neurons", "notation", "tokens"), SEARCHES),
    "bos": ("complete", "greedy"),
    **dict.fromkeys(("bottom", "mask_special"), ("complete",)),
    **dict.fromkeys(("beam", "candidates", "positions"), ("greedy",)),
    "optimizer": ("gradient", "inversion"),
    "steps": ("gradient", "softmax-prior", "inversion"),
    "target": ("gradient", "softmax-prior"),
    "decode": ("gradient",),
    **dict.fromkeys(("text", "distance"), ("inversion",)),
}
"""The methods to which an option means something; options that are not here mean something to all.
"""
MOST_COLUMNS = 12
"""How many blocks the table of their agreement has at most."""


@click.command()
@click.argument("donor")
@click.option(
    "--method", type=click.Choice([*SEARCHES, "inversion"]), default="complete", show_default=True
)
@click.option(
    "--layers",
    callback=numbers,
    help="Blocks, 1-based, such as 1,4,8; 0 is the embedding. [default: 1, then every quarter]",
)
@click.option(
    "--features",
    "notation",
    default="[:, :, 0-3]",
    show_default=True,
    help="What to excite, as the document writes it: [:, positions, neurons]; 0-3 one after the other, 0:4 together.",
)
@click.option(
    "--neurons",
    callback=numbers,
    help="Short for --features: single neurons, such as 0-3 or 1,4,8.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Tokens of an input; for complete, how many are shown.",
)
@click.option(
    "--site",
    type=click.Choice(["block", "attention"]),
    default="block",
    show_default=True,
    help="Whose output.",
)
@click.option("--isolated", is_flag=True, help="Feed the embedding straight into every block.")
@click.option(
    "--untrained",
    type=int,
    metavar="SEED",
    help="Search random weights of the same config instead: the control.",
)
@click.option("--bos", is_flag=True, help="Put BOS before the tokens (complete and greedy).")
@click.option("--bottom", is_flag=True, help="The tokens that excite least (complete).")
@click.option(
    "--mask-special", is_flag=True, help="Leave out special and never-trained tokens (complete)."
)
@click.option(
    "--beam",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Inputs to go on with at each step (greedy).",
)
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Choose a token by the last position or by the sum over all (greedy).",
)
@click.option(
    "--candidates",
    type=click.IntRange(1),
    help="Try only so many tokens at each later step, and report the recall (greedy).",
)
@click.option(
    "--optimizer",
    type=click.Choice(["descent", "adam"]),
    help="[default: descent for gradient, adam for inversion]",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="[default: 100 for gradient, 60 for softmax-prior, 300 for inversion]",
)
@click.option(
    "--target",
    type=float,
    default=100.0,
    show_default=True,
    help="What outputs are driven to (gradient, softmax-prior).",
)
@click.option(
    "--decode",
    type=click.Choice(["pinv", "hidden"]),
    default="pinv",
    show_default=True,
    help="Read tokens off the vocabulary; `hidden` shows the document's artefact (gradient).",
)
@click.option(
    "--input", "text", metavar="TEXT", help="What to recover from a block's output (inversion)."
)
@click.option(
    "--distance",
    type=click.Choice(["l1", "cosine"]),
    default="l1",
    show_default=True,
    help="Between outputs (inversion).",
)
@device_option
@max_memory_option
@offload_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def features(
    context: click.Context,
    donor: str,
    method: str,
    layers: list[int] | None,
    notation: str,
    neurons: list[int] | None,
    bos: bool,
    untrained: int | None,
    device: str,
    max_memory: dict | None,
    offload: Path | None,
    dtype: str,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show which tokens excite the neurons of DONOR's blocks most.

    With `--method inversion`, show instead how much of a text each block's output tells.
    """
    from frankenmerge.analysis.analyze import token_texts
    from frankenmerge.artefacts.recipe import open_donor
    from frankenmerge.models.loading import load_model

    refuse_others(context, method, MEANT_FOR)
    if neurons and context.get_parameter_source("notation") is not ParameterSource.DEFAULT:
        raise fail(
            "--neurons", "one of --neurons and --features", "both", "write all of it in --features"
        )
    checkpoint = open_donor(donor, download=download, allow_pickle=allow_pickle)
    layers = layers or sorted(
        {1, *(max(1, checkpoint.blocks * quarter // 4) for quarter in range(1, 5))}
    )
    first = checkpoint.config.get("bos_token_id")
    if bos and not isinstance(first, int):
        raise fail(donor, "a bos_token_id in config.json", repr(first), "search without --bos")
    prefix = (first,) if bos and isinstance(first, int) else ()
    asked = SearchOptions(
        layers=layers, notation=notation, neurons=neurons, prefix=prefix, **options
    )
    wanted = [] if method == "inversion" else asked.features(checkpoint, method)
    vocabulary = token_texts(checkpoint)
    told = {
        "donor": donor,
        "method": method,
        "untrained": untrained,
        "context": "bos" if bos else "plain",
    }
    title = f"{Path(donor).name}, {method}, {'behind BOS' if bos else 'plain'}"
    title += "" if untrained is None else f", random weights (seed {untrained})"
    model = load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        max_memory=max_memory,
        offload=offload,
        untrained=untrained,
    )

    if method == "inversion":
        with progress("inversion", len(layers), "blocks") as advance:
            found, true = recovered(checkpoint, model, asked, advance)
        _show_recovered(asked, found, true, vocabulary, title, told, as_json)
        return
    total, unit = {"complete": (len(vocabulary), "inputs"), "greedy": (None, "inputs")}.get(
        method, (len(wanted), "features")
    )
    with progress(f"{method} search", total, unit) as advance:
        found = METHODS[method](checkpoint, model, asked, wanted, advance)
    _show_found(asked, found, wanted, vocabulary, title, told, as_json)


def _show_found(
    asked: SearchOptions,
    found: Any,
    wanted: list,
    vocabulary: list[str],
    title: str,
    told: dict[str, Any],
    as_json: bool,
) -> None:
    from frankenmerge.artefacts.token_overlap import token_agreement

    agreement = token_agreement(found.compared, found.compared)
    by_layer = [texts_of(tokens, vocabulary) for tokens in found.tokens]
    if as_json:
        rows = [
            {
                "block": feature.block,
                "feature": feature.notation,
                "neuron": feature.neuron if len(feature.neurons) == 1 else None,
                "tokens": tokens,
                "texts": texts,
            }
            for feature, tokens, texts in zip(
                wanted,
                found.tokens.reshape(len(wanted), -1).tolist(),
                sum(by_layer, []),
                strict=True,
            )
        ]
        print_json(
            {
                **told,
                "features": rows,
                **found.told,
                "agreement": _agreement_as_json(asked.layers, agreement),
            }
        )
        return
    made = table(title, "block", *(feature.notation for feature in wanted[: found.tokens.shape[1]]))
    for layer, texts in zip(asked.layers, by_layer, strict=True):
        made.add_row(str(layer), *(" ".join(map(repr, own)) for own in texts))
    console = out()
    console.print(made)
    for name, value in found.told.items():
        console.print(f"{name.replace('_', ' ')}: {value}", markup=False)
    if found.told.get("artefact"):
        console.print(
            "[bold red]An artefact:[/] these are neurons' indices read as token ids; they tell nothing of the donor.",
            markup=True,
        )
    _print_agreement(asked.layers, agreement, "features")


def _show_recovered(
    asked: SearchOptions,
    found: Any,
    true: Any,
    vocabulary: list[str],
    title: str,
    told: dict[str, Any],
    as_json: bool,
) -> None:
    from frankenmerge.artefacts.token_overlap import token_agreement

    recall = token_agreement(found.compared, true[None, :, None])
    agreement = token_agreement(found.compared, found.compared)
    ((shown,), by_layer) = (
        texts_of(true[None], vocabulary),
        [texts_of(tokens, vocabulary)[0] for tokens in found.tokens],
    )
    shares, chances = (
        recall.matrix[:, 0].tolist(),
        [_known(value) for value in recall.permuted[:, 0].tolist()],
    )
    if as_json:
        rows = [
            {
                "block": layer,
                "tokens": tokens[0],
                "texts": texts,
                "recall": rank,
                "permuted": chance,
            }
            for layer, tokens, texts, rank, chance in zip(
                asked.layers, found.tokens.tolist(), by_layer, shares, chances, strict=True
            )
        ]
        given = {
            "input": {"tokens": true.tolist(), "texts": shown},
            "recovered": rows,
            "chance": 1 / len(vocabulary),
        }
        print_json(
            {
                **told,
                **given,
                **found.told,
                "agreement": _agreement_as_json(asked.layers, agreement),
            }
        )
        return
    made = table(title, "block", "recovered", "recall", "permuted")
    made.add_row("input", " ".join(map(repr, shown)), "", "")
    for layer, texts, rank, chance in zip(asked.layers, by_layer, shares, chances, strict=True):
        made.add_row(
            str(layer),
            " ".join(map(repr, texts)),
            f"{rank:.2f}",
            "" if chance is None else f"{chance:.2f}",
        )
    console = out()
    console.print(made)
    console.print(
        f"A random token is right one time in {len(vocabulary):,}; permuted: the recall when positions are exchanged."
    )
    for name, value in found.told.items():
        console.print(f"{name.replace('_', ' ')}: {value}", markup=False)
    _print_agreement(asked.layers, agreement, "positions")


def texts_of(tokens: Any, vocabulary: list[str]) -> list[list[str]]:
    """The texts of tokens `[m, n]`, row by row; ids beyond the vocabulary are shown as `<id>`."""
    return [
        [vocabulary[token] if token < len(vocabulary) else f"<{token}>" for token in row]
        for row in tokens.tolist()
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _agreement_as_json(layers: list[int], agreement: Any) -> dict[str, Any]:
    permuted = [[_known(value) for value in row] for row in agreement.permuted.tolist()]
    return {"blocks": layers, "same_tokens": agreement.matrix.tolist(), "permuted": permuted}


def _print_agreement(layers: list[int], agreement: Any, permuted: str) -> None:
    """Show every pair of blocks: above the diagonal the share of tokens that are the same, below it that of permuted features."""
    if not 2 <= len(layers) <= MOST_COLUMNS:
        return
    made = table(
        f"Same tokens in two blocks (above the diagonal); with {permuted} permuted (below)",
        "block",
        *map(str, layers),
    )
    for i, layer in enumerate(layers):
        values = [
            agreement.matrix[i, j] if i < j else agreement.permuted[i, j]
            for j in range(len(layers))
        ]
        cells = [
            "" if i == j or math.isnan(value) else f"{value:.2f}" for j, value in enumerate(values)
        ]
        made.add_row(str(layer), *cells)
    out().print(made)
