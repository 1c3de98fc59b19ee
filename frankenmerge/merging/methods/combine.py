"""One tensor of the result, computed in chunks from the donors' tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from frankenmerge.errors import fail

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18
"""Elements read of every donor at a time: 512 KiB in halves, which a core's cache holds."""


class Part(NamedTuple):
    """A donor's tensor and what is said of it."""

    read: "Callable[[int, int], torch.Tensor]"
    """Its flat elements [start, stop) as float32."""
    parameters: Mapping[str, Any]


def combine(
    method: str,
    parts: Sequence[Part],
    base: Part | None,
    *,
    shape: tuple[int, ...],
    parameters: Mapping[str, Any],
    name: str,
    seed: int,
    chunk: int = CHUNK,
) -> "Iterator[torch.Tensor]":
    """Yield the tensor in float32, chunk by chunk and in order: the weighted mean of `parts`."""
    if method != "linear":
        raise fail(name, "the method linear", method, "use linear")
    total = sum(part.parameters["weight"] for part in parts) if parameters.get("normalize", True) else 1.0
    for start in range(0, prod(shape), chunk):
        stop = min(start + chunk, prod(shape))
        first, *others = parts
        mixed = first.read(start, stop) * (first.parameters["weight"] / total)
        for part in others:
            mixed.add_(part.read(start, stop), alpha=part.parameters["weight"] / total)
        yield mixed
