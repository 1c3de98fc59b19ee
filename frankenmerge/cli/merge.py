"""`check` and `merge`: from recipes to checkpoints. Other commands write as `merge` does."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
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
from frankenmerge.distributed import own_rank
from frankenmerge.errors import fail
from frankenmerge.models.lora import CONFIG_NAME

if TYPE_CHECKING:
    from frankenmerge.artefacts.recipe import Recipe
    from frankenmerge.merging.write_plan import MergeOptions
    from frankenmerge.merging.writer import Merged
    from frankenmerge.splicing.stages import Stages


raw_option = click.option(
    "--raw",
    is_flag=True,
    help="The recipe's models are safetensors files, or folders of them, without a config: tensors "
    "are matched by name.",
)


@click.command()
@click.argument("target", metavar="RECIPE|MERGED", type=click.Path(path_type=Path))
@raw_option
@download_option
@pickle_option
@json_option
def check(target: Path, raw: bool, download: bool, allow_pickle: bool, as_json: bool) -> None:
    """Validate a recipe against its donors, or verify a finished merge.

    For a RECIPE only configs and headers are read, and the size of its result is reported. For the
    folder MERGED every file is compared with its frankenmerge.json, and copied tensors with their
    donors' bytes, where these donors are available. For the folder of a LoRA that `extract-lora`
    wrote every file is compared.
    """
    if (target / CONFIG_NAME).is_file():
        _verify_lora(target, as_json)
        return
    if target.is_dir():
        _verify(target, download, allow_pickle, as_json)
        return
    from frankenmerge.artefacts.recipe_file import load_recipes
    from frankenmerge.workflows.merging import resolved

    with resolved(
        load_recipes(target),
        download=download,
        allow_pickle=allow_pickle,
        place=str(target),
        raw=raw,
    ) as stages:
        print_remarks(stages.remarks)
        _print_stages(stages, as_json)


def _verify(folder: Path, download: bool, allow_pickle: bool, as_json: bool) -> None:
    from frankenmerge.merging.verify import verify

    found = verify(folder, download=download, allow_pickle=allow_pickle, progress=progress)
    if as_json:
        print_json(found._asdict() | {"output": str(folder)})
        return
    console = out()
    console.print(
        f"{folder}: {found.shards} files and {found.tensors} tensors match "
        f"{folder / 'frankenmerge.json'}; {found.compared} tensors match their donor's bytes, "
        f"{found.hashed} files match their checksum.",
        markup=False,
    )
    for name in found.absent:
        reason = "not found, or changed since the merge"
        console.print(f"Not compared: tensors from {name} ({reason}).", markup=False)


def _verify_lora(folder: Path, as_json: bool) -> None:
    from frankenmerge.merging.lora_files import verify_lora

    count = verify_lora(folder)
    if as_json:
        print_json({"output": str(folder), "hashed": count})
        return
    found = f"{folder}: {count} files match their checksum in {folder / 'frankenmerge.json'}"
    out().print(found, markup=False)


def _print_stages(stages: "Stages", as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    from frankenmerge.splicing.summary import summary

    found = [(splice.recipe, summary(splice)) for splice in stages.all]
    mixture = stages.result.recipe.mixture
    if as_json:
        (recipe, result), before = found[-1], found[:-1]
        named = {each.name: {"recipe": str(each), **size._asdict()} for each, size in before}
        also: dict[str, Any] = {"stages": named} if named else {}
        also |= {"experts": len(mixture.experts)} if mixture else {}
        also |= {"remarks": list(stages.remarks), **(more or {})}
        shown = {key: value for key, value in result._asdict().items() if value is not None}
        print_json({"recipe": str(recipe), **shown} | also)
        return
    console = out()
    for recipe, result in found:
        last = recipe is stages.result.recipe
        title = "The recipe is valid. Its result:" if last else f"Result of stage {recipe.name}"
        made = table(title, "", "")
        memory, cache = result.memory.items(), result.kv_cache_per_token
        rows = {
            "blocks": result.depth,
            "seams": result.seams,
            "tensors": f"{result.tensors:,}",
            "of these computed": f"{result.computed:,}",
            "parameters": f"{result.parameters:,}",
            "weights": f"{size(result.bytes)}, {result.dtype}",
            "memory to load": ", ".join(f"{size(count)} in {dtype}" for dtype, count in memory),
            "KV cache per token": cache if cache is None else size(cache),
        }
        if mixture and last:
            count = f"{len(mixture.experts)}, {mixture.experts_per_token} a token"
            rows = {"experts": f"{count} ({stages.result.config['model_type']})"} | rows
        for name, value in rows.items():
            if value is not None:
                made.add_row(name, str(value))
        console.print(made)
        console.print(str(recipe), markup=False)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
"""As mergekit counts, whose `B` is a billion and not a byte: 500M, 5B."""


def size_in_bytes(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> int | None:
    """Read a size such as 5GB, of 1000 megabytes; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])B?|(B))?\s*", value.upper())
    count = float(match[1]) * _UNITS[match[2] or match[3] or ""] if match else 0
    if not 1 <= count < 1 << 63:
        raise click.BadParameter(f"{value!r} is not a size; write for example 5GB or 500MB")
    return int(count)


_WRITING = (
    click.option(
        "--dry-run", is_flag=True, help="Check everything and report what would be written."
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue an interrupted merge, and keep finished shards if this one fails.",
    ),
    click.option(
        "--shard-size",
        "--out-shard-size",
        default="5GB",
        show_default=True,
        callback=size_in_bytes,
        help="Largest file of weights.",
    ),
    click.option(
        "--reflink/--no-reflink",
        default=True,
        help="Share blocks with the donors where the file system can (XFS, btrfs).",
    ),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="Torch device that computes tensors; copies need none.",
    ),
    click.option(
        "--allow-nan", is_flag=True, help="Allow NaN and Inf in inputs and computed tensors."
    ),
    click.option(
        "--check-finite",
        is_flag=True,
        help="Read all of the donors first, and refuse NaN and Inf in copied tensors too.",
    ),
    click.option(
        "--checksums",
        is_flag=True,
        help="Record the SHA-256 of every file of weights in frankenmerge.json.",
    ),
    click.option(
        "--push-to-hub",
        metavar="REPOSITORY",
        help="Upload the finished merge to a new repository of the hub, org/name.",
    ),
    click.option(
        "--private", is_flag=True, help="With --push-to-hub: make the repository private."
    ),
    download_option,
    pickle_option,
    json_option,
)


def writing_options(command: Callable) -> Callable:
    """Add the options of commands that write a checkpoint."""
    for option in reversed(_WRITING):
        command = option(command)
    return mergekit_options(command)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@raw_option
@click.option(
    "--adapter",
    is_flag=True,
    help="Write a self-merge as a LoRA of zeros for its unrepeated donor (peft's "
    "layer_replication), a few kB.",
)
@click.option(
    "--seed",
    "--random-seed",
    type=click.IntRange(0),
    help="Random seed of methods that drop elements at random. [default: the recipe's]",
)
@writing_options
def merge(recipe: Path, output: Path, seed: int | None, **options: Any) -> None:
    """Write the checkpoint that RECIPE describes to the new folder OUTPUT, complete or not at all.

    Stages that it uses are written to OUTPUT.stages, and made again only if their inputs have
    changed. Under `accelerate launch` the processes share the work of a recipe without stages,
    shard by shard.
    """
    from frankenmerge.artefacts.recipe_file import load_recipes

    recipes = load_recipes(recipe)
    if seed is not None:
        recipes = [each.model_copy(update={"seed": seed}) for each in recipes]
    write_checkpoint(recipes, str(recipe), output, **options)


Before = Callable[["Stages"], dict[str, Any]]
"""Called with the resolved recipes before anything is written; returns what JSON gets besides."""


def write_checkpoint(
    recipes: "Sequence[Recipe]",
    place: str,
    output: Path,
    *,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
    raw: bool = False,
    adapter: bool = False,
    cuda: bool = False,
    before: Before = lambda _: {},
    **options: Any,
) -> None:
    """Resolve recipes, write the result and print what was written.

    Args:
        recipes: the stages of one file.
        place: where they are from.
        output: a folder that does not exist yet.
        dry_run: only check, and report what would be written.
        push_to_hub: the repository to upload to.
        private: whether that is private.
        download: whether donors may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        as_json: print JSON.
        raw: models are files of tensors without a config.
        adapter: write an adapter of a self-merge in place of a checkpoint.
        cuda: compute on the first GPU.
        before: what else is done and printed first.
        options: those of `MergeOptions`.
    """
    from frankenmerge.artefacts import evaluation as evaluations
    from frankenmerge.merging.write_plan import MergeOptions
    from frankenmerge.splicing.computing import extension_remarks
    from frankenmerge.storage.hub import check_push, push
    from frankenmerge.workflows.merging import check_merge, merge_stages, resolved

    rank = own_rank()
    if cuda:
        options["device"] = "cuda"
    if options["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = MergeOptions(**options)
    with resolved(
        recipes, download=download, allow_pickle=allow_pickle, place=place, raw=raw
    ) as stages:
        if (adapter or len(stages.all) > 1) and not rank.first:
            return
        if adapter:
            if push_to_hub or private:
                raise fail("--adapter", "no upload", "--push-to-hub", "upload it with hf upload")
            _check_adapter_options(chosen)
            print_remarks(stages.remarks)
            _write_adapter(stages, output, dry_run, as_json)
            return
        if dry_run or len(stages.all) > 1:
            check_merge(stages, output, chosen, rank)
        if private and not push_to_hub:
            remedy = "name the repository, or leave --private out"
            raise fail("--private", "--push-to-hub", "none", remedy)
        if push_to_hub and rank.first:
            check_push(push_to_hub)
        print_remarks(stages.remarks)
        operations = [each for splice in stages.all for each in splice.operations]
        print_remarks(extension_remarks(operations, chosen.device))
        also = before(stages) if rank.first else {}
        if dry_run:
            _print_stages(stages, as_json, also)
            return
        result = merge_stages(
            stages,
            output,
            chosen,
            rank=rank,
            download=download,
            allow_pickle=allow_pickle,
            progress=progress,
            measured=evaluations.beside(Path(place)),
        )
    if not rank.first:
        return
    address = push(result.output, push_to_hub, private=private) if push_to_hub else None
    if as_json:
        also |= {"repository": address} if address else {}
        also["remarks"] = list(stages.remarks)
        print_json(result._asdict() | {"output": str(result.output)} | also)
        return
    _print_merged(result)
    if address:
        out().print(f"Uploaded to {address}", markup=False)


def _check_adapter_options(options: "MergeOptions") -> None:
    """Refuse options of shards and arithmetic: an adapter is one small file of zeros."""
    given = [
        "--" + field.name.replace("_", "-")
        for field in fields(options)
        if getattr(options, field.name) != field.default
    ]
    if given:
        expected = "no options of how tensors are computed and divided into files"
        raise fail("--adapter", expected, ", ".join(given), "leave them out")


def _write_adapter(stages: "Stages", output: Path, dry_run: bool, as_json: bool) -> None:
    from frankenmerge.workflows.merging import write_stages_as_adapter

    base = write_stages_as_adapter(stages, output, dry=dry_run)
    if as_json:
        print_json({"output": str(output), **base.settings, "remarks": list(stages.remarks)})
        return
    ranges = ", ".join(f"{start}-{stop - 1}" for start, stop in base.ranges)
    said = "can be written" if dry_run else "is written"
    out().print(
        f"{output}: an adapter for {base.base} and its blocks {ranges} {said}", markup=False
    )


def _print_merged(result: "Merged") -> None:
    copied = result.tensors - result.computed
    made = f"all {'computed' if result.computed else 'copied unchanged from their donors'}"
    if copied and result.computed:
        made = f"{result.computed} computed, {copied} copied unchanged from their donors"
    kept = f"; {result.kept} files of weights kept from an earlier run" if result.kept else ""
    rate = f"{size(result.bytes)} in {result.seconds:.1f} s"
    out().print(f"{result.output}: {result.tensors} tensors, {made}{kept} ({rate})", markup=False)
