"""Whether donors can be put together as a recipe says, and what the result's config is. Reads configs and headers alone."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import block_kind, differences, is_tied, quantity, spliced_config
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.splicing.rotation import gauge_faults
from frankenmerge.splicing.vocabulary import result_vocabulary

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""What config.json calls the types of safetensors."""
STORED_AS = {name: stored for stored, name in DTYPE_NAMES.items()}


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
        if set(first.dtypes) != set(other.dtypes):
            harmless.append(
                f"types {', '.join(first.dtypes)} and {', '.join(other.dtypes)}; the recipe has to say dtype"
            )
        if first.tokenizer_hash != other.tokenizer_hash:
            harmless.append("tokenizer: not the same; the result gets one of them")
        for key in ("vocabulary", "positions"):
            sizes = quantity(first.config, key), quantity(other.config, key)
            if sizes[0] != sizes[1]:
                harmless.append(
                    f"{key}: {sizes[0]} and {sizes[1]}; the result has the base donor's"
                )
        reasons += [f"{pair}: {told}" for told in forbidding]
        remarks += [f"{pair}: {told}" for told in harmless]
    return Compatibility(reasons, remarks)


def _tensor_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Compare the tensors of the donors' blocks, names and shapes: the first of each kind that both have."""
    if first.config["model_type"] != other.config["model_type"]:
        return []
    firsts = [_first_of_kind(donor) for donor in (first, other)]
    told: list[str] = []
    for kind in (kind for kind in firsts[0] if kind in firsts[1]):
        shapes = [
            _shapes(donor, "block", own[kind])
            for donor, own in zip((first, other), firsts, strict=True)
        ]
        told += [
            line.format(firsts[0][kind])
            for line in _shape_differences(shapes, (first.name, other.name))
        ]
    return told


def _shape_differences(
    shapes: Iterable[Mapping[str, tuple]], names: tuple[str, str]
) -> Iterator[str]:
    first, other = shapes
    for canonical in sorted(set(first) | set(other)):
        a, b = first.get(canonical), other.get(canonical)
        if a is None or b is None:
            yield f"{canonical}: only in {names[0] if b is None else names[1]}"
        elif a != b:
            yield f"{canonical}: shapes {list(a)} and {list(b)}"


def spelled_out(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    place: str = "recipe",
    *,
    with_base: bool = False,
) -> Recipe:
    """The same recipe with slices in place of whole models.

    Args:
        recipe: any; one of slices is returned as it is.
        donors: tell how many blocks whole models have.
        place: what the fault's place begins with.
        with_base: whether a base model that is none of the models becomes the last source.

    Raises:
        FrankenmergeError: for models of different depth.
    """
    if not (wholes := recipe.stack.models):
        return recipe
    if (
        with_base
        and recipe.base_model
        and all(whole.model != recipe.base_model for whole in wholes)
    ):
        wholes = [*wholes, Whole(model=recipe.base_model)]
    depths = {whole.model: donors[whole.model].blocks for whole in wholes}
    if len(set(depths.values())) > 1:
        found = ", ".join(f"{name} has {blocks}" for name, blocks in depths.items())
        raise fail(
            f"{place}: models",
            "models of as many blocks each",
            found,
            "write slices that take as many blocks of each",
        )
    sources = [
        Source(model=whole.model, layer_range=[0, depths[whole.model]], parameters=whole.parameters)
        for whole in wholes
    ]
    slices = {"models": None, "slices": [Slice(sources=sources)]}
    if recipe.modules:
        return recipe.model_copy(
            update={
                "modules": {
                    name: module.model_copy(update=slices)
                    for name, module in recipe.modules.items()
                }
            }
        )
    return recipe.model_copy(update=slices)


def _first_of_kind(donor: Checkpoint) -> dict[tuple, int]:
    return {block_kind(donor.config, index): index for index in reversed(range(donor.blocks))}


def untied(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> bool:
    """Whether the result of a spelled-out recipe needs a head of its own.

    It needs none where embedding and head come from the same donors and all of these use the
    embedding as head; then the merged embedding is the merged head. A rotated head has taken in the
    final norm's gain, which no embedding has.
    """
    if recipe.parts[0].gauge or recipe.parts[-1].gauge:
        return True
    ends = []
    for explicit, names, part in (
        (recipe.embedding, recipe.embedding_donors, recipe.parts[0]),
        (recipe.head, recipe.head_donors, recipe.parts[-1]),
    ):
        merged = not explicit and recipe.merge_method != "passthrough"
        ends.append([*names, part.base_model or recipe.base_model] if merged else names)
    return ends[0] != ends[1] or not all(is_tied(donors[name].config) for name in ends[0] if name)


def result_dtype(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> str:
    """The type of all tensors of the result, as safetensors names it."""
    return (
        STORED_AS[written]
        if (written := recipe.out_dtype or recipe.dtype)
        else next(iter(donors[recipe.base].dtypes))
    )


def result_config(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The config.json of the result."""
    recipe = spelled_out(recipe, donors)
    base = donors[recipe.base]
    config = spliced_config(
        base.config, _blocks(recipe, donors, 0), tied=not untied(recipe, donors)
    )
    embedding, architecture = donors[recipe.embedding_donors[0]], base.architecture
    matched = result_vocabulary(recipe, donors)
    config[architecture.keys.vocabulary] = (
        matched.rows if matched else quantity(embedding.config, "vocabulary")
    )
    if architecture.learned_positions:
        config[architecture.keys.positions] = quantity(embedding.config, "positions")
    config.pop("_name_or_path", None)
    # Loaders from before transformers 5 know the older name alone: keep whichever the base donor
    # uses.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[
        result_dtype(recipe, donors)
    ]
    return config


def _blocks(
    recipe: Recipe, donors: Mapping[str, Checkpoint], number: int
) -> list[tuple[Mapping[str, Any], int]]:
    """(config of its donor, its index there) of the blocks that each slice's source `number` gives; of its last where it has fewer."""
    chosen = [part.sources[min(number, len(part.sources) - 1)] for part in recipe.parts]
    return [
        (donors[source.model].config, index)
        for source in chosen
        for index in range(*source.layer_range)
    ]


def recipe_faults(
    recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe"
) -> list[Fault]:
    """Everything that keeps the donors from being put together as `recipe` says, whatever the method."""
    faults = [*_range_faults(recipe, donors, place), *_gauge_faults(recipe, donors, place)]
    opened = list(
        {id(donor): donor for name in recipe.tensor_donors if (donor := donors[name])}.values()
    )
    reasons = compatibility(opened).reasons
    for reason in reasons:
        faults.append(
            Fault(
                place,
                "donors whose blocks one config can describe",
                reason,
                "splice donors of one family and shape",
            )
        )
    if not donors[recipe.tokenizer_donor].has_tokenizer:
        remedy = "put tokenizer.json there, or name another donor in tokenizer_source"
        faults.append(
            Fault(str(donors[recipe.tokenizer_donor].path), "a tokenizer", "none", remedy)
        )
    faults += _type_faults(recipe, donors, place)
    if not reasons and not any(
        "layer_range" in fault.place or fault.place.endswith("models") for fault in faults
    ):
        faults += _pairing_faults(spelled_out(recipe, donors), donors, place)
    return faults


def _range_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str) -> Iterator[Fault]:
    try:
        recipe = spelled_out(recipe, donors, place)
    except FrankenmergeError as error:
        yield from error.faults
        return
    prefix = f"modules.{next(iter(recipe.modules))}." if recipe.modules else ""
    for number, part in enumerate(recipe.parts):
        for entry, source in enumerate(part.sources):
            blocks = donors[source.model].blocks
            if source.layer_range[1] > blocks:
                where = f"{place}: {prefix}slices[{number}].sources[{entry}].layer_range"
                yield Fault(
                    where,
                    f"a range within [0, {blocks}], the blocks of {source.model}",
                    str(source.layer_range),
                    "shorten the range",
                )


def _gauge_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str) -> Iterator[Fault]:
    parts = recipe.stack.slices or []
    prefix = f"modules.{next(iter(recipe.modules))}." if recipe.modules else ""
    for number, part in enumerate(parts):
        if part.gauge is None:
            continue
        where, source = f"{place}: {prefix}slices[{number}].gauge", part.sources[0]
        if recipe.merge_method != "passthrough" or len(part.sources) > 1:
            yield Fault(
                where,
                "a slice of one source, in a passthrough",
                f"one of {recipe.merge_method}",
                "merge first, then rotation the stage",
            )
            continue
        if any(level.parameters for level in (recipe, recipe.stack, part, source)):
            yield Fault(
                where, "a slice without parameters", "some", "remove the parameters, or the gauge"
            )
        ends = {
            "embedding": (0, recipe.embedding),
            "final_norm": (-1, recipe.final_norm),
            "head": (-1, recipe.head),
        }
        for key in (key for key, (end, named) in ends.items() if named and part is parts[end]):
            yield Fault(
                f"{place}: {key}",
                "none beside a gauge, which rotations it with its slice",
                "one",
                f"remove {key}, or the gauge",
            )
        if part.gauge.to == "previous" and number == 0:
            yield Fault(
                f"{where}.to", "base, for the first slice", "previous", "correct the recipe"
            )
        if part.gauge.fit != "probes" and not Path(part.gauge.fit).is_file():
            yield Fault(
                f"{where}.fit", "probes, or a text file", part.gauge.fit, "correct the path"
            )
        donor = donors[source.model]
        other = donors[
            recipe.base if part.gauge.to == "base" else parts[max(0, number - 1)].sources[0].model
        ]
        if donor.tokenizer_hash != other.tokenizer_hash:
            expected = f"the tokenizer of {other.name}, so that both see the same tokens"
            yield Fault(where, expected, "another one", "rotation donors that share one")
        roles = [
            *(("block", index) for index in range(*source.layer_range)),
            ("embedding", None),
            ("final", None),
            ("head", None),
        ]
        names = {name: None for role in roles for name in donor.by_role.get(role, {})}
        yield from gauge_faults(donor.architecture, names, where)


def _type_faults(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str) -> Iterator[Fault]:
    types = {name: donors[name].dtypes for name in recipe.tensor_donors}
    for name, stored in types.items():
        if unfit := [dtype for dtype in stored if dtype not in DTYPE_NAMES]:
            yield Fault(
                name, "tensors of floating types", ", ".join(unfit), "use an unquantised donor"
            )
    if (
        not recipe.dtype
        and not recipe.out_dtype
        and len({dtype for stored in types.values() for dtype in stored if dtype in DTYPE_NAMES})
        > 1
    ):
        found = "; ".join(
            f"{name}: {', '.join(DTYPE_NAMES.get(dtype, dtype) for dtype in stored)}"
            for name, stored in types.items()
        )
        yield Fault(
            f"{place}: dtype",
            "donors of one floating type, or dtype",
            found,
            "say dtype: it is the type of the result's tensors",
        )


def _pairing_faults(
    recipe: Recipe, donors: Mapping[str, Checkpoint], place: str
) -> Iterator[Fault]:
    """What is not alike though it is merged or has to fit together: tensors, per-block settings, vocabularies."""
    remedy = "merge blocks that have the same tensors"
    for part in recipe.parts:
        first = part.sources[0]
        for other in part.sources[1:]:
            for left, right in zip(
                range(*first.layer_range), range(*other.layer_range), strict=True
            ):
                shapes = [
                    _shapes(donors[name], "block", index)
                    for name, index in ((first.model, left), (other.model, right))
                ]
                names = f"{first.model} block {left}", f"{other.model} block {right}"
                for told in _shape_differences(shapes, names):
                    yield Fault(
                        place, "blocks of the same tensors to merge", told.format("*"), remedy
                    )
    runs = [
        _blocks(recipe, donors, number)
        for number in range(max(len(part.sources) for part in recipe.parts))
    ]
    for setting in donors[recipe.base].architecture.per_block:
        first, *others = ([setting.of(config, index) for config, index in run] for run in runs)
        for other in (other for other in others if other != first):
            found = f"{first} and {other}"[:400]
            yield Fault(
                f"{place}: {setting.key}",
                "the same setting in all blocks that are merged into one",
                found,
                "shift the ranges",
            )
    ends = {
        "embedding": recipe.embedding_donors,
        "final": recipe.final_donors,
        "head": recipe.head_donors,
    }
    for role, names in ends.items():
        if role == "final" or recipe.vocabulary is None:
            for name in names[1:]:
                shapes = [_shapes(donors[donor], role, None) for donor in (names[0], name)]
                for told in _shape_differences(shapes, (names[0], name)):
                    yield Fault(
                        f"{place}: {role}",
                        "tensors of the same names and shapes to merge",
                        told,
                        _MATCH_TOKENS,
                    )
    try:
        matched = result_vocabulary(recipe, donors)
    except FrankenmergeError as error:
        yield from error.faults
        return
    if matched is not None and (recipe.parts[0].gauge or recipe.parts[-1].gauge):
        expected = "rows as they are, beside a gauge of the first or last slice"
        yield Fault(
            f"{place}: tokenizer",
            expected,
            "rows matched by their tokens",
            "leave the tokenizer to the base, or remove the gauge",
        )
    sizes = [
        quantity(donors[names[0]].config, "vocabulary")
        for names in (ends["embedding"], ends["head"])
    ]
    if matched is None and sizes[0] != sizes[1]:
        yield Fault(
            place,
            "first and last slice of donors with one vocabulary",
            f"{sizes[0]} and {sizes[1]} tokens",
            _MATCH_TOKENS,
        )


_MATCH_TOKENS = "begin and end with slices of the same donor, or say tokenizer_source: base or union to match rows by their tokens"


def tensor_names(donor: Checkpoint, role: str, index: int | None = None) -> dict[str, str]:
    """Names in a donor's file by canonical name, of a block or of `embedding`, `final` or `head`.

    The head of a tied donor is its embedding matrix under the head's name: a tied checkpoint may
    store a head too, but loaders use the embedding, and so does this.
    """
    names = donor.by_role.get((role, index), {})
    if role == "head" and is_tied(donor.config):
        architecture = donor.architecture
        names = {
            f"{architecture.head}weight": donor.by_role["embedding", None][
                f"{architecture.root}{architecture.embedding[0]}weight"
            ]
        }
    return dict(sorted(names.items()))


def _shapes(donor: Checkpoint, role: str, index: int | None) -> dict[str, tuple[int, ...]]:
    return {
        canonical: donor.tensors[name].shape
        for canonical, name in tensor_names(donor, role, index).items()
    }


def validated(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe") -> Recipe:
    """Return `recipe`, or raise FrankenmergeError with everything that keeps its donors from being put together."""
    raise_all(recipe_faults(recipe, donors, place))
    return recipe


def depth_within(parameters: int, donors: Iterable[Checkpoint]) -> int:
    """The most blocks that a model of so many parameters can have, whichever of the donors' blocks they are.

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
        ends = max(ends, sum(own.values()) - (own.get("head", 0) if is_tied(donor.config) else 0))
        block = max(block, *(size for (role, _), size in sizes.items() if role == "block"))
    if parameters < ends + block:
        raise fail(
            "parameters",
            f"{ends + block:,} at least: what comes before and behind the blocks, and one of them",
            f"{parameters:,}",
            "give a larger budget",
        )
    return (parameters - ends) // block


def stacked(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe") -> Recipe:
    """Return a sound recipe that does no more than stack the donors' own tensors, some of them scaled, spelled out.

    Raises FrankenmergeError for any other.
    """
    remedy = "merge it, and evaluate the checkpoint"
    faults = []
    if recipe.merge_method != "passthrough":
        faults.append(
            Fault(
                f"{place}: merge_method",
                "passthrough, to be run without being written",
                recipe.merge_method,
                remedy,
            )
        )
    validated(recipe, donors, place)
    recipe = spelled_out(recipe, donors, place)
    levels = [recipe, recipe.stack, *recipe.parts, *recipe.sources]
    if any(set(level.parameters or {}) - {"scale"} for level in levels):
        faults.append(
            Fault(
                f"{place}: parameters",
                "scale alone, in a recipe that is run without being written",
                "others",
                remedy,
            )
        )
    stored = {dtype for name in recipe.tensor_donors for dtype in donors[name].dtypes}
    if stored != {result_dtype(recipe, donors)}:
        found = f"donors of {', '.join(sorted(DTYPE_NAMES[dtype] for dtype in stored))}"
        faults.append(
            Fault(
                f"{place}: dtype",
                "the donors' own type, in a recipe that is run without being written",
                found,
                remedy,
            )
        )
    if result_vocabulary(recipe, donors) is not None:
        found = f"{recipe.vocabulary}: rows matched by their tokens"
        faults.append(
            Fault(
                f"{place}: tokenizer",
                "embeddings as they are, in a recipe that is run without being written",
                found,
                remedy,
            )
        )
    if any(len(part.sources) > 1 for part in recipe.parts):
        faults.append(
            Fault(
                f"{place}: slices",
                "one source a slice",
                "several",
                "name a method that merges them",
            )
        )
    raise_all(faults)
    return recipe
