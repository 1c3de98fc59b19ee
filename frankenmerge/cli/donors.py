"""`inspect` and `analyze`: describe one donor, and compare several."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    print_remarks,
    progress,
    refuse_others,
    size,
    table,
)
from frankenmerge.cli.dry_run import dry_run_option, print_cost
from frankenmerge.distributed import own_rank

if TYPE_CHECKING:
    from frankenmerge.artefacts.atlas import Atlas
    from frankenmerge.donors.checkpoint import Checkpoint

INPUT_METHODS = ("greedy", "ascent", "gradient")
method_option = click.option(
    "--method",
    type=click.Choice(["complete", *INPUT_METHODS, "pixels"]),
    default="complete",
    show_default=True,
    help="Search to add to the complete one, for some neurons: inputs of several tokens; images "
    "(pixels, for vision transformers).",
)
images_option = click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of PNG and JPEG files that vision transformers are shown. "
    "[default: 1,024 images of noise]",
)
neurons_option = click.option(
    "--neurons",
    callback=numbers,
    help="Neurons, such as 0-3 or 1,4,8 (for all but complete). [default: 16, evenly spaced]",
)
tokens_option = click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Number of tokens in an input (greedy, ascent and gradient). [default: 4]",
)
MEANT_FOR: dict[str, tuple[str, ...]] = {
    "neurons": (*INPUT_METHODS, "pixels"),
    "tokens": INPUT_METHODS,
}


@click.command()
@click.argument("donors", nargs=-1, required=True)
@download_option
@pickle_option
@json_option
def inspect(donors: tuple[str, ...], download: bool, allow_pickle: bool, as_json: bool) -> None:
    """Describe DONORS and check whether they can be spliced, from configs and headers alone.

    Nothing else is fetched from the hub. With --allow-pickle, a donor without safetensors is
    converted first and cached.
    """
    from frankenmerge.splicing.inspection import compared
    from frankenmerge.splicing.opening import open_donor

    opened = [
        open_donor(donor, download=download, allow_pickle=allow_pickle, weights=False)
        for donor in donors
    ]
    verdict = compared(opened)
    rows = [_describe(donor) for donor in opened]
    if as_json:
        print_json({"donors": rows, "spliceable": not verdict.reasons, **verdict._asdict()})
        return
    summary = table("Donors", "", *(Path(str(row["name"])).name for row in rows))
    formats = {
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
        "fingerprint": lambda text: text[:12] if text else "weights not available",
    }
    if any(row["images"] for row in rows):
        formats = {"family": str, "images": _images} | formats
    for key, text in formats.items():
        summary.add_row(key.replace("_", " "), *(text(row[key]) for row in rows))
    console = out()
    console.print(summary)
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
            console.print("Notes:")
        for line in verdict.remarks:
            console.print(f"  - {line}", markup=False)


def _images(images: dict[str, int] | None) -> str:
    """What a vision transformer is shown."""
    if images is None:
        return "none: a language model"
    return "{height} x {width} x {channels}, patches of {patch}".format(**images)


def _describe(donor: "Checkpoint") -> dict[str, Any]:
    from frankenmerge.donors.config import head_width, quantity
    from frankenmerge.donors.images import image_shape, is_vision

    sizes = {
        key: quantity(donor.config, key)
        for key in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary", "positions")
    }
    images = None
    if is_vision(donor.config):
        shape = image_shape(donor)
        images = {key: getattr(shape, key) for key in ("height", "width", "channels", "patch")}
    return {
        "name": donor.name,
        "family": donor.config["model_type"],
        "images": images,
        **sizes,
        "head_width": head_width(donor.config),
        "tied": donor.tied and not images,
        "dtype": ", ".join(donor.dtypes),
        "parameters": donor.parameters,
        "bytes": donor.bytes,
        "tokenizer": donor.tokenizer_hash or "none",
        "fingerprint": donor.fingerprint if donor.whole else None,
    }


@click.command()
@click.argument("donor")
@output_option("File for the atlas, NAME.atlas.safetensors.")
@method_option
@neurons_option
@tokens_option
@click.option(
    "--untrained",
    type=int,
    metavar="SEED",
    help="Analyze random weights of the same config instead: the control.",
)
@dry_run_option
@images_option
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
    dry_run: bool,
    images: Path | None,
    device: str,
    dtype: str,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Search DONOR's features over the whole vocabulary and write its atlas.

    Blocks are read one at a time, so the donor may be larger than memory. After an interruption,
    the same command continues from the last finished block. Under `accelerate launch` every process
    searches its share of the vocabulary.

    Of a vision transformer, the features are searched among the images of a folder, or of noise.
    """
    from frankenmerge.artefacts.atlas import save_atlas
    from frankenmerge.workflows.atlases import add_inputs, atlas_of

    refuse_others(context, method, MEANT_FOR)
    if dry_run:
        from frankenmerge.splicing.opening import open_donor
        from frankenmerge.workflows.costs import analyze_cost

        opened = open_donor(donor, download=download, allow_pickle=allow_pickle, weights=False)
        cost = analyze_cost(
            opened,
            dtype=dtype,
            method=method,
            neurons=neurons,
            tokens=tokens,
            untrained=untrained is not None,
        )
        print_cost("analyze", cost, dtype=dtype, device=device, as_json=as_json)
        return
    run: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "download": download,
        "allow_pickle": allow_pickle,
        "untrained": untrained,
        "progress": progress,
    }
    atlas = atlas_of(donor, images=images, **run)
    if not own_rank().first:
        return
    if method != "complete":
        atlas = add_inputs(donor, atlas, method, neurons, tokens, **run)
    save_atlas(atlas, output)
    skipped = atlas.provenance.get("skipped_blocks", [])
    remarks = [f"text alone skips block {block}: its output is its input" for block in skipped]
    print_remarks(remarks)
    if as_json:
        print_json(_atlas_as_json(atlas, output, untrained) | {"remarks": remarks})
        return
    console = out()
    console.print(_best_tokens(atlas))
    for name, inputs in atlas.inputs.items():
        _, m, n = inputs.tokens.shape
        console.print(
            f"{name}: inputs of {n} tokens for {m} of {atlas.width} neurons in every block"
        )
    if atlas.pictures:
        count = len(atlas.pictures.neurons)
        console.print(f"pixels: images for {count} of {atlas.width} neurons in every block")
    console.print(f"Written to {output}", markup=False)


def _atlas_as_json(atlas: "Atlas", output: Path, untrained: int | None) -> dict[str, Any]:
    return {
        "output": str(output),
        "donor": atlas.donor,
        "fingerprint": atlas.fingerprint,
        "contexts": list(atlas.top),
        "blocks": atlas.blocks,
        "width": atlas.width,
        "vocabulary": len(atlas.vocabulary),
        "untrained": untrained,
        "searched_neurons": {name: inputs.neurons.tolist() for name, inputs in atlas.inputs.items()}
        | ({"pixels": atlas.pictures.neurons.tolist()} if atlas.pictures else {}),
    }


def _best_tokens(atlas: "Atlas"):
    """A table of the best tokens of a few neurons in a few blocks."""
    blocks = sorted({0, 1, atlas.blocks // 2, atlas.blocks})
    rows = table(
        f"Top-activating images of {Path(atlas.donor).name}"
        if atlas.of_images
        else f"Top-activating tokens of {Path(atlas.donor).name}, without BOS",
        "neuron",
        *(f"block {b}" if b else "embedding" for b in blocks),
    )
    for neuron in range(min(4, atlas.width)):
        cells = (
            [atlas.vocabulary[token] for token in atlas.top["plain"].tokens[block, neuron, :3]]
            for block in blocks
        )
        rows.add_row(str(neuron), *(" ".join(map(repr, cell)) for cell in cells))
    return rows
