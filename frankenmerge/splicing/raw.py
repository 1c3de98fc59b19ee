"""Recipes of tensors without models: matched by their names, whatever they are part of."""

from collections.abc import Iterator, Mapping

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Slice, Source
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.raw import open_raw, raw_checkpoint
from frankenmerge.errors import Fault, FrankenmergeError, raise_all
from frankenmerge.splicing.computing import open_files
from frankenmerge.splicing.listing import Draft, Place, listed_tensors, parameter_faults
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.operations import Copy, Operation
from frankenmerge.splicing.parameters import (
    filter_faults,
    gradients,
    method_faults,
    recipe_remarks,
)
from frankenmerge.splicing.reading import DonorFiles, read_stretch
from frankenmerge.splicing.resolve import Splice
from frankenmerge.storage.dtypes import COMPUTED, STORED_NAMES
from frankenmerge.storage.safetensors_header import Tensor

_CHUNK = 1 << 22
_OF_MODELS = (
    "name",
    "slices",
    "modules",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "embedding",
    "final_norm",
    "head",
    "towers",
)
"""Keys of a recipe that say something about a model."""


def open_all(
    recipe: Recipe, *, download: bool = False, opened: Mapping[str, Checkpoint] | None = None
) -> dict[str, Checkpoint]:
    """Open what a recipe merges. Raises FrankenmergeError with the faults of all."""
    donors, faults = {}, []
    for name in recipe.tensor_donors:
        try:
            donors[name] = (opened or {}).get(name) or open_raw(name, download=download)
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return donors


def recipe_faults(recipe: Recipe, place: str) -> Iterator[Fault]:
    """What keeps a recipe from being one of tensors alone."""
    for key in _OF_MODELS:
        if getattr(recipe, key) is not None:
            remedy = "remove it, or merge models without --raw"
            yield Fault(f"{place}: {key}", "models, merge_method and parameters", key, remedy)
    if recipe.models:
        yield from method_faults(recipe, place)
    for where in gradients(recipe):
        expected = "a number, as tensors without a model have no depth"
        yield Fault(f"{place}: {where}", expected, "a gradient", "write a number")


def resolve_raw(recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe") -> Splice:
    """Validate a recipe of tensors alone, as `resolve` does one of models.

    Args:
        recipe: one without faults of `recipe_faults`.
        donors: its donors by name, as `open_raw` opens them.
        place: where the recipe is from, for faults.

    Raises:
        FrankenmergeError: with all tensors that are missing somewhere, or have other shapes or
            types.
    """
    sources = [Source(model=w.model, layer_range=[0, 1]) for w in recipe.models or ()]
    spelled = recipe.model_copy(update={"models": None, "slices": [Slice(sources=sources)]})
    listed = _with_base(recipe)
    first = donors[listed.parts[0].sources[0].model]
    raise_all(_tensor_faults(recipe, donors, first, place))
    operations: dict[str, Operation] = {}
    written = recipe.out_dtype or recipe.dtype
    for stored in sorted({tensor.dtype for tensor in first.tensors.values()}):
        names = [name for name in first.tensors if first.tensors[name].dtype == stored]
        if stored not in COMPUTED:
            copies = (Copy(n, first.name, n, first.tensors[n]) for n in names)
            operations |= {copy.name: copy for copy in copies}
            continue
        dtype = STORED_NAMES["float32" if written == "float64" else written] if written else stored
        some = {
            name: raw_checkpoint(name, donor.path, {each: donor.tensors[each] for each in names})
            for name, donor in donors.items()
        }
        draft = Draft(listed, some, None, dtype, tied=False)
        made = listed_tensors(draft, listed.parts[0], Place(0, "rest", 0.0))
        operations |= {operation.name: operation for operation in made}
    ordered = tuple(operations[name] for name in first.tensors)
    raise_all([*parameter_faults(ordered, place), *filter_faults(recipe, [*operations], place)])
    computed = [each.dtype for each in ordered if each.dtype in COMPUTED]
    return Splice(
        recipe,
        spelled,
        donors,
        {},
        max(computed, key=computed.count, default=ordered[0].dtype),
        None,
        False,
        ordered,
        {},
        remarks=tuple(recipe_remarks(recipe, [*operations])),
        raw=True,
    )


def _with_base(recipe: Recipe) -> Recipe:
    """The recipe with one slice, its base model among the sources."""
    models = [(whole.model, whole.parameters) for whole in recipe.models or ()]
    base = recipe.base_model if METHODS[recipe.merge_method].base != "none" else None
    if base and all(model != base for model, _ in models):
        models.append((base, None))
    sources = [
        Source(model=model, layer_range=[0, 1], parameters=parameters)
        for model, parameters in models
    ]
    return recipe.model_copy(update={"models": None, "slices": [Slice(sources=sources)]})


def _tensor_faults(
    recipe: Recipe, donors: Mapping[str, Checkpoint], first: Checkpoint, place: str
) -> Iterator[Fault]:
    """Tensors that are not in all donors alike."""
    names = dict.fromkeys(name for donor in donors.values() for name in donor.tensors)
    mixed = []
    with open_files() as files:
        for name in names:
            lacking = [donor.name for donor in donors.values() if name not in donor.tensors]
            for donor in lacking:
                remedy = "name files with the same tensors"
                yield Fault(f"{donor}: {name}", "a tensor that all have", "no such tensor", remedy)
            if lacking:
                continue
            found = [donor.tensors[name] for donor in donors.values()]
            expected = first.tensors[name]
            for donor, tensor in zip(donors, found, strict=True):
                if tensor.shape != expected.shape:
                    yield Fault(
                        f"{donor}: {name}",
                        f"the shape {list(expected.shape)}, as in {first.name}",
                        str(list(tensor.shape)),
                        "name files with the same tensors",
                    )
            types = {tensor.dtype for tensor in found}
            if not types <= set(COMPUTED):
                same = len(types) == 1 and all(
                    _same(tensor, expected, files) for tensor in found if tensor is not expected
                )
                if not same:
                    yield Fault(
                        f"{place}: {name}",
                        f"a tensor of {', '.join(COMPUTED)}, or the same bytes in all",
                        f"{', '.join(sorted(types))} that differ",
                        "make it equal in all files",
                    )
            elif len(types) > 1 and not (recipe.out_dtype or recipe.dtype):
                mixed.append((name, types))
    if mixed:
        name, types = mixed[0]
        found = f"{' and '.join(sorted(types))} in {name}, one of {len(mixed)} such tensors"
        yield Fault(f"{place}: dtype", "a type, as the models have several", found, "set dtype")


def _same(one: Tensor, other: Tensor, files: DonorFiles) -> bool:
    if one.shape != other.shape:
        return False
    return all(
        read_stretch(files, one, start, min(start + _CHUNK, one.bytes))
        == read_stretch(files, other, start, min(start + _CHUNK, one.bytes))
        for start in range(0, one.bytes, _CHUNK)
    )
