"""Whether blocks of several donors can be stacked, and what the stack's config is. Reads configs and headers alone."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.architectures import differences, is_tied, quantity, spliced_config
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.errors import Fault, raise_all
from frankenmerge.gauge import gauge_faults
from frankenmerge.recipe import Recipe

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""What config.json calls the types of safetensors."""


class Compatibility(NamedTuple):
    """What stands in the way of splicing donors."""

    reasons: list[str]
    """Each forbids a splice."""
    remarks: list[str]
    """Each is worth knowing and forbids nothing."""


def compatibility(donors: list[Checkpoint]) -> Compatibility:
    """Compare donors pair by pair: could one model hold blocks of all of them?"""
    reasons, remarks = [], []
    for first, other in combinations(donors, 2):
        pair = f"{first.name} | {other.name}"
        forbidding, harmless = differences(first.config, other.config)
        # Other sizes mean other shapes in every tensor: the sizes tell it.
        forbidding = forbidding or _tensor_differences(first, other)
        if first.tokenizer_hash != other.tokenizer_hash:
            harmless.append("tokenizer: not the same; the result gets one of them")
        for key in ("vocabulary", "positions"):
            sizes = quantity(first.config, key), quantity(other.config, key)
            if sizes[0] != sizes[1]:
                harmless.append(f"{key}: {sizes[0]} and {sizes[1]}; the result has the base donor's")
        reasons += [f"{pair}: {told}" for told in forbidding]
        remarks += [f"{pair}: {told}" for told in harmless]
    return Compatibility(reasons, remarks)


def _tensor_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Compare the tensors of the donors' first blocks, names, shapes and types."""
    if first.config["model_type"] != other.config["model_type"]:
        return []
    described = [
        {canonical: checkpoint.tensors[name] for canonical, name in checkpoint.by_role["block", 0].items()} for checkpoint in (first, other)
    ]
    told = []
    for canonical in sorted(set(described[0]) | set(described[1])):
        a, b = (tensors.get(canonical) for tensors in described)
        if a is None or b is None:
            told.append(f"{canonical.format(0)}: only in {first.name if a else other.name}")
        elif a.shape != b.shape:
            told.append(f"{canonical.format(0)}: shapes {list(a.shape)} and {list(b.shape)}")
        elif a.dtype != b.dtype:
            told.append(f"{canonical.format(0)}: types {a.dtype} and {b.dtype}")
    return told


def untied(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> bool:
    """Whether the result needs a head of its own: the head belongs to the last donor, the embedding to the first.

    A turned head has taken in the final norm's gain, which the embedding has not.
    """
    first, last = recipe.sources[0].model, recipe.sources[-1].model
    turned = recipe.slices[0].gauge or recipe.slices[-1].gauge
    return first != last or turned is not None or not is_tied(donors[last].config)


def result_config(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The config.json of the result."""
    blocks = [(donors[block.model].config, block.index) for block in recipe.blocks]
    base = donors[recipe.base]
    config = spliced_config(base.config, blocks, tied=not untied(recipe, donors))
    embedding, architecture = donors[recipe.sources[0].model], base.architecture
    config[architecture.keys.vocabulary] = quantity(embedding.config, "vocabulary")
    if architecture.learned_positions:
        config[architecture.keys.positions] = quantity(embedding.config, "positions")
    config.pop("_name_or_path", None)
    # Loaders from before transformers 5 know the older name alone: keep whichever the base donor uses.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[next(iter(base.dtypes))]
    return config


def recipe_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe") -> list[Fault]:
    """Everything that keeps `recipe` from becoming a model, found before anything is written."""
    faults = [*_range_faults(recipe, donors, place), *_gauge_faults(recipe, donors, place)]
    opened = {id(donor): donor for donor in donors.values()}
    for reason in compatibility(list(opened.values())).reasons:
        faults.append(Fault(place, "donors whose blocks one config can describe", reason, "splice donors of one family and shape"))
    first, last = recipe.sources[0].model, recipe.sources[-1].model
    sizes = [quantity(donors[name].config, "vocabulary") for name in (first, last)]
    if sizes[0] != sizes[1]:
        faults.append(
            Fault(place, "first and last slice of donors with one vocabulary", f"{sizes[0]} and {sizes[1]} tokens",
                  "begin and end with slices of the same donor")
        )  # fmt: skip
    if not donors[recipe.tokenizer].has_tokenizer:
        remedy = "put tokenizer.json there, or name another donor in tokenizer_source"
        faults.append(Fault(str(donors[recipe.tokenizer].path), "a tokenizer", "none", remedy))
    for name, donor in donors.items():
        floating = [dtype for dtype in donor.dtypes if dtype in DTYPE_NAMES]
        if len(donor.dtypes) != 1 or len(floating) != 1:
            faults.append(Fault(name, "tensors of one floating type", ", ".join(donor.dtypes), "use an unquantised donor"))
        elif recipe.dtype and recipe.dtype != DTYPE_NAMES[floating[0]]:
            faults.append(
                Fault(f"{place}: dtype", f"{DTYPE_NAMES[floating[0]]}, the type of {name}", recipe.dtype,
                      "remove dtype: a passthrough copies the donors' bytes")
            )  # fmt: skip
    return faults


def _range_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str) -> Iterator[Fault]:
    for number, source in enumerate(recipe.sources):
        blocks = donors[source.model].blocks
        if source.layer_range[1] > blocks:
            where = f"{place}: slices[{number}].sources[0].layer_range"
            yield Fault(where, f"a range within [0, {blocks}], the blocks of {source.model}", str(source.layer_range), "shorten the range")


def _gauge_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str) -> Iterator[Fault]:
    for number, part in enumerate(recipe.slices):
        if part.gauge is None:
            continue
        where, donor = f"{place}: slices[{number}].gauge", donors[part.sources[0].model]
        if part.gauge.to == "previous" and number == 0:
            yield Fault(f"{where}.to", "base, for the first slice", "previous", "correct the recipe")
        if part.gauge.fit != "probes" and not Path(part.gauge.fit).is_file():
            yield Fault(f"{where}.fit", "probes, or a text file", part.gauge.fit, "correct the path")
        other = donors[recipe.base if part.gauge.to == "base" else recipe.sources[max(0, number - 1)].model]
        if donor.tokenizer_hash != other.tokenizer_hash:
            yield Fault(
                where, f"the tokenizer of {other.name}, so that both see the same tokens", "another one", "turn donors that share one"
            )
        names = [
            name
            for role in ("block", "embedding", "final", "head")
            for name in donor.by_role.get((role, 0 if role == "block" else None), {})
        ]
        yield from gauge_faults(donor.architecture, names, where)


def validated(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe") -> Recipe:
    """Return `recipe`, or raise FrankenmergeError with everything that is wrong with it."""
    raise_all(recipe_faults(recipe, donors, place))
    return recipe
