"""What a recipe means, tensor by tensor. Touches no tensor data."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Slice, Source
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.splicing.compatibility import result_dtype, spelled_out, tensor_names, untied
from frankenmerge.splicing.methods import METHODS, faults, resolved
from frankenmerge.splicing.parameters import (
    PLAIN,
    common_parameters,
    filter_faults,
    method_faults,
    model_parameters,
    taken,
)
from frankenmerge.splicing.rotation import Meeting, meeting
from frankenmerge.splicing.vocabulary import Rows, Vocabulary, result_vocabulary, rows_of
from frankenmerge.storage.safetensors_header import BYTES_OF, Tensor


class Copy(NamedTuple):
    """One tensor of the result: the bytes of one tensor of a donor."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The donor's."""
        return self.tensor.shape

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.tensor.bytes


class Input(NamedTuple):
    """What one model gives to a tensor of the result."""

    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    parameters: dict[str, Any]
    """The method's parameters of single models, for this tensor at this depth."""
    rows: Rows | None = None
    """Where embedding and head are put together token by token: what stands in place of `tensor`.
    """


class Combine(NamedTuple):
    """One tensor of the result: computed from tensors of donors in float32 or better, rounded once to `dtype`."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    method: str
    """An entry of METHODS."""
    inputs: tuple[Input, ...]
    base: Input | None
    """The base model's, where the method has one; it is none of the inputs."""
    parameters: dict[str, Any]
    """The method's parameters of the whole, for this tensor at this depth."""
    seed: int
    """Draws what a method drops at random: another for every tensor, the same at every run."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)

    @property
    def read(self) -> tuple[Input, ...]:
        """Everything that it is computed from."""
        return (*self.inputs, self.base) if self.base else self.inputs


class Rotate(NamedTuple):
    """One tensor of the result: a donor's, rotated to another basis of the residual stream in float64, rounded once to `dtype`."""

    name: str
    dtype: str
    """As safetensors names it."""
    given: Input
    gain: Input | None
    """The norm's gain that it takes in."""
    met: Meeting
    part: int
    """The slice whose rotation is meant."""
    place: int
    """The block in it, from 0; -1 for final norm and head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The donor's."""
        return self.given.tensor.shape

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)

    @property
    def read(self) -> tuple[Input, ...]:
        """Everything that it is computed from."""
        return (self.given, self.gain) if self.gain else (self.given,)


Operation = Copy | Combine | Rotate
_ALIKE = "name donors with the same tensors; for other vocabularies say tokenizer_source"
_AS_IT_IS = resolved(PLAIN, {}, per_model=True)


def schedule(
    recipe: Recipe, donors: Mapping[str, Checkpoint], place: str = "recipe"
) -> list[Operation]:
    """List the result's tensors in layer order: embedding, blocks, final norm, head.

    The embedding is merged from the first slice's sources, final norm and head from the last one's,
    all at depth 0 as mergekit 0.1 has them, unless the recipe names their donors. A tied head that
    must part from its embedding is written out.

    Raises:
        FrankenmergeError: for a method that cannot do what the recipe says.
    """
    raise_all(method_faults(recipe, place))
    spelled = spelled_out(
        recipe, donors, place, with_base=METHODS[recipe.merge_method].base != "none"
    )
    operations = list(_operations(spelled, donors))
    raise_all(_operation_faults(recipe, donors, operations, place))
    return operations


def _operations(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> Iterator[Operation]:
    first, last, ends = recipe.parts[0], recipe.parts[-1], len(recipe.parts) - 1
    vocabulary = result_vocabulary(recipe, donors)
    yield from _rotated(
        _end(recipe, donors, "embedding", recipe.embedding, first, vocabulary), recipe, donors, 0, 0
    )
    position = 0
    for number, part in enumerate(recipe.parts):
        for offset in range(part.length):
            t = offset / (part.length - 1) if part.length > 1 else 1.0
            yield from _rotated(
                _tensors(recipe, donors, part, "block", t, offset=offset, position=position),
                recipe,
                donors,
                number,
                offset,
            )
            position += 1
    yield from _rotated(
        _end(recipe, donors, "final", recipe.final_norm, last, vocabulary), recipe, donors, ends, -1
    )
    if untied(recipe, donors):
        yield from _rotated(
            _end(recipe, donors, "head", recipe.head, last, vocabulary), recipe, donors, ends, -1
        )


def _rotated(
    operations: Iterable[Copy | Combine],
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    number: int,
    place: int,
) -> Iterator[Operation]:
    """The operations of one place of slice `number`, as those of a slice that is rotated where the recipe says so."""
    if recipe.parts[number].gauge is None:
        yield from operations
        return
    for operation in operations:
        given = (
            Input(operation.donor, operation.source, operation.tensor, {})
            if isinstance(operation, Copy)
            else operation.inputs[0]
        )
        donor = donors[given.donor]
        # A tied head is stored under the embedding's name: how it meets the stream goes by the name
        # it gets.
        met = meeting(donor.architecture, donor.architecture.role(operation.name)[2])
        if met.kind == "inside":
            yield operation
            continue
        gain = None
        if met.gain:
            role, index, _ = donor.architecture.role(given.source)
            name = (
                donor.by_role["block", index][met.gain]
                if role == "block"
                else donor.by_role["final", None][met.gain]
            )
            gain = Input(given.donor, name, donor.tensors[name], {})
        yield Rotate(operation.name, operation.dtype, given, gain, met, number, place)


def _end(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    role: str,
    donor: str | None,
    part: Slice,
    vocabulary: Vocabulary | None,
) -> Iterator[Copy | Combine]:
    """Embedding, final norm or head: merged as `part` is, or as `donor` has it."""
    if donor:
        recipe = recipe.model_copy(
            update={
                "merge_method": PLAIN,
                "parameters": None,
                "modules": None,
                "slices": recipe.parts,
            }
        )
        part = Slice(sources=[Source(model=donor, layer_range=[0, 1])])
    yield from _tensors(recipe, donors, part, role, 0.0, vocabulary=vocabulary)


def _tensors(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    part: Slice,
    role: str,
    t: float,
    *,
    offset: int = 0,
    position: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Iterator[Copy | Combine]:
    """The tensors of one role, or of the slice's block `offset`, which becomes block `position` of the result."""
    method, sources, base = taken(recipe, part)
    dtype = result_dtype(recipe, donors)

    def names(source: Source) -> dict[str, str]:
        return tensor_names(
            donors[source.model], role, source.layer_range[0] + offset if role == "block" else None
        )

    def shape_of(source: Source, canonical: str) -> tuple[int, ...]:
        return donors[source.model].tensors[names(source)[canonical]].shape

    def given(source: Source, canonical: str) -> Input:
        donor, name = donors[source.model], names(source).get(canonical)
        if name is None or (
            vocabulary is None and donor.tensors[name].shape != shape_of(sources[0], canonical)
        ):
            where = f"{source.model}: {canonical.format(source.layer_range[0] + offset)}"
            found = f"shape {list(donor.tensors[name].shape)}" if name else "no such tensor"
            raise fail(
                where, f"shape {list(shape_of(sources[0], canonical))}, to be merged", found, _ALIKE
            )
        asked = canonical.format(source.layer_range[0] + offset)
        parameters = (
            model_parameters(recipe, part, source, asked, t)
            if method == recipe.merge_method
            else _AS_IT_IS
        )
        rows = None
        if vocabulary and _has_a_row_per_token(donor, role, canonical):
            stand_ins: list[str] = list(
                dict.fromkeys([*([base.model] if base else []), *recipe.tensor_donors])
            )
            matrices = {
                other: donors[other].tensors[tensor_names(donors[other], role)[canonical]]
                for other in stand_ins
            }
            rows = rows_of(source.model, matrices, vocabulary, recipe)
        return Input(source.model, name, donor.tensors[name], parameters, rows)

    for canonical in names(sources[0]):
        name = canonical.format(position)
        inputs = tuple(given(source, canonical) for source in sources)
        tensor = inputs[0].tensor
        if (
            method == PLAIN
            and inputs[0].parameters.get("scale", 1) == 1
            and tensor.dtype == dtype
            and inputs[0].rows is None
        ):
            yield Copy(name, inputs[0].donor, inputs[0].source, tensor)
            continue
        shape = (
            (vocabulary.rows, *tensor.shape[1:]) if vocabulary and inputs[0].rows else tensor.shape
        )
        parameters = (
            common_parameters(recipe, part, name, t) if method == recipe.merge_method else {}
        )
        yield Combine(
            name,
            dtype,
            shape,
            method,
            inputs,
            given(base, canonical) if base else None,
            parameters,
            _seed(recipe, name),
        )


def _has_a_row_per_token(donor: Checkpoint, role: str, canonical: str) -> bool:
    architecture = donor.architecture
    return role == "head" or (
        role == "embedding" and canonical.startswith(architecture.root + architecture.embedding[0])
    )


def _asked(operation: Operation) -> Sequence[Copy | Input]:
    """What parameters of single models may be filtered by: what an operation is made from, but for the base."""
    return (
        [operation]
        if isinstance(operation, Copy)
        else operation.inputs
        if isinstance(operation, Combine)
        else [operation.given]
    )


def _seed(recipe: Recipe, name: str) -> int:
    return (
        int.from_bytes(hashlib.sha256(f"{recipe.seed or 0} {name}".encode()).digest()[:8], "big")
        >> 1
    )


def _operation_faults(
    recipe: Recipe, donors: Mapping[str, Checkpoint], operations: list[Operation], place: str
) -> Iterator[Fault]:
    """Parameters that are missing for a tensor, weights that cannot be normalised, filters for no tensor."""
    told: dict[tuple[str, ...], Fault] = {}
    for operation in operations:
        if isinstance(operation, Combine):
            models = [given.parameters for given in operation.inputs]
            base = operation.base is not None
            for fault in faults(
                operation.method,
                models,
                operation.parameters,
                base=base,
                place=f"{place}: {operation.name}",
            ):
                # What is wrong with one tensor is wrong with many: the first stands for all.
                told.setdefault(fault[1:], fault)
    yield from told.values()
    heads = [name for donor in donors.values() for name in tensor_names(donor, "head")]
    asked = [given.source for operation in operations for given in _asked(operation)]
    yield from filter_faults(
        recipe, [*(operation.name for operation in operations), *asked, *heads], place
    )
