"""From a validated recipe to its operations: one for every tensor, in layer order."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import ANCHORS, Slice, Source
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import is_multimodal, quantity
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.splicing.compatibility import tensor_names
from frankenmerge.splicing.methods import faults, resolved
from frankenmerge.splicing.operations import Combine, Copy, Input, Operation, Rotate, Transplant
from frankenmerge.splicing.parameters import (
    PLAIN,
    common_parameters,
    filter_faults,
    model_parameters,
    module_prefix,
    taken,
)
from frankenmerge.splicing.result import Donors, is_whole
from frankenmerge.splicing.rotation import stream_use
from frankenmerge.splicing.vocabulary import Rows, Vocabulary, rows_of
from frankenmerge.storage.dtypes import COMPUTED

_ALIKE = "name donors with the same tensors; for other vocabularies set tokenizer_source"
_UNCHANGED = resolved(PLAIN, {}, per_model=True)


class Draft(NamedTuple):
    """A validated recipe on the way to its operations."""

    recipe: Recipe
    """Spelled out, the base of whole models among the sources."""
    donors: Donors
    vocabulary: Vocabulary | None
    dtype: str
    tied: bool


class Place(NamedTuple):
    """Which tensors of a slice are listed."""

    number: int
    """Of the slice."""
    role: str
    """`block`, `embedding`, `final`, `head` or `rest`."""
    t: float
    """Depth within the slice, 0 to 1."""
    offset: int = 0
    """The block within the slice."""
    position: int | None = None
    """The block of the result."""


def operations_of(draft: Draft, place: str) -> tuple[Operation, ...]:
    """List the result's tensors in layer order: embedding, blocks, final norm, head.

    The embedding is merged from the first slice's sources, final norm and head from the last one's,
    all at depth 0 as mergekit 0.1 has them, unless the recipe names their donors. A tied head that
    must part from its embedding is written out.

    Raises:
        FrankenmergeError: for parameters that a method cannot take, filters that select nothing,
            tensors of other shapes than those they are merged with.
    """
    operations = tuple(_operations(draft))
    raise_all(_operation_faults(draft, operations, place))
    return operations


def _operations(draft: Draft) -> Iterator[Operation]:
    recipe, last = draft.recipe, len(draft.recipe.parts) - 1
    yield from _end(draft, Place(0, "embedding", 0.0), recipe.embedding)
    position = 0
    for number, part in enumerate(recipe.parts):
        for offset in range(part.length):
            t = offset / (part.length - 1) if part.length > 1 else 1.0
            place = Place(number, "block", t, offset, position)
            yield from _rotated(listed_tensors(draft, part, place), draft, place)
            position += 1
    yield from _end(draft, Place(last, "final", 0.0, offset=-1), recipe.final_norm)
    ties = draft.donors[recipe.base].architecture.tied_names
    for operation in _end(draft, Place(last, "head", 0.0, offset=-1), recipe.head):
        # The weight of a tied head is the embedding; it may have a bias of its own.
        if not (draft.tied and operation.name in ties):
            yield operation
    yield from _rest(draft)


def _rest(draft: Draft) -> Iterator[Operation]:
    """What surrounds blocks, ends and head: merged with whole models, otherwise the base donor's.

    The towers of multimodal models are merged only where the recipe says so.
    """
    recipe, base = draft.recipe, draft.donors[draft.recipe.base]
    place = Place(0, "rest", 0.0)
    kept = is_multimodal(base.config) and recipe.towers != "merge"
    root = base.architecture.root

    def is_merged(name: str) -> bool:
        return not kept or name.startswith(root)

    whole = is_whole(recipe, draft.donors)
    if whole and any(map(is_merged, base.by_role.get(("rest", None), {}).values())):
        yield from (each for each in _end(draft, place, None) if is_merged(each.name))
    for operation in _end(draft, place, recipe.base):
        if not (whole and is_merged(operation.name)):
            yield operation


def _end(draft: Draft, place: Place, donor: str | None) -> Iterator[Operation]:
    """Embedding, final norm or head: merged as their slice is, or copied from `donor`."""
    part = draft.recipe.parts[place.number]
    if donor:
        plain = {
            "merge_method": PLAIN,
            "parameters": None,
            "modules": None,
            "slices": draft.recipe.parts,
        }
        draft = draft._replace(recipe=draft.recipe.model_copy(update=plain))
        part = Slice(sources=[Source(model=donor, layer_range=[0, 1])])
    elif part.by_filter:
        part = Slice(sources=part.sources[:1], parameters=part.parameters)
    tensors = _approximated(listed_tensors(draft, part, place), draft, place.role)
    yield from _rotated(tensors, draft, place)


def _rotated(
    operations: Iterable[Copy | Combine | Transplant], draft: Draft, place: Place
) -> Iterator[Operation]:
    """The operations of one place, as rotations where their slice has a gauge."""
    if draft.recipe.parts[place.number].gauge is None:
        yield from operations
        return
    for operation in operations:
        if isinstance(operation, Copy):
            given = Input(operation.donor, operation.source, operation.tensor, {})
        else:
            given = operation.read[0]
        donor = draft.donors[given.donor]
        # A tied head is stored under the embedding's name: the name it gets says what it does.
        use = stream_use(donor.architecture, donor.architecture.role(operation.name)[2])
        if use.kind == "inside":
            yield operation
            continue
        gain = _gain(donor, given, use.gain) if use.gain else None
        number, offset = place.number, place.offset
        yield Rotate(operation.name, operation.dtype, given, gain, use, number, offset)


def _gain(donor: Checkpoint, given: Input, canonical: str) -> Input:
    """The gain of the norm before the map `given`."""
    role, index = next(
        place for place, names in donor.by_role.items() if given.source in names.values()
    )
    name = donor.by_role[("block", index) if role == "block" else ("final", None)][canonical]
    return Input(given.donor, name, donor.tensors[name], {})


class _Entry(NamedTuple):
    """A source of a slice, with the names of its tensors of one place by canonical name."""

    source: Source
    names: Mapping[str, str]


def listed_tensors(draft: Draft, part: Slice, place: Place) -> Iterator[Copy | Combine]:
    """The tensors of one role, or of one block of a slice."""
    recipe, donors = draft.recipe, draft.donors
    method, sources, base = taken(recipe, part)
    entries = [_Entry(source, _names(donors, source, place)) for source in sources]
    start = _Entry(base, _names(donors, base, place)) if base else None
    own = method == recipe.merge_method
    for canonical, name_in_first in entries[0].names.items():
        shape = donors[sources[0].model].tensors[name_in_first].shape
        by_token = draft.vocabulary is not None and _has_row_per_token(
            donors[sources[0].model], place.role, canonical
        )

        def given(
            entry: _Entry,
            canonical: str = canonical,
            shape: tuple = shape,
            by_token: bool = by_token,
        ) -> Input:
            asked = _asked(entry, canonical, place.offset)
            name = _checked_name(draft, entry, canonical, asked, None if by_token else shape)
            parameters = (
                model_parameters(recipe, part, entry.source, asked, place.t) if own else _UNCHANGED
            )
            rows = _rows(draft, entry.source, base, place.role, canonical)
            tensor = donors[entry.source.model].tensors[name]
            return Input(entry.source.model, name, tensor, parameters, rows)

        name = canonical.format(place.position)
        chosen = [_selected(entries, canonical, place.offset)] if part.by_filter else entries
        inputs = tuple(given(entry) for entry in chosen)
        first = inputs[0]
        unscaled = method == PLAIN and first.parameters.get("scale", 1) == 1
        # Quantised donors are copied with their scales, in the types in which they are stored.
        # So are tables of indices, which no type of a recipe applies to.
        stored = first.tensor.dtype
        as_stored = (
            donors[first.donor].quantisation or stored == draft.dtype or stored not in COMPUTED
        )
        if unscaled and as_stored and first.rows is None:
            yield Copy(name, first.donor, first.source, first.tensor)
            continue
        if draft.vocabulary and first.rows:
            shape = (draft.vocabulary.rows, *shape[1:])
        parameters = common_parameters(recipe, part, name, place.t) if own else {}
        base_input, seed = given(start) if start else None, tensor_seed(recipe, name)
        yield Combine(name, draft.dtype, shape, method, inputs, base_input, parameters, seed)


def _approximated(
    operations: Iterable[Copy | Combine], draft: Draft, role: str
) -> Iterator[Copy | Combine | Transplant]:
    """The operations of one end, with rows made for tokens that its donor lacks where asked for."""
    recipe, donors = draft.recipe, draft.donors
    chosen = recipe.tokenizer_donor
    for operation in operations:
        given = operation.inputs[0] if isinstance(operation, Combine) else None
        if given is None or given.rows is None or not draft.vocabulary or not recipe.tokenizer:
            yield operation
            continue
        approximation = recipe.tokenizer.approximate
        tokens = draft.vocabulary.maps.get(given.donor)
        if approximation is None or tokens is None:
            yield operation
            continue
        assert isinstance(operation, Combine)
        if operation.method != PLAIN or len(operation.inputs) > 1:
            expected = "embedding and head of one donor each, with approximate"
            remedy = "give the donors one tokenizer first, with transplant-tokenizer"
            raise fail(f"recipe: {operation.name}", expected, operation.method, remedy)
        matrices = [
            Input(chosen, stored, donors[chosen].tensors[stored], {})
            for canonical, stored in tensor_names(donors[chosen], role).items()
            if _has_row_per_token(donors[chosen], role, canonical)
            and len(donors[chosen].tensors[stored].shape) == len(given.tensor.shape) == 2
        ]
        yield Transplant(
            operation.name,
            draft.dtype,
            given._replace(rows=None, parameters={}),
            next(iter(matrices), None),
            tokens,
            approximation,
            recipe.tokenizer.anchors or ANCHORS,
        )


def _names(donors: Donors, source: Source, place: Place) -> dict[str, str]:
    index = source.layer_range[0] + place.offset if place.role == "block" else None
    return tensor_names(donors[source.model], place.role, index)


def _selected(entries: Sequence[_Entry], canonical: str, offset: int) -> _Entry:
    """The source that gives a tensor: the first whose filter names it, else the unfiltered one."""
    named = (each for each in entries[1:] if each.source.selects(_asked(each, canonical, offset)))
    return next(named, entries[0])


def _asked(entry: _Entry, canonical: str, offset: int) -> str:
    """The plain name of a source's tensor, which filters are compared with."""
    return canonical.format(entry.source.layer_range[0] + offset)


def _checked_name(
    draft: Draft, entry: _Entry, canonical: str, asked: str, shape: tuple[int, ...] | None
) -> str:
    """A tensor's name in a source.

    Raises FrankenmergeError for none, or one of another shape than `shape`, unless that is None.
    """
    name, tensors = entry.names.get(canonical), draft.donors[entry.source.model].tensors
    if name is None or shape not in (None, tensors[name].shape):
        found = f"shape {list(tensors[name].shape)}" if name else "no such tensor"
        expected = f"a tensor of shape {list(shape)} to merge" if shape else "a tensor to merge"
        raise fail(f"{entry.source.model}: {asked}", expected, found, _ALIKE)
    return name


def _rows(
    draft: Draft, source: Source, base: Source | None, role: str, canonical: str
) -> Rows | None:
    """Where the rows of embedding and head come from when they are matched by their tokens."""
    donors = draft.donors
    if draft.vocabulary is None or not _has_row_per_token(donors[source.model], role, canonical):
        return None
    stand_ins: list[str] = [*([base.model] if base else []), *draft.recipe.tensor_donors]
    matrices = {
        name: donors[name].tensors[tensor_names(donors[name], role)[canonical]]
        for name in stand_ins
    }
    return rows_of(source.model, matrices, draft.vocabulary, draft.recipe)


def _has_row_per_token(donor: Checkpoint, role: str, canonical: str) -> bool:
    architecture = donor.architecture
    embedding = architecture.root + architecture.embedding[0]
    if role != "head":
        return role == "embedding" and canonical.startswith(embedding)
    shape = donor.tensors[tensor_names(donor, role)[canonical]].shape
    return architecture.listed or shape[:1] == (quantity(donor.config, "vocabulary"),)


def tensor_seed(recipe: Recipe, name: str) -> int:
    """The seed of the random choices in one tensor of the result."""
    digest = hashlib.sha256(f"{recipe.seed or 0} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _operation_faults(draft: Draft, operations: Sequence[Operation], place: str) -> Iterator[Fault]:
    """Faults of parameters, and filters for no tensor."""
    yield from parameter_faults(operations, place)
    yield from filter_faults(draft.recipe, filtered_names(operations, draft.donors), place)
    yield from _source_filter_faults(draft, place)


def parameter_faults(operations: Sequence[Operation], place: str) -> Iterator[Fault]:
    """Parameters that are missing, and weights that cannot be normalised."""
    reported: dict[tuple[str, ...], Fault] = {}
    for operation in operations:
        if isinstance(operation, Combine):
            models = [given.parameters for given in operation.inputs]
            where, base = f"{place}: {operation.name}", operation.base is not None
            names = [given.donor for given in operation.inputs]
            for fault in faults(
                operation.method, models, operation.parameters, base=base, place=where, names=names
            ):
                # What is wrong with one tensor is wrong with many: only the first is reported.
                reported.setdefault(fault[1:], fault)
    yield from reported.values()


def filtered_names(operations: Sequence[Operation], donors: Donors) -> list[str]:
    """The names of tensors that filters of parameters are compared with."""
    heads = [name for donor in donors.values() for name in tensor_names(donor, "head")]
    names = [operation.name for operation in operations]
    sources = [source for operation in operations for source in _sources(operation)]
    return [*names, *sources, *heads]


def _source_filter_faults(draft: Draft, place: str) -> Iterator[Fault]:
    """Filters of sources that select no tensor of their blocks."""
    prefix = f"{place}: {module_prefix(draft.recipe)}"
    for number, part in enumerate(draft.recipe.parts):
        for entry, source in enumerate(part.sources):
            names = [
                canonical.format(index)
                for index in range(*source.layer_range)
                for canonical in tensor_names(draft.donors[source.model], "block", index)
            ]
            where = f"{prefix}slices[{number}].sources[{entry}].filter"
            for asked in source.filter or ():
                if not any(asked in name for name in names):
                    expected = "a part of the name of a tensor in this source's blocks"
                    remedy = f"correct it; names are like {names[len(names) // 2]}"
                    yield Fault(where, expected, asked, remedy)


def _sources(operation: Operation) -> list[str]:
    """Names that parameters of single models may be filtered by: all inputs' but the base's."""
    if isinstance(operation, Copy):
        return [operation.source]
    if isinstance(operation, Combine):
        return [given.source for given in operation.inputs]
    return [given.source for given in operation.read[:1]]
