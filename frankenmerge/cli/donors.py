"""`inspect` and `analyze`: what one donor is, and what several have in common."""

from pathlib import Path
from typing import Any

import click

from frankenmerge.cli.console import device_option, download_option, dtype_option, json_option, out, print_json, progress, size, table
from frankenmerge.processes import own_share


@click.command()
@click.argument("donors", nargs=-1, required=True)
@download_option
@json_option
def inspect(donors: tuple[str, ...], download: bool, as_json: bool) -> None:
    """Tell what DONORS are and whether their blocks can be spliced, from configs and headers alone."""
    from frankenmerge.checkpoint import open_checkpoint
    from frankenmerge.splice import compatibility

    opened = [open_checkpoint(donor, download=download) for donor in donors]
    verdict = compatibility(opened)
    told = [_describe(donor) for donor in opened]
    if as_json:
        print_json({"donors": told, "spliceable": not verdict.reasons, **verdict._asdict()})
        return
    made = table("Donors", "", *(Path(str(row["name"])).name for row in told))
    shown = {
        "family": str, "blocks": str, "width": str, "heads": str, "kv_heads": str, "head_width": str, "inner": str, "vocabulary": str,
        "positions": str, "tied": lambda tied: "yes" if tied else "no", "dtype": str, "parameters": "{:,}".format, "bytes": size,
        "tokenizer": str, "fingerprint": lambda text: text[:12],
    }  # fmt: skip
    for key, text in shown.items():
        made.add_row(key.replace("_", " "), *(text(row[key]) for row in told))
    console = out()
    console.print(made)
    if len(opened) > 1:
        console.print("[bold red]These cannot be spliced:[/]" if verdict.reasons else "[bold green]These can be spliced.[/]")
        for line in verdict.reasons:
            console.print(f"  - {line}", markup=False)
        if verdict.remarks:
            console.print("Worth knowing:")
        for line in verdict.remarks:
            console.print(f"  - {line}", markup=False)


def _describe(donor: Any) -> dict[str, Any]:
    from frankenmerge.architectures import head_width, is_tied, quantity

    sizes = {key: quantity(donor.config, key) for key in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary", "positions")}
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
        "fingerprint": donor.fingerprint,
    }


@click.command()
@click.argument("donor")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the atlas goes, NAME.atlas.safetensors.")
@device_option
@dtype_option
@download_option
@json_option
def analyze(donor: str, output: Path, device: str, dtype: str, download: bool, as_json: bool) -> None:
    """Search DONOR's features over the whole vocabulary and write its atlas.

    Its blocks are read one at a time, so that it may be larger than memory. What is finished when this is interrupted is
    kept, and the same command goes on from there. Under `accelerate launch` every process searches its part of the vocabulary.
    """
    from frankenmerge.atlas import save_atlas

    atlas = atlas_of(donor, device=device, dtype=dtype, download=download)
    if not own_share().first:
        return
    save_atlas(atlas, output)
    if as_json:
        told = {"output": str(output), "donor": donor, "fingerprint": atlas.fingerprint, "contexts": list(atlas.top)}
        print_json(told | {"blocks": atlas.blocks, "width": atlas.width, "vocabulary": len(atlas.vocabulary)})
        return
    blocks = sorted({0, 1, atlas.blocks // 2, atlas.blocks})
    made = table(f"Most exciting tokens of {Path(donor).name}, alone", "neuron", *(f"block {b}" if b else "embedding" for b in blocks))
    for neuron in range(min(4, atlas.width)):
        cells = ([atlas.vocabulary[token] for token in atlas.top["plain"].tokens[block, neuron, :3]] for block in blocks)
        made.add_row(str(neuron), *(" ".join(map(repr, cell)) for cell in cells))
    out().print(made)
    out().print(f"Written to {output}", markup=False)


def atlas_of(name: str, *, device: str = "cpu", dtype: str = "float32", download: bool = False) -> Any:
    """The atlas in a file, or that of a donor: from the cache, or analyzed now."""
    from frankenmerge.atlas import load_atlas

    if Path(name).is_file():
        return load_atlas(Path(name))
    from frankenmerge.analysis.analyze import cached_analyze, work
    from frankenmerge.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(name, download=download)
    with progress(f"analyzing {Path(name).name}", work(checkpoint), "inputs x blocks") as advance:
        return cached_analyze(checkpoint, cache=cache_folder(), device=device, dtype=dtype, progress=advance)


def cache_folder() -> Path:
    """Where atlases are kept."""
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmerge"
