"""What makes the tensors of a result, one operation each: data about tensors, no tensor data.

Two executors run them: `merging` writes the results to disk, `splicing.assemble` keeps them in
memory. What both compute for one operation is in `splicing.computing`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from frankenmerge.artefacts.recipe_parameters import Value
from frankenmerge.artefacts.recipe_schema import Approximation
from frankenmerge.splicing.rotation import StreamUse
from frankenmerge.splicing.token_maps import TokenMap
from frankenmerge.splicing.vocabulary import Rows, Vocabulary
from frankenmerge.storage.dtypes import BYTES_OF
from frankenmerge.storage.safetensors_header import Tensor

HEALED = "healed tensors"
"""In place of a donor's name: the tensors that were trained."""


class Copy(NamedTuple):
    """One tensor of the result: the bytes of one tensor of a donor, or of one that was trained."""

    name: str
    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    start: "Operation | None" = None
    """What made the tensor before it was trained; its donor is then `HEALED`."""

    @property
    def dtype(self) -> str:
        """The type's name in safetensors."""
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
    """What one model contributes to a tensor of the result."""

    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor
    parameters: dict[str, Value]
    """The method's parameters of single models, for this tensor at this depth."""
    rows: Rows | None = None
    """Where embedding and head are put together token by token: replaces `tensor`."""


class Combine(NamedTuple):
    """One tensor of the result: computed from tensors of donors, rounded once to `dtype`."""

    name: str
    dtype: str
    """The type's name in safetensors."""
    shape: tuple[int, ...]
    method: str
    """A key of `METHODS`."""
    inputs: tuple[Input, ...]
    base: Input | None
    """The base model's tensor, where the method has one; it is not among the inputs."""
    parameters: dict[str, Value]
    """The method's parameters of the whole, for this tensor at this depth."""
    seed: int
    """Of the method's random choices: another for every tensor, the same at every run."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)

    @property
    def read(self) -> tuple[Input, ...]:
        """Everything that it is computed from."""
        return (*self.inputs, self.base) if self.base else self.inputs


class Rotate(NamedTuple):
    """One tensor of the result: a donor's, rotated in float64, rounded once to `dtype`."""

    name: str
    dtype: str
    """The type's name in safetensors."""
    given: Input
    gain: Input | None
    """The gain of the norm that the tensor absorbs."""
    use: StreamUse
    """How the tensor reads or writes the residual stream."""
    part: int
    """The number of the slice whose rotation it is."""
    place: int
    """The block in the slice, from 0; -1 for final norm and head."""

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


class Perturb(NamedTuple):
    """One tensor of the result: a donor's plus Gaussian noise, scaled, rounded once to `dtype`."""

    name: str
    dtype: str
    """The type's name in safetensors."""
    given: Input
    deviation: float
    """Standard deviation of the noise."""
    scale: float
    """Factor of the sum."""
    seed: int

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
        return (self.given,)


class Gate(NamedTuple):
    """One tensor of the result: the gate of a block's experts, a row for each."""

    name: str
    dtype: str
    """The type's name in safetensors."""
    shape: tuple[int, ...]
    """`[experts, width]`."""
    block: int
    mode: str
    """What it is made from; a key of `mixture.GateMode`."""
    seed: int
    """Of random modes."""
    shared: bool = False
    """Whether it is that of the shared expert."""
    content: bytes | None = None
    """Its elements; None until `gates.with_gates` has made them."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)

    @property
    def read(self) -> tuple[Input, ...]:
        """No tensor of a donor."""
        return ()


class Transplant(NamedTuple):
    """Embedding or head of the result: a donor's, with rows for another vocabulary."""

    name: str
    dtype: str
    """The type's name in safetensors."""
    given: Input
    """The donor's, `[v_m, d]`, or `[v_m]` for a bias."""
    reference: Input | None
    """That of the donor of the vocabulary; None for a bias."""
    tokens: TokenMap
    approximation: Approximation
    anchors: int
    """The most tokens that one is approximated by."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[v, d]`, or `[v]` for a bias."""
        return (len(self.tokens.exact), *self.given.tensor.shape[1:])

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return BYTES_OF[self.dtype] * math.prod(self.shape)

    @property
    def read(self) -> tuple[Input, ...]:
        """Everything that it is computed from."""
        return (self.given, self.reference) if self.reference else (self.given,)


Computed = Combine | Rotate | Perturb | Gate | Transplant
"""Tensors that are not a donor's bytes."""
Operation = Copy | Computed


class Reading(NamedTuple):
    """A donor's tensor that is read."""

    donor: str
    source: str
    """The tensor's name in the donor."""
    tensor: Tensor


def readings(operation: Operation) -> list[Reading]:
    """What an operation reads; of a matrix whose rows come from several donors, each one's."""
    if isinstance(operation, Copy):
        return [Reading(operation.donor, operation.source, operation.tensor)]
    found = []
    for part in operation.read:
        if part.rows is None:
            found.append(Reading(part.donor, part.source, part.tensor))
        else:
            pairs = zip(part.rows.donors, part.rows.tensors, strict=True)
            found += [Reading(donor, part.source, tensor) for donor, tensor in pairs]
    return found


def zero_row_remarks(
    operations: Sequence[Operation], vocabulary: Vocabulary | None, asked: Collection[str]
) -> Iterator[str]:
    """Report tokens of the result that no donor has a row for, but those that the recipe sets."""
    if vocabulary is None:
        return
    for operation in operations:
        parts = operation.read if isinstance(operation, Combine) else ()
        rows = next((part.rows for part in parts if part.rows), None)
        if rows is None:
            continue
        empty = [
            token
            for token, index in vocabulary.tokens.items()
            if rows.origin[index] < 0 and token not in asked
        ]
        if empty:
            listed = ", ".join(map(repr, empty[:3])) + (", ..." if len(empty) > 3 else "")
            yield (
                f"{operation.name} has rows of zeros for {len(empty):,} of "
                f"{len(vocabulary.tokens):,} tokens, which no donor has: {listed}; "
                "tokenizer: {approximate: nearest} makes rows from those of known tokens"
            )
        return


Rebind = Callable[[str, str], tuple[str, Tensor]]
"""From a donor's name and a tensor's name in it to the donor's new name and the tensor's place."""


def rebound(operations: Sequence[Operation], rebind: Rebind) -> tuple[Operation, ...]:
    """The same operations on tensors that are elsewhere: a stage's, once it has been made."""

    def part(given: Input) -> Input:
        donor, tensor = rebind(given.donor, given.source)
        if given.rows is None:
            return given._replace(donor=donor, tensor=tensor)
        places = [rebind(name, given.source) for name in given.rows.donors]
        names, tensors = (tuple(each) for each in zip(*places, strict=True))
        return given._replace(
            donor=donor, tensor=tensor, rows=given.rows._replace(donors=names, tensors=tensors)
        )

    made: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Copy):
            donor, tensor = rebind(operation.donor, operation.source)
            made.append(operation._replace(donor=donor, tensor=tensor))
        elif isinstance(operation, Rotate):
            gain = operation.gain and part(operation.gain)
            made.append(operation._replace(given=part(operation.given), gain=gain))
        elif isinstance(operation, Perturb):
            made.append(operation._replace(given=part(operation.given)))
        elif isinstance(operation, Gate):
            made.append(operation)
        elif isinstance(operation, Transplant):
            reference = operation.reference and part(operation.reference)
            made.append(operation._replace(given=part(operation.given), reference=reference))
        else:
            inputs = tuple(part(given) for given in operation.inputs)
            base = operation.base and part(operation.base)
            made.append(operation._replace(inputs=inputs, base=base))
    return tuple(made)
