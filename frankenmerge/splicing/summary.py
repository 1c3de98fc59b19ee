"""What a recipe makes, told before it is made."""

from math import prod
from typing import NamedTuple

from frankenmerge.donors.config import head_width, quantity
from frankenmerge.splicing.compatibility import (
    DTYPE_NAMES,
    result_config,
    result_dtype,
    spelled_out,
)
from frankenmerge.splicing.operations import Copy
from frankenmerge.splicing.stages import Stage
from frankenmerge.storage.safetensors_header import BYTES_OF


class Summary(NamedTuple):
    """The size of a result."""

    depth: int
    """In blocks."""
    seams: int
    tensors: int
    computed: int
    """Tensors that are not a donor's bytes."""
    parameters: int
    bytes: int
    """Of the tensors on disk; what loading them in their own type takes in memory too."""
    dtype: str
    memory: dict[str, int]
    """Bytes to load it, by the type it is loaded in."""
    kv_cache_per_token: int
    """Bytes that keys and values of one token take in all blocks, in the result's type, no window
    regarded.
    """


def summary(stage: Stage) -> Summary:
    """Count what the stage's operations make."""
    recipe = spelled_out(stage.recipe, stage.donors)
    config = result_config(recipe, stage.donors)
    dtype = result_dtype(recipe, stage.donors)
    parameters = sum(prod(made.shape) for made in stage.operations)
    computed = sum(not isinstance(made, Copy) for made in stage.operations)
    total = sum(made.bytes for made in stage.operations)
    memory = {DTYPE_NAMES[dtype]: total, "float32": 4 * parameters}
    cache = (
        2
        * len(recipe.blocks)
        * (quantity(config, "kv_heads") or 0)
        * (head_width(config) or 0)
        * BYTES_OF[dtype]
    )
    return Summary(
        len(recipe.blocks),
        len(recipe.seams),
        len(stage.operations),
        computed,
        parameters,
        total,
        DTYPE_NAMES[dtype],
        memory,
        cache,
    )
