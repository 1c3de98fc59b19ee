"""Self-merges as LoRAs over the unrepeated base, in peft's terms (`layer_replication`).

A model that repeats, reorders or leaves out blocks of one donor needs no weights but the donor's:
an adapter names the ranges of blocks, and every occurrence of a block may have a LoRA of its own.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.models.lora import CONFIG_NAME, Adapter, check_peft, find_adapter, is_adapter
from frankenmerge.splicing.operations import Copy
from frankenmerge.splicing.resolve import Splice, resolve


class Unrepeated(NamedTuple):
    """What an adapter of a self-merge says about its base."""

    base: str
    revision: str | None
    ranges: tuple[tuple[int, int], ...]
    """Of the base's blocks, half-open; empty where they are all blocks once, in order."""

    @property
    def settings(self) -> dict[str, Any]:
        """The same as keys of peft's config."""
        ranges = [list(each) for each in self.ranges] or None
        named = {"base_model_name_or_path": self.base, "revision": self.revision}
        return named | {"layer_replication": ranges}


def unrepeated(splice: Splice, remedy: str) -> Unrepeated:
    """The base of a self-merge, and its ranges of blocks.

    Args:
        splice: what an adapter is to be written of.
        remedy: against a splice that no adapter can express.

    Raises:
        FrankenmergeError: for a splice that is more than unchanged blocks of one donor, or that
            peft would make another model of.
    """
    raise_all(_faults(splice, remedy))
    (name,) = splice.donors
    path, revision, lora = reference(name)
    if lora is not None:
        raise fail(f"adapter of {name}", "a base without a LoRA", f"the LoRA {lora}", remedy)
    parts = recipe_of(list(splice.blocks)).parts
    starts = [part.sources[0].layer_range[0] for part in parts]
    ranges = tuple((start, start + part.length) for start, part in zip(starts, parts, strict=True))
    if ranges == ((0, splice.base.blocks),):
        return Unrepeated(path, revision, ())
    _check_peft_repeats(splice, ranges, remedy)
    return Unrepeated(path, revision, ranges)


def _faults(splice: Splice, remedy: str) -> Iterator[Fault]:
    expected = "a recipe of unchanged blocks of one donor, which is the adapter's base"
    if len(splice.donors) > 1:
        yield Fault("adapter", expected, f"the donors {', '.join(splice.donors)}", remedy)
        return
    computed = [each.name for each in splice.operations if not isinstance(each, Copy)]
    if computed:
        found = f"{len(computed)} computed tensors, such as {computed[0]}"
        yield Fault("adapter", expected, found, remedy)
    elif not splice.stacks_whole_blocks:
        yield Fault("adapter", expected, "tensors chosen one by one", remedy)


def _check_peft_repeats(splice: Splice, ranges: tuple[tuple[int, int], ...], remedy: str) -> None:
    """Raise FrankenmergeError where peft cannot repeat blocks, or its model would be another.

    peft changes the list of blocks and their number, and no list in the config that has an entry
    for every block.
    """
    check_peft()
    from peft.tuners.tuners_utils import replicate_layers

    from frankenmerge.models.blank import blank_model, config_object, unquantised

    place = f"adapter of {splice.base.name}"
    model = blank_model(splice.base.config)
    try:
        replicate_layers(model, list(ranges))
    except ValueError as error:
        expected = "a family whose blocks peft can repeat"
        raise fail(place, expected, str(error), remedy) from error
    ours, theirs = config_object(unquantised(splice.config)).to_dict(), model.config.to_dict()
    lists = [key for key, value in ours.items() if isinstance(value, list)]
    if odd := [key for key in lists if theirs.get(key) != ours[key]]:
        expected = "a config without a list of the blocks, which peft does not repeat"
        raise fail(place, expected, ", ".join(odd), remedy)


class Repeated(NamedTuple):
    """A model that an adapter makes of its base by repeating blocks."""

    splice: Splice
    adapter: Adapter


def open_repeated(
    name: str,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    opened: Mapping[str, Checkpoint],
) -> Repeated | None:
    """Open an adapter that repeats blocks, by its own name or as `BASE+ADAPTER`.

    Returns:
        The model without its LoRA, and the LoRA; None for every other model.

    Raises:
        FrankenmergeError: for a base that is not available, and ranges beyond its blocks.
    """
    path, revision, lora = reference(name)
    if lora is None and not is_adapter(name, download=download):
        return None
    adapter = find_adapter(lora or name, download=download)
    if not adapter.replication:
        return None
    base = path + (f"@{revision}" if revision else "") if lora else base_of(name, adapter)
    donor = opened.get(base) or open_checkpoint(base, download=download, allow_pickle=allow_pickle)
    blocks = chain.from_iterable(range(*each) for each in adapter.replication)
    recipe = recipe_of([Block(base, index) for index in blocks])
    place = f"{adapter.path / CONFIG_NAME}: layer_replication"
    return Repeated(resolve(recipe, {base: donor}, place), adapter)


def base_of(name: str, adapter: Adapter) -> str:
    """The base that an adapter's config names. Raises FrankenmergeError where it names none."""
    if adapter.base is None:
        place = f"{adapter.path / CONFIG_NAME}: base_model_name_or_path"
        raise fail(place, "the model that it was trained on", "none", f"name it: BASE+{name}")
    return adapter.base
