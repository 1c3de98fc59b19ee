"""Settings of single blocks in a config of any family: found by their form, moved with the blocks.

A list with an entry a block, a list of block indices, a mapping from block indices. Whether the
moved config gives every block what it has at home is not decided here: the blocks are compared.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

from frankenmerge.donors.architecture import Config

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "num_decoder_layers"),
)
"""Names of the number of blocks; a config may have it under more than one."""
_NAMES_BLOCKS = re.compile(r"layer|block|idx|ids$|indices")


def is_per_block(key: str, value: Any, blocks: int | None) -> bool:
    """Whether a field has an entry for every block, or for blocks by their index."""
    if blocks is None:
        return False
    return bool(
        (isinstance(value, list) and len(value) == blocks)
        or _is_indices(key, value, blocks)
        or _is_by_index(value, blocks)
    )


def moved(
    base: Config, blocks: Sequence[tuple[Config, int]], depth: str, fixed: Collection[str]
) -> dict[str, Any]:
    """The config of a model with these blocks, otherwise as `base`.

    Args:
        base: the config for everything else.
        blocks: for each block the config of its donor and its index there.
        depth: the field with the number of blocks.
        fixed: fields that stay as they are.
    """
    old, result = base.get(depth), deepcopy(dict(base))
    for key, value in base.items():
        if key == depth or (key in DEPTHS and value == old):
            result[key] = len(blocks)
        elif key not in fixed:
            result[key] = _moved(key, value, blocks, depth)
    return result


def _moved(key: str, value: Any, blocks: Sequence[tuple[Config, int]], depth: str) -> Any:
    """The value of a field for these blocks: the base's where a donor's has another form."""
    if not all(is_per_block(key, config.get(key), config.get(depth)) for config, _ in blocks):
        return deepcopy(value)
    if isinstance(value, Mapping):
        number = type(next(iter(value)))
        found = ((place, index, config[key]) for place, (config, index) in enumerate(blocks))
        return {
            number(place): deepcopy(entries[number(index)])
            for place, index, entries in found
            if number(index) in entries
        }
    if all(_is_indices(key, config[key], config[depth]) for config, _ in blocks):
        return [place for place, (config, index) in enumerate(blocks) if index in config[key]]
    return [deepcopy(config[key][index]) for config, index in blocks]


def _is_indices(key: str, value: Any, blocks: int) -> bool:
    """Whether a field lists the indices of some blocks."""
    return (
        isinstance(value, list)
        and bool(_NAMES_BLOCKS.search(key))
        and all(type(index) is int and 0 <= index < blocks for index in value)
        and value == sorted(set(value))
    )


def _is_by_index(value: Any, blocks: int) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(str(key).isdigit() and int(key) < blocks for key in value)
    )
