"""Everything that keeps donors from being put together as a recipe says, whatever the method."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import differences, is_multimodal, quantity, tower_differences
from frankenmerge.donors.quantisation import DEQUANTISE, names_blocks, title
from frankenmerge.errors import Fault
from frankenmerge.splicing.compatibility import (
    Compatibility,
    compatibility,
    shape_differences,
    shapes_of,
)
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.parameters import module_prefix
from frankenmerge.splicing.result import Donors, blocks_with_configs, is_whole
from frankenmerge.splicing.rotation import gauge_faults
from frankenmerge.splicing.vocabulary import Vocabulary
from frankenmerge.storage.dtypes import COMPUTED, DTYPES

_INDICES = ("I32", "I64")
_SHARE = "use donors that share a tokenizer, or give one the other's with transplant-tokenizer"
_MATCH_TOKENS = (
    "begin and end with slices of the same donor, set tokenizer_source to base or union to match "
    "rows by their tokens, or give one the other's tokenizer with transplant-tokenizer"
)


def compatibility_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """Donors whose blocks one config cannot describe."""
    expected = "donors whose blocks one config can describe"
    for reason in _compatibility(recipe, donors).reasons:
        yield Fault(place, expected, reason, _remedy(reason))


def donor_remarks(recipe: Recipe, donors: Donors) -> list[str]:
    """Fields of config.json in which the donors differ and that do no harm; see `differences`."""
    base, based = donors[recipe.base], _is_based(recipe)
    others = {id(donors[name]): donors[name] for name in recipe.tensor_donors}.values()
    return [
        f"{base.name} | {other.name}: {line}"[:400]
        for other in others
        if other is not base
        for line in differences(base.config, other.config, based=based)[1]
    ]


def left_out_remarks(recipe: Recipe, donors: Donors) -> Iterator[str]:
    """Tensors of donors that are no part of the model, such as a reward head."""
    for name in recipe.tensor_donors:
        if left := donors[name].left_out:
            tensors = f"{len(left)} tensors, such as {left[0]}," if len(left) > 1 else left[0]
            yield f"{tensors} of {name} left out: no part of the model"


def _compatibility(recipe: Recipe, donors: Donors) -> Compatibility:
    opened = {id(donors[name]): donors[name] for name in recipe.tensor_donors}
    return compatibility(list(opened.values()), based=_is_based(recipe))


def _is_based(recipe: Recipe) -> bool:
    """Whether every block is merged with one of the base model, whose config the result has."""
    method = METHODS.get(recipe.merge_method)
    if method is None or method.base == "none" or recipe.base_model is None:
        return False
    parts = recipe.stack.slices or []
    return all(
        len(part.sources) > 1 and part.base_model in (None, recipe.base_model) for part in parts
    )


def _remedy(reason: str) -> str:
    key = reason.split(": ")[1]
    if key == "family":
        return "use donors of one family"
    if key == "rope_parameters":
        return "use donors with the same rotary positions, or a method with a base_model"
    return f"use donors with the same {key}"


def donor_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """A missing tokenizer, and types that differ or cannot be computed with."""
    chosen = donors[recipe.tokenizer_donor]
    if not chosen.has_tokenizer and quantity(chosen.config, "vocabulary"):
        remedy = "put tokenizer.json there, or name another donor in tokenizer_source"
        yield Fault(str(donors[recipe.tokenizer_donor].path), "a tokenizer", "none", remedy)
    yield from _type_faults(recipe, donors, place)


def _type_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    if any(donors[name].quantisation for name in recipe.tensor_donors):
        yield from _quantisation_faults(recipe, donors)
        return
    types = {name: donors[name].dtypes for name in recipe.tensor_donors}
    computes = _computes(recipe, donors)
    for name, stored in types.items():
        unfit = [dtype for dtype in stored if dtype not in COMPUTED]
        # Tables of indices are copied; without a scheme, low floats may be a quantisation's.
        if unfit and (computes or any(dtype not in _INDICES for dtype in unfit)):
            remedy = "use an unquantised donor"
            yield Fault(name, "tensors of floating types", ", ".join(unfit), remedy)
    floating = {dtype for stored in types.values() for dtype in stored if dtype in COMPUTED}
    if not recipe.dtype and not recipe.out_dtype and len(floating) > 1:
        found = "; ".join(
            f"{name}: {', '.join(DTYPES[dtype].torch_name for dtype in stored)}"
            for name, stored in types.items()
        )
        remedy = "set dtype, the type of the result's tensors"
        yield Fault(f"{place}: dtype", "donors of one floating type, or dtype", found, remedy)


def _quantisation_faults(recipe: Recipe, donors: Donors) -> Iterator[Fault]:
    """One fault for each quantised donor of a recipe that does not copy all tensors as stored."""
    opened = {name: donors[name] for name in recipe.tensor_donors}
    if not (reason := _computes(recipe, donors) or _unlike_schemes(list(opened.values()))):
        return
    for name, donor in opened.items():
        if donor.quantisation:
            expected = "plain weights, or a passthrough of donors of one quantisation, as stored"
            found = f"quantised weights ({title(donor.quantisation)}); {reason}"
            yield Fault(name, expected, found, DEQUANTISE)


def _unlike_schemes(donors: Sequence[Checkpoint]) -> str | None:
    first, *others = (donor.quantisation for donor in donors)
    if any(other != first for other in others):
        return "the donors' quantisations are different"
    if any(names_blocks(donor.quantisation) for donor in donors):
        return "its quantization_config names single blocks by their index"
    return None


def _computes(recipe: Recipe, donors: Donors) -> str | None:
    """What in a recipe needs more than copies of tensors as they are stored."""
    parts = recipe.stack.slices or []
    levels = [recipe, recipe.stack, *parts, *(each for part in parts for each in part.sources)]
    config = donors[recipe.base].config
    stored = config.get("dtype") or config.get("torch_dtype")
    asked = recipe.out_dtype or recipe.dtype
    if recipe.merge_method != "passthrough":
        return f"{recipe.merge_method} computes with them"
    if any(level.parameters for level in levels):
        return "parameters compute with them"
    if any(part.gauge for part in parts):
        return "a gauge computes with them"
    if recipe.vocabulary is not None:
        return "rows matched by their tokens are computed"
    if asked and stored and asked != stored:
        return f"dtype {asked} would convert them from {stored}"
    return None


def range_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """Ranges of a spelled-out recipe that reach beyond their donor."""
    prefix = f"{place}: {module_prefix(recipe)}slices"
    for number, part in enumerate(recipe.parts):
        for entry, source in enumerate(part.sources):
            blocks = donors[source.model].blocks
            if source.layer_range[1] > blocks:
                where = f"{prefix}[{number}].sources[{entry}].layer_range"
                expected = f"a range within [0, {blocks}], the blocks of {source.model}"
                yield Fault(where, expected, str(source.layer_range), "shorten the range")


def gauge_recipe_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """Gauges that are not possible: with merging, parameters or named ends, or in some families."""
    parts = recipe.stack.slices or []
    for number, part in enumerate(parts):
        if part.gauge is None:
            continue
        where = f"{place}: {module_prefix(recipe)}slices[{number}].gauge"
        source = part.sources[0]
        if recipe.merge_method != "passthrough" or len(part.sources) > 1:
            expected = "a slice of one source, in a passthrough"
            found = f"{len(part.sources)} in a recipe of merge_method {recipe.merge_method}"
            yield Fault(where, expected, found, "merge first, then rotate the stage")
            continue
        if any(level.parameters for level in (recipe, recipe.stack, part, source)):
            remedy = "remove the parameters, or the gauge"
            yield Fault(where, "a slice without parameters", "some", remedy)
        ends = {
            "embedding": (0, recipe.embedding),
            "final_norm": (-1, recipe.final_norm),
            "head": (-1, recipe.head),
        }
        for key in (key for key, (end, named) in ends.items() if named and part is parts[end]):
            expected = "no donor of its own: the gauge rotates it with its slice"
            found = str(ends[key][1])
            yield Fault(f"{place}: {key}", expected, found, f"remove {key}, or the gauge")
        if part.gauge.to == "previous" and number == 0:
            expected = "base, for the first slice"
            yield Fault(f"{where}.to", expected, "previous", "correct the recipe")
        if part.gauge.fit != "probes" and not Path(part.gauge.fit).is_file():
            expected = "probes, or a text file"
            yield Fault(f"{where}.fit", expected, part.gauge.fit, "correct the path")
        yield from _gauge_donor_faults(recipe, donors, number, where)


def _gauge_donor_faults(recipe: Recipe, donors: Donors, number: int, where: str) -> Iterator[Fault]:
    part = recipe.parts[number]
    donor = donors[part.sources[0].model]
    before = recipe.parts[max(0, number - 1)].sources[0].model
    other = donors[recipe.base if part.gauge and part.gauge.to == "base" else before]
    if donor.tokenizer_hash != other.tokenizer_hash:
        expected = f"the tokenizer of {other.name}, so that both see the same tokens"
        yield Fault(where, expected, "another one", _SHARE)
    indices = range(*part.sources[0].layer_range)
    roles = [*(("block", index) for index in indices)]
    roles += [("embedding", None), ("final", None), ("head", None)]
    names = {name: None for role in roles for name in donor.by_role.get(role, {})}
    yield from gauge_faults(donor.architecture, names, where)


def pairing_faults(
    recipe: Recipe, donors: Donors, vocabulary: Vocabulary | None, place: str
) -> Iterator[Fault]:
    """Differences between what is to be merged: tensors, per-block settings, vocabularies."""
    yield from _block_faults(recipe, donors, place)
    numbers = range(max(len(part.sources) for part in recipe.parts))
    runs = [blocks_with_configs(recipe, donors, number) for number in numbers]
    for setting in donors[recipe.base].architecture.per_block:
        first, *others = ([setting.of(config, index) for config, index in run] for run in runs)
        for other in (other for other in others if other != first):
            expected = "the same setting in all blocks that are merged into one"
            found = f"{first} and {other}"[:400]
            yield Fault(f"{place}: {setting.key}", expected, found, "shift the ranges")
    yield from _end_faults(recipe, donors, vocabulary, place)
    if recipe.towers == "merge":
        yield from _tower_faults(recipe, donors, f"{place}: towers")


def _block_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    for part in recipe.parts:
        first = part.sources[0]
        for other in part.sources[1:]:
            pairs = zip(range(*first.layer_range), range(*other.layer_range), strict=True)
            for left, right in pairs:
                places = (first.model, left), (other.model, right)
                shapes = [shapes_of(donors[name], "block", index) for name, index in places]
                names = f"{first.model} block {left}", f"{other.model} block {right}"
                for line in shape_differences(shapes, names):
                    expected = "blocks of the same tensors to merge"
                    remedy = "merge blocks that have the same tensors"
                    yield Fault(place, expected, line.format("*"), remedy)


def _tower_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """Towers that cannot be merged: of text-only donors, unlike ones, next to blocks that move."""
    base, remedy = donors[recipe.base], "set towers: base"
    if not is_multimodal(base.config):
        expected, found = "a multimodal base donor", f"{base.name}, which is text-only"
        yield Fault(place, expected, found, "remove the key")
        return
    if not is_whole(recipe, donors):
        expected = "whole models, every block where it is"
        yield Fault(place, expected, "blocks that move, or ends of one donor", remedy)
        return
    for name in recipe.tensor_donors:
        names = base.name, donors[name].name
        shapes = [shapes_of(donor, "rest") for donor in (base, donors[name])]
        lines = list(shape_differences(shapes, names))
        # Settings are compared where the shapes have not said enough.
        unlike = lines or tower_differences(base.config, donors[name].config)
        for line in unlike[:5]:
            yield Fault(place, "towers of the same tensors and settings to merge", line, remedy)


def _end_faults(
    recipe: Recipe, donors: Donors, vocabulary: Vocabulary | None, place: str
) -> Iterator[Fault]:
    ends = {
        "embedding": recipe.embedding_donors,
        "final": recipe.final_donors,
        "head": recipe.head_donors,
    }
    for role, names in ends.items():
        if role != "final" and recipe.vocabulary is not None:
            continue
        for name in names[1:]:
            shapes = [shapes_of(donors[donor], role) for donor in (names[0], name)]
            for line in shape_differences(shapes, (names[0], name)):
                expected = "tensors of the same names and shapes to merge"
                yield Fault(f"{place}: {role}", expected, line, _MATCH_TOKENS)
    if vocabulary is not None and (recipe.parts[0].gauge or recipe.parts[-1].gauge):
        expected = "rows as they are, together with a gauge of the first or last slice"
        remedy = "leave the tokenizer to the base, or remove the gauge"
        yield Fault(f"{place}: tokenizer", expected, "rows matched by their tokens", remedy)
    sizes = [
        quantity(donors[names[0]].config, "vocabulary")
        for names in (ends["embedding"], ends["head"])
    ]
    if vocabulary is None and sizes[0] != sizes[1]:
        expected = "first and last slice of donors with one vocabulary"
        yield Fault(place, expected, f"{sizes[0]} and {sizes[1]} tokens", _MATCH_TOKENS)
