"""`inspect` and `analyze`: what one donor is, and what several have in common."""

from pathlib import Path
from typing import Any, NamedTuple

import click

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    numbers,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
    refuse_others,
    size,
    table,
)
from frankenmerge.distributed import own_rank
from frankenmerge.storage.atomic import cache_folder

INPUT_METHODS = ("greedy", "gradient")
method_option = click.option(
    "--method",
    type=click.Choice(["complete", *INPUT_METHODS]),
    default="complete",
    show_default=True,
    help="What to search besides: inputs of several tokens, for some neurons.",
)
neurons_option = click.option(
    "--neurons",
    callback=numbers,
    help="Which neurons, such as 0-3 or 1,4,8 (greedy and gradient). [default: 16, evenly spaced]",
)
tokens_option = click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Tokens of an input (greedy and gradient). [default: 4]",
)
MEANT_FOR: dict[str, tuple[str, ...]] = dict.fromkeys(("neurons", "tokens"), INPUT_METHODS)


@click.command()
@click.argument("donors", nargs=-1, required=True)
@download_option
@pickle_option
@json_option
def inspect(donors: tuple[str, ...], download: bool, allow_pickle: bool, as_json: bool) -> None:
    """Tell what DONORS are and whether their blocks can be spliced, from configs and headers alone.

    Of a donor on the hub nothing else is fetched; a pickled donor that is allowed is converted
    first, and kept in the cache.
    """
    from frankenmerge.artefacts.recipe import open_donor
    from frankenmerge.splicing.compatibility import compatibility

    opened = [
        open_donor(donor, download=download, allow_pickle=allow_pickle, weights=False)
        for donor in donors
    ]
    verdict = compatibility(opened)
    told = [_describe(donor) for donor in opened]
    if as_json:
        print_json({"donors": told, "spliceable": not verdict.reasons, **verdict._asdict()})
        return
    made = table("Donors", "", *(Path(str(row["name"])).name for row in told))
    shown = {
        "family": str,
        "blocks": str,
        "width": str,
        "heads": str,
        "kv_heads": str,
        "head_width": str,
        "inner": str,
        "vocabulary": str,
        "positions": str,
        "tied": lambda tied: "yes" if tied else "no",
        "dtype": str,
        "parameters": "{:,}".format,
        "bytes": size,
        "tokenizer": str,
        "fingerprint": lambda text: text[:12] if text else "weights not at hand",
    }
    for key, text in shown.items():
        made.add_row(key.replace("_", " "), *(text(row[key]) for row in told))
    console = out()
    console.print(made)
    if len(opened) > 1:
        console.print(
            "[bold red]These cannot be spliced:[/]"
            if verdict.reasons
            else "[bold green]These can be spliced.[/]",
            markup=True,
        )
        for line in verdict.reasons:
            console.print(f"  - {line}", markup=False)
        if verdict.remarks:
            console.print("Worth knowing:")
        for line in verdict.remarks:
            console.print(f"  - {line}", markup=False)


def _describe(donor: Any) -> dict[str, Any]:
    from frankenmerge.donors.config import head_width, is_tied, quantity

    sizes = {
        key: quantity(donor.config, key)
        for key in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary", "positions")
    }
    return {
        "name": donor.name,
        "family": donor.config["model_type"],
        **sizes,
        "head_width": head_width(donor.config),
        "tied": is_tied(donor.config),
        "dtype": ", ".join(donor.dtypes),
        "parameters": donor.parameters,
        "bytes": donor.bytes,
        "tokenizer": donor.tokenizer_hash or "none",
        "fingerprint": donor.fingerprint if donor.whole else None,
    }


@click.command()
@click.argument("donor")
@output_option("Where the atlas goes, NAME.atlas.safetensors.")
@method_option
@neurons_option
@tokens_option
@click.option(
    "--untrained",
    type=int,
    metavar="SEED",
    help="Analyze random weights of the same config instead: the control.",
)
@device_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def analyze(
    context: click.Context,
    donor: str,
    output: Path,
    method: str,
    neurons: list[int] | None,
    tokens: int | None,
    untrained: int | None,
    device: str,
    dtype: str,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Search DONOR's features over the whole vocabulary and write its atlas.

    Its blocks are read one at a time, so that it may be larger than memory. What is finished when
    this is interrupted is kept, and the same command goes on from there. Under `accelerate launch`
    every process searches its part of the vocabulary.
    """
    from frankenmerge.artefacts.atlas import save_atlas

    refuse_others(context, method, MEANT_FOR)
    how = RunOptions(device, dtype, download, allow_pickle, untrained)
    atlas = atlas_of(donor, how)
    if not own_rank().first:
        return
    if method != "complete":
        atlas = add_inputs(donor, atlas, how, method, neurons, tokens)
    save_atlas(atlas, output)
    if as_json:
        told = {
            "output": str(output),
            "donor": atlas.donor,
            "fingerprint": atlas.fingerprint,
            "contexts": list(atlas.top),
        }
        searched = {name: inputs.neurons.tolist() for name, inputs in atlas.inputs.items()}
        sizes = {"blocks": atlas.blocks, "width": atlas.width, "vocabulary": len(atlas.vocabulary)}
        print_json(told | sizes | {"untrained": untrained, "searched_neurons": searched})
        return
    blocks = sorted({0, 1, atlas.blocks // 2, atlas.blocks})
    made = table(
        f"Most exciting tokens of {Path(atlas.donor).name}, alone",
        "neuron",
        *(f"block {b}" if b else "embedding" for b in blocks),
    )
    for neuron in range(min(4, atlas.width)):
        cells = (
            [atlas.vocabulary[token] for token in atlas.top["plain"].tokens[block, neuron, :3]]
            for block in blocks
        )
        made.add_row(str(neuron), *(" ".join(map(repr, cell)) for cell in cells))
    console = out()
    console.print(made)
    for name, inputs in atlas.inputs.items():
        _, m, n = inputs.tokens.shape
        console.print(
            f"{name}: inputs of {n} tokens for {m} of {atlas.width} neurons in every block"
        )
    console.print(f"Written to {output}", markup=False)


class RunOptions(NamedTuple):
    """How a donor is run."""

    device: str = "cpu"
    dtype: str = "float32"
    download: bool = False
    allow_pickle: bool = False
    untrained: int | None = None


def atlas_of(name: str, how: RunOptions) -> Any:
    """The atlas in a file, or that of a donor: from the cache, or analyzed now."""
    from frankenmerge.artefacts.atlas import load_atlas

    if Path(name).is_file():
        return load_atlas(Path(name))
    from frankenmerge.analysis.analyze import cached_analyze, work
    from frankenmerge.artefacts.recipe import open_donor

    checkpoint = open_donor(name, download=how.download, allow_pickle=how.allow_pickle)
    with progress(f"analyzing {Path(name).name}", work(checkpoint), "inputs x blocks") as advance:
        return cached_analyze(
            checkpoint,
            cache=cache_folder(),
            untrained=how.untrained,
            device=how.device,
            dtype=how.dtype,
            advance=advance,
        )


def add_inputs(
    name: str,
    atlas: Any,
    how: RunOptions,
    method: str,
    neurons: list[int] | None,
    tokens: int | None,
) -> Any:
    """A donor's atlas with the inputs of a greedy or gradient search: from the cache, or searched now."""
    from frankenmerge.analysis.inputs import TOKENS, even_neurons, with_inputs
    from frankenmerge.artefacts.recipe import open_donor

    checkpoint = open_donor(name, download=how.download, allow_pickle=how.allow_pickle)
    neurons = neurons or even_neurons(atlas.width)
    total, unit = (
        (None, "inputs") if method == "greedy" else ((atlas.blocks + 1) * len(neurons), "features")
    )
    with progress(f"{method} search in {Path(name).name}", total, unit) as advance:
        return with_inputs(
            atlas,
            checkpoint,
            method,
            neurons,
            cache=cache_folder(),
            tokens=tokens or TOKENS,
            untrained=how.untrained,
            dtype=how.dtype,
            device=how.device,
            advance=advance,
        )
