"""The inputs of a merge method: tensors as flat chunks, which it may read repeatedly."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from frankenmerge.errors import Fault, raise_all
from frankenmerge.splicing.methods import METHODS, Value, faults, resolved

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**17
"""Elements per step of a statistics pass and per block of a random stream.

512 KiB of float32 fit in the cache of a core.

The number is fixed, so that the order of sums does not depend on the chunks of the result.
"""

_SEGMENT = 1024

Span = tuple[int, int]
"""Flat elements `[start, stop)`."""


class Raw(NamedTuple):
    """Elements as stored in a file."""

    content: memoryview
    dtype: str
    """The type's name in safetensors."""
    fault: Fault
    """The fault to report if NaN or Inf is among them."""


class Operand(NamedTuple):
    """The tensor of one model."""

    read: Callable[[int, int], Any]
    """Flat elements `[start, stop)` in the form that the arithmetic takes. torch: a tensor,
    one-dimensional, contiguous, float32, on the device to compute on, which the method may
    overwrite. C: a `Raw`. Neither is used after the same operand is read again.
    """
    parameters: Mapping[str, Value] = {}


class Inputs(NamedTuple):
    """All arguments of a method; parameters are complete and valid."""

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
        """Length of a row; the tensor is treated as the matrix `[size / width, width]`."""
        return self.shape[-1] if self.shape else 1

    def each(self, name: str) -> list[float]:
        """Return the parameter `name` of every model."""
        return [float(operand.parameters[name]) for operand in self.models]

    def spans(self, step: int = BLOCK, *, rows: bool = False) -> Iterator[Span]:
        """Split the tensor into spans of `step` elements, or with `rows` into whole rows."""
        if rows:
            step = max(1, step // self.width) * self.width
        return ((start, min(start + step, self.size)) for start in range(0, self.size, step))

    def deltas(self, start: int, stop: int) -> "tuple[Tensor, list[Tensor]]":
        """Return the base and the task vectors: every model minus the base."""
        assert self.base
        base = self.base.read(start, stop)
        return base, [one_nan(operand.read(start, stop).sub_(base)) for operand in self.models]


def one_nan(values: "Tensor") -> "Tensor":
    """Replace every NaN by the same one, in place.

    Which NaN an operation gives depends on the processor, and its bits are ranks and signs.
    """
    return values if math.isfinite(values.sum()) else values.masked_fill_(values.isnan(), math.nan)


def precise_sum(values: "Tensor") -> float:
    """Sum flat float32 values in float64, except NaN and Inf (permitted by --allow-nan).

    A segment is one output of the reduction, so the order does not depend on the number of threads.
    """
    import torch

    cut = len(values) // _SEGMENT * _SEGMENT
    total = float(
        values[:cut].view(-1, _SEGMENT).sum(1, dtype=torch.float64).sum()
        + values[cut:].sum(dtype=torch.float64)
    )
    return total if math.isfinite(total) else precise_sum(values.nan_to_num(0.0, 0.0, 0.0))


class ChunkRule(NamedTuple):
    """How to compute any chunk of a result, after the statistics have been computed."""

    chunk: "Callable[[int, int], Tensor]"
    """Returns flat elements `[start, stop)` of the result, float32."""
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
    """Return the inputs of a method, with default parameters, and without a base if it has none.

    Raises FrankenmergeError, all faults together, if the method does not accept the parameters or
    the number of models.
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
