"""Sizes of a block's tensors that follow from config.json, compared with those in the file."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from frankenmerge.donors.architecture import Config
from frankenmerge.donors.config import head_width, quantity
from frankenmerge.errors import Fault

if TYPE_CHECKING:
    from frankenmerge.donors.checkpoint import Checkpoint

_SHAPES: dict[str, tuple[str, ...]] = {
    r"self_attn\.q_proj": ("queries", "width"),
    r"self_attn\.[kv]_proj": ("keys", "width"),
    r"(self_attn\.o_proj|attention\.dense)": ("width", "queries"),
    r"self_attn\.qkv_proj": ("queries and keys and values", "width"),
    r"attention\.query_key_value": ("thrice queries", "width"),
    r"(mlp\.(gate|up)_proj|mlp\.dense_h_to_4h|block_sparse_moe\.experts\.\d+\.w[13])": (
        "inner",
        "width",
    ),
    r"(mlp\.down_proj|mlp\.dense_4h_to_h|block_sparse_moe\.experts\.\d+\.w2)": ("width", "inner"),
    r"mlp\.gate_up_proj": ("twice inner", "width"),
    r"(mlp|block_sparse_moe)\.gate": ("experts", "width"),
    r"(input|post_attention|(pre|post)_feedforward)_layernorm": ("width",),
    r"ln_[12]": ("width",),
}
"""What the axes of weights are, by pattern of their modules within a block."""
_TRANSPOSED: dict[str, tuple[str, ...]] = {
    r"attn\.c_attn": ("width", "queries and keys and values"),
    r"attn\.c_proj": ("queries", "width"),
    r"mlp\.c_fc": ("width", "inner"),
    r"mlp\.c_proj": ("inner", "width"),
}
"""The same for maps that are stored `[in, out]`."""
_OTHER_HEADS = re.compile(r"lora_rank|(nope|rope|[vk])_head_dim|multi_query|new_decoder")
"""Config fields of attention whose sizes are not these."""
_PACKED = ("U8", "I32")
"""Types in which a quantisation stores several weights in one element, in a shape of its own."""
_REMEDY = "use a checkpoint whose config.json belongs to its weights"


def size_faults(checkpoint: "Checkpoint") -> Iterator[Fault]:
    """Compare the shapes of the blocks' tensors with config.json: one fault a kind of tensor."""
    for name, (expected, found) in _differing(checkpoint, checkpoint.config).items():
        wanted = f"shape {list(expected)}, as config.json says"
        yield Fault(f"{checkpoint.path}: {name}", wanted, f"shape {list(found)}", _REMEDY)


Shape = tuple[int, ...]


def _differing(checkpoint: "Checkpoint", config: Config) -> dict[str, tuple[Shape, Shape]]:
    """Expected and found shapes by name: of each kind of tensor the first that does not fit."""
    architecture, sizes = checkpoint.architecture, _sizes(config)
    prefix = architecture.root + architecture.block
    transposed = architecture.stream is not None and architecture.stream.transposed
    first = {
        re.sub(r"\d+", "*", canonical): (canonical, name)
        for (role, _), names in reversed(checkpoint.by_role.items())
        for canonical, name in names.items()
        if role == "block"
    }
    differing: dict[str, tuple[Shape, Shape]] = {}
    for canonical, name in first.values():
        shape = checkpoint.tensors[name].shape
        if checkpoint.quantisation and checkpoint.tensors[name].dtype in _PACKED and 0 not in shape:
            continue
        module, _, leaf = canonical.removeprefix(prefix).rpartition(".")
        expected = _expected(module, leaf, sizes, transposed)
        if expected is not None and expected != shape:
            differing[name] = expected, shape
    return differing


def _expected(module: str, leaf: str, sizes: Mapping[str, int], transposed: bool) -> Shape | None:
    """The shape of a module's weight or bias; None where it is not known."""
    tables = (_SHAPES, _TRANSPOSED) if transposed else (_SHAPES,)
    found = [
        (axes, table)
        for table in tables
        for key, axes in table.items()
        if re.fullmatch(key, module)
    ]
    if not found or leaf not in ("weight", "bias"):
        return None
    axes, table = found[0]
    if leaf == "bias":
        axes = axes[-1:] if table is _TRANSPOSED else axes[:1]
    return tuple(sizes[axis] for axis in axes) if all(axis in sizes for axis in axes) else None


def _sizes(config: Config) -> dict[str, int]:
    """Sizes of axes by their names here, as far as config.json says."""
    width, inner = quantity(config, "width"), quantity(config, "inner")
    found: dict[str, int | None] = {
        "width": width,
        "inner": inner,
        "twice inner": 2 * inner if type(inner) is int else None,
        "experts": config.get("num_local_experts", config.get("num_experts")),
    }
    heads, keys, one = quantity(config, "heads"), quantity(config, "kv_heads"), head_width(config)
    if (
        type(heads) is type(keys) is type(one) is int
        and heads
        and keys
        and one
        and not any(_OTHER_HEADS.search(key) and config[key] for key in config)
    ):
        found |= {"queries": heads * one, "keys": keys * one, "thrice queries": 3 * heads * one}
        found["queries and keys and values"] = (heads + 2 * keys) * one
    return {name: size for name, size in found.items() if type(size) is int and size > 0}
