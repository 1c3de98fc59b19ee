"""How large the result of a recipe is, before it is made."""

from math import prod
from typing import NamedTuple

from frankenmerge.donors.config import head_width, quantity
from frankenmerge.splicing.resolve import Splice
from frankenmerge.storage.dtypes import DTYPES


class Summary(NamedTuple):
    """The size of a result; what only a model has is None for tensors alone."""

    depth: int | None
    """In blocks."""
    seams: int | None
    tensors: int
    computed: int
    """Tensors that are not a donor's bytes."""
    parameters: int
    bytes: int
    """Of the tensors on disk; what loading them in their own type takes in memory too."""
    dtype: str
    memory: dict[str, int]
    """Bytes to load it, by the type it is loaded in."""
    kv_cache_per_token: int | None
    """Bytes that keys and values of one token take in all blocks, in the result's type, no window
    regarded.
    """


def summary(splice: Splice) -> Summary:
    """Count what a splice's operations make."""
    parameters = sum(prod(made.shape) for made in splice.operations)
    dtype = DTYPES[splice.dtype]
    return Summary(
        depth=None if splice.raw else len(splice.blocks),
        seams=None if splice.raw else len(splice.seams),
        tensors=len(splice.operations),
        computed=splice.computed,
        parameters=parameters,
        bytes=splice.bytes,
        dtype=dtype.torch_name,
        memory={dtype.torch_name: splice.bytes, "float32": 4 * parameters},
        kv_cache_per_token=None if splice.raw else _kv_cache_per_token(splice, dtype.bytes),
    )


def _kv_cache_per_token(splice: Splice, width: int) -> int:
    heads, head = quantity(splice.config, "kv_heads") or 0, head_width(splice.config) or 0
    return 2 * len(splice.blocks) * heads * head * width
