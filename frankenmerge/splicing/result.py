"""What a recipe's result is as a whole: its slices, its head, its type, its config."""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from frankenmerge.artefacts.recipe import Block, Recipe
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import STORAGE_KEYS, language, quantity, spliced_config
from frankenmerge.errors import fail
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.vocabulary import Vocabulary
from frankenmerge.storage.dtypes import COMPUTED, DTYPES, STORED_NAMES

Donors = Mapping[str, Checkpoint]
"""Donors by the names that the recipe gives them."""


def spelled_out(
    recipe: Recipe, donors: Donors, place: str = "recipe", *, with_base: bool = False
) -> Recipe:
    """The same recipe with slices instead of whole models.

    Args:
        recipe: any; one of slices is returned as it is.
        donors: from which whole models' depths are read.
        place: where faults are.
        with_base: whether the base model that a method starts from becomes the last source where
            it is none of the models. Whole models are merged with it however few they are.

    Raises:
        FrankenmergeError: for models, the base model among them, of different depth.
    """
    if not (wholes := recipe.stack.models):
        return recipe
    listed = wholes
    base = recipe.base_model if METHODS[recipe.merge_method].base != "none" else None
    if base and all(whole.model != base for whole in wholes):
        listed = [*wholes, Whole(model=base)]
    depths = {whole.model: donors[whole.model].blocks for whole in listed}
    if len(set(depths.values())) > 1:
        found = ", ".join(f"{name} has {blocks}" for name, blocks in depths.items())
        remedy = "write slices that take equal numbers of blocks"
        raise fail(f"{place}: models", "models with equal numbers of blocks", found, remedy)
    sources = [
        Source(model=whole.model, layer_range=[0, depths[whole.model]], parameters=whole.parameters)
        for whole in (listed if with_base else wholes)
    ]
    slices = {"models": None, "slices": [Slice(sources=sources)]}
    if not recipe.modules:
        return recipe.model_copy(update=slices)
    modules = {name: module.model_copy(update=slices) for name, module in recipe.modules.items()}
    return recipe.model_copy(update={"modules": modules})


def is_whole(recipe: Recipe, donors: Donors) -> bool:
    """Whether a spelled-out recipe leaves every block where it is in all of its donors."""
    starts = [0]
    for part in recipe.parts:
        starts.append(starts[-1] + part.length)
    in_place = all(
        source.layer_range[0] == start and donors[source.model].blocks == starts[-1]
        for part, start in zip(recipe.parts, starts, strict=False)
        for source in part.sources
    )
    return in_place and not recipe.final_norm and not recipe.embedding and not recipe.head


def is_result_tied(recipe: Recipe, donors: Donors) -> bool:
    """Whether the result of a spelled-out recipe uses its embedding as its head.

    It does where embedding and head come from the same donors and all of these do: then the merged
    embedding is the merged head. A rotated head has absorbed the final norm's gain, which no
    embedding has.
    """
    if recipe.parts[0].gauge or recipe.parts[-1].gauge:
        return False
    ends = []
    for explicit, names, part in (
        (recipe.embedding, recipe.embedding_donors, recipe.parts[0]),
        (recipe.head, recipe.head_donors, recipe.parts[-1]),
    ):
        merged = not explicit and recipe.merge_method != "passthrough"
        ends.append([*names, part.base_model or recipe.base_model] if merged else names)
    return ends[0] == ends[1] and all(donors[name].tied for name in ends[0] if name)


def result_dtype(recipe: Recipe, donors: Donors) -> str:
    """The type of all tensors of the result, by its name in safetensors."""
    if written := recipe.out_dtype or recipe.dtype:
        return "F32" if written == "float64" else STORED_NAMES[written]
    base = donors[recipe.base]
    if base.quantisation:
        stored = base.config.get("dtype") or base.config.get("torch_dtype")
        return STORED_NAMES[stored or "bfloat16"]
    return next((dtype for dtype in base.dtypes if dtype in COMPUTED), next(iter(base.dtypes)))


def result_config(
    recipe: Recipe, donors: Donors, vocabulary: Vocabulary | None, *, dtype: str, tied: bool
) -> dict[str, Any]:
    """The config of the result of a spelled-out recipe; complete where the base's is."""
    base = donors[recipe.base]
    if is_whole(recipe, donors) and not base.architecture.listed:
        config = deepcopy(base.config)
    else:
        config = spliced_config(base.config, blocks_with_configs(recipe, donors, 0), tied=tied)
    embedding, architecture = donors[recipe.embedding_donors[0]], base.architecture
    text: Any = language(config)
    size = vocabulary.rows if vocabulary else quantity(embedding.config, "vocabulary")
    if size is not None:
        text[architecture.keys.vocabulary] = size
    if architecture.learned_positions:
        text[architecture.keys.positions] = quantity(embedding.config, "positions")
    config.pop("_name_or_path", None)
    if dtype in COMPUTED and not base.quantisation:
        for key in STORAGE_KEYS:
            config.pop(key, None)
    # Loaders from before transformers 5 know the older key alone: keep what the base donor uses.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[dtype].torch_name
    return config


def stored_remarks(base: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Remarks on what the base's config.json says of its file, and the result's does not."""
    return [
        f"{key} of {base.name} is not copied: it says how that donor's file was stored, "
        "and the result's tensors are plain floats"
        for key in STORAGE_KEYS
        if base.config.get(key) and key not in config
    ]


def blocks_with_configs(
    recipe: Recipe, donors: Donors, number: int
) -> list[tuple[Mapping[str, Any], int]]:
    """The config and index of each block that the slices' sources `number` contribute.

    Of a slice with fewer sources, its last source is used.
    """
    return [(donors[name].config, index) for name, index in _blocks_of_source(recipe, number)]


def blocks_by_source(recipe: Recipe) -> list[list[Block]]:
    """Where each block of a spelled-out recipe is from, for each number of a source."""
    numbers = range(max(len(part.sources) for part in recipe.parts))
    return [_blocks_of_source(recipe, number) for number in numbers]


def _blocks_of_source(recipe: Recipe, number: int) -> list[Block]:
    chosen = [part.sources[min(number, len(part.sources) - 1)] for part in recipe.parts]
    return [Block(source.model, index) for source in chosen for index in range(*source.layer_range)]


def depth_within(parameters: int, donors: Iterable[Checkpoint]) -> int:
    """The most blocks of a model of so many parameters, whichever of the donors' blocks they are.

    Raises FrankenmergeError where not even one fits.
    """
    ends, block = 0, 1
    for donor in donors:
        sizes = {
            place: sum(math.prod(donor.tensors[name].shape) for name in names.values())
            for place, names in donor.by_role.items()
        }
        own = {
            role: size
            for (role, index), size in sizes.items()
            if index is None and role != "ignored"
        }
        head = own.get("head", 0) if donor.tied else 0
        ends = max(ends, sum(own.values()) - head)
        block = max(block, *(size for (role, _), size in sizes.items() if role == "block"))
    if parameters < ends + block:
        expected = f"at least {ends + block:,}: embedding, final norm, head and one block"
        raise fail("parameters", expected, f"{parameters:,}", "give a larger budget")
    return (parameters - ends) // block
