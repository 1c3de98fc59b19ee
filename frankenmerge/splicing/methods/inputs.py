"""What a merge method sees of its tensors: flat chunks, read as often as it needs them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from frankenmerge.errors import Fault, raise_all
from frankenmerge.splicing.methods import METHODS, Value, faults, resolved

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**17
"""Elements of a statistics pass's step and of a random stream's block: 512 KiB of float32, which a
core's own cache holds.

It is fixed, so that sums add up in one order whatever the chunks of the result are.
"""

_SEGMENT = 1024

Span = tuple[int, int]
"""Flat elements `[start, stop)`."""


class Raw(NamedTuple):
    """Elements as a file holds them."""

    content: memoryview
    dtype: str
    """As safetensors names it."""
    fault: Fault
    """What to tell where NaN or Inf is among them."""


class Operand(NamedTuple):
    """One model's tensor."""

    read: Callable[[int, int], Any]
    """Flat elements `[start, stop)` as the arithmetic takes them. torch: a tensor, one-dimensional,
    contiguous, float32, on the device to compute on; it is overwritten by the method. C: a `Raw`.
    Neither is looked at any more once the same part is read again.
    """
    parameters: Mapping[str, Value] = {}


class Inputs(NamedTuple):
    """All that a method is given; parameters are complete and sound."""

    models: Sequence[Operand]
    base: Operand | None
    shape: tuple[int, ...]
    parameters: Mapping[str, Value]
    name: str
    seed: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Length of a row: the tensor is seen as the matrix `[size / width, width]`."""
        return self.shape[-1] if self.shape else 1

    def each(self, name: str) -> list[float]:
        """One parameter of every model."""
        return [float(operand.parameters[name]) for operand in self.models]

    def spans(self, step: int = BLOCK, *, rows: bool = False) -> Iterator[Span]:
        """Cut the tensor into spans of `step` elements; with `rows` into whole rows, at least one."""
        if rows:
            step = max(1, step // self.width) * self.width
        return ((start, min(start + step, self.size)) for start in range(0, self.size, step))

    def deltas(self, start: int, stop: int) -> "tuple[Tensor, list[Tensor]]":
        """The base and the task vectors: every model minus the base."""
        assert self.base
        base = self.base.read(start, stop)
        return base, [one_nan(operand.read(start, stop).sub_(base)) for operand in self.models]


def one_nan(values: "Tensor") -> "Tensor":
    """Every NaN the same one, in place: which one an operation makes is up to the processor, and its bits are ranks and signs."""
    return values if math.isfinite(values.sum()) else values.masked_fill_(values.isnan(), math.nan)


def precise_sum(values: "Tensor") -> float:
    """Sum flat float32 values in float64, but for NaN and Inf among them, which --allow-nan let through.

    A segment is one output of the reduction, so that no number of threads changes the order.
    """
    import torch

    cut = len(values) // _SEGMENT * _SEGMENT
    total = float(
        values[:cut].view(-1, _SEGMENT).sum(1, dtype=torch.float64).sum()
        + values[cut:].sum(dtype=torch.float64)
    )
    return total if math.isfinite(total) else precise_sum(values.nan_to_num(0.0, 0.0, 0.0))


class ChunkRule(NamedTuple):
    """A method whose statistics are gathered."""

    chunk: "Callable[[int, int], Tensor]"
    """The result's flat elements `[start, stop)`, float32."""
    rows: bool = False
    """Whether the spans must be whole rows."""


def inputs_of(
    method: str,
    models: Sequence[Operand],
    base: Operand | None,
    *,
    shape: tuple[int, ...],
    parameters: Mapping[str, Value],
    name: str,
    seed: int,
) -> Inputs:
    """What the method sees, defaults filled in and no base where it takes none.

    Raises FrankenmergeError for parameters or a number of models that it cannot take, all faults
    together.
    """
    raise_all(
        faults(
            method,
            [operand.parameters for operand in models],
            parameters,
            base=base is not None,
            place=f"{name} ({method})",
        )
    )
    complete = [
        Operand(operand.read, resolved(method, operand.parameters, per_model=True))
        for operand in models
    ]
    wanted = None if METHODS[method].base == "none" else base
    return Inputs(
        complete, wanted, shape, resolved(method, parameters, per_model=False), name, seed
    )
