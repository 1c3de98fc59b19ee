"""The families: where a family's blocks are, what its config calls things, which fields belong to single blocks.

A family is one entry of `FAMILIES`; nothing else in the package knows a family by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from frankenmerge.errors import fail

Config = Mapping[str, Any]
Role = Literal["block", "embedding", "final", "head", "ignored"]


@dataclass(frozen=True)
class Keys:
    """What a family's config.json calls the quantities that every family has."""

    blocks: str = "num_hidden_layers"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    inner: str = "intermediate_size"
    positions: str = "max_position_embeddings"
    vocabulary: str = "vocab_size"


@dataclass(frozen=True)
class PerBlock:
    """Something that config.json tells of every block, and that moves with the block."""

    key: str
    """The list in config.json."""
    usual: Any
    """What a block is where neither the list nor a rule says."""
    rule: Callable[[Config, int], Any] | None = None
    """What the family takes a block of a given index to be where config.json has no list."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Config numbers that a rule reads, here or in older versions of the family, each with the
    least it may be.
    """
    marker: str | None = None
    """Set where the list holds not an entry a block but the indices of some blocks, which the rule
    always reads: a part of a tensor name that those blocks have and the others have not.
    """

    def of(self, config: Config, index: int) -> Any:
        """The entry of one block."""
        listed = config.get(self.key)
        if isinstance(listed, list) and not self.marker:
            return listed[index]
        return self.rule(config, index) if self.rule else self.usual

    def written(self, entries: Sequence[Any]) -> list[Any]:
        """What config.json lists for blocks with these entries."""
        return (
            [index for index, entry in enumerate(entries) if entry]
            if self.marker
            else list(entries)
        )


FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = PerBlock("layer_types", FULL)
NO_ROPE_LAYERS = PerBlock("no_rope_layers", 1)


@dataclass(frozen=True)
class Stream:
    """How a block's tensors meet the residual stream, so that it can be rotated to another basis; names behind the block's prefix."""

    norms: Mapping[str, tuple[str, ...]]
    """Norms of the stream, each with the maps that read what it makes; experts' maps without the
    expert's number.
    """
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    """Maps whose outputs are added to the stream."""
    inside: tuple[str, ...] = ()
    """What meets the stream nowhere, such as norms of single heads."""
    behind: tuple[str, ...] = ()
    """Norms of what a map writes: their gains belong to the donor's own basis, so such a block
    cannot be rotated.
    """
    transposed: bool = False
    """Whether maps are stored `[in, out]`."""


@dataclass(frozen=True)
class Architecture:
    """One family's names; tensor names are prefixes, as they stand in a checkpoint."""

    root: str
    """The inner model's prefix; old checkpoints may omit it."""
    block: str
    """A block's prefix behind `root`, `{}` for its index."""
    embedding: tuple[str, ...]
    """Prefixes behind `root` of what comes before the first block."""
    final: str
    """Prefix behind `root` of the final norm."""
    head: str = "lm_head."
    """Prefix, without `root`, of the map from the last hidden state to the vocabulary."""
    norm: Literal["rms", "layer"] = "rms"
    keys: Keys = field(default_factory=Keys)
    per_block: tuple[PerBlock, ...] = (NO_ROPE_LAYERS, LAYER_TYPES)
    """What moves with the blocks; what a rule needs comes before it."""
    index_bound: tuple[str, ...] = ()
    """Config fields that, when set, make a block's computation depend on its index: such donors
    cannot be respliced.
    """
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds of attention that have rotary settings of their own, each with the older config field
    that holds its base.
    """
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Older names of config fields, with the newer ones."""
    ignored: str = r"(?!)"
    """Pattern of constant buffers that old checkpoints carry and no loader reads."""
    defaults: Config = field(default_factory=dict)
    """What the family takes for a field that config.json leaves out, for the fields compared
    between donors.
    """
    learned_positions: bool = False
    """Whether positions are a matrix beside the embedding."""
    tied: bool = False
    """Whether the head is the embedding when config.json does not say."""
    widening: int = 0
    """How many times the width the inner width is when config.json does not say."""
    queries_keys: tuple[str, ...] = ("q_proj", "k_proj")
    """Maps of a block's attention that make queries and keys alone; attention to one position does
    without them.
    """
    fused: str | None = None
    """The map that makes queries, keys and values together, in this order."""
    fused_by_head: bool = False
    """Whether the fused outputs are in that order within each head, instead of over all."""
    stream: Stream | None = None
    """How its blocks meet the residual stream; None where nobody has said."""
    listed: bool = True
    """Whether this is an entry of the table, whose `defaults` are known."""

    def role(self, name: str) -> tuple[Role, int | None, str]:
        """Tell what a tensor is for: (role, block index or None, canonical name).

        A canonical block tensor name holds `{}` for the index. Raises FrankenmergeError for a
        tensor of no known role.
        """
        if re.search(self.ignored, name):
            return "ignored", None, name
        if name.startswith(self.head):
            return "head", None, name
        inner = name.removeprefix(self.root)
        if match := re.match(re.escape(self.block).replace(r"\{\}", r"(\d+)"), inner):
            return "block", int(match[1]), self.root + self.block + inner[match.end() :]
        if inner.startswith(self.embedding):
            return "embedding", None, self.root + inner
        if inner.startswith(self.final):
            return "final", None, self.root + inner
        raise fail(
            f"tensor {name}",
            "a tensor of a block, the embedding, the final norm or the head",
            "a name of none of these",
            "use a plain causal language model; adapters and multimodal towers cannot be spliced",
        )


def _from_the_window_on(config: Config, index: int) -> str:
    """Qwen: the first `max_window_layers` blocks see everything."""
    limited = (
        config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    )
    return SLIDING if limited and index >= config.get("max_window_layers", 28) else FULL


def _all_but_every(default: int, number: str = "") -> Callable[[Config, int], str]:
    """Gemma, Cohere: one block in so many sees everything, the last of each group; `number` is the config field that says."""
    return lambda config, index: FULL if (index + 1) % config.get(number, default) == 0 else SLIDING


def _has_rope(config: Config, index: int) -> int:
    """SmolLM3: one block in so many goes without rotary positions."""
    return int((index + 1) % config.get("no_rope_layer_interval", 4) != 0)


def _without_rope_sliding(config: Config, index: int) -> str:
    """SmolLM3: the window, if there is one, is for the blocks without rotary positions."""
    limited = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return SLIDING if limited and not _SMOLLM3_ROPE.of(config, index) else FULL


def _is_dense(config: Config, index: int) -> bool:
    """Qwen's mixtures of experts: some blocks have a plain MLP instead."""
    experts = config.get("num_local_experts", config.get("num_experts", 128))
    sparse = (
        isinstance(experts, int)
        and experts > 0
        and (index + 1) % config.get("decoder_sparse_step", 1) == 0
    )
    return index in (config.get("mlp_only_layers") or ()) or not sparse


_SMOLLM3_ROPE = replace(NO_ROPE_LAYERS, rule=_has_rope, numbers={"no_rope_layer_interval": 1})
_QWEN_TYPES = replace(LAYER_TYPES, rule=_from_the_window_on, numbers={"max_window_layers": 0})
_DENSE_BLOCKS = PerBlock(
    "mlp_only_layers", False, _is_dense, {"decoder_sparse_step": 1}, marker="mlp.gate_proj."
)

_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {"use_sliding_window": False, "sliding_window": 4096}
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QKV, _GATED = tuple(f"self_attn.{name}_proj" for name in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
_STREAM = Stream({"input_layernorm": _QKV, "post_attention_layernorm": _GATED})
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_FUSED_EXPERTS = ("mlp.gate", "mlp.experts.gate_up_proj")
"""The router, and the experts' reading maps as transformers 5 holds them in memory, one tensor for
all.
"""
_BEHIND = Stream({}, behind=("post_attention_layernorm", "post_feedforward_layernorm"))
_INV_FREQ = r"rotary_emb\.inv_freq$"
DECODER = Architecture(
    "model.", "layers.{}.", ("embed_tokens.",), "norm.", ignored=_INV_FREQ, defaults=_LLAMA_DEFAULTS
)
"""The layout that Llama began and most families follow."""
USUAL = replace(
    DECODER,
    per_block=(
        replace(NO_ROPE_LAYERS, numbers={"no_rope_layer_interval": 1}),
        replace(
            LAYER_TYPES,
            numbers={
                "max_window_layers": 0,
                "sliding_window_pattern": 1,
                "_sliding_window_pattern": 1,
            },
        ),
    ),
    defaults={},
    tied=True,
    queries_keys=(),  # whether its attention to one position is the value there is not known
    listed=False,
)
"""What a family that is not in the table is taken to have, where `inferred` finds no reason against
it.
"""

FAMILIES: dict[str, Architecture] = {
    "llama": replace(DECODER, stream=_STREAM),
    "mistral": replace(
        DECODER, defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096}, stream=_STREAM
    ),
    "mixtral": replace(
        DECODER,
        synonyms={"num_experts": "num_local_experts"},
        defaults=_LLAMA_DEFAULTS
        | {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        stream=Stream(
            {
                "input_layernorm": _QKV,
                "post_attention_layernorm": (
                    *(f"block_sparse_moe.{name}" for name in ("gate", "experts.w1", "experts.w3")),
                    *_FUSED_EXPERTS,
                ),
            },
            ("self_attn.o_proj", "block_sparse_moe.experts.w2", "mlp.experts.down_proj"),
        ),
    ),
    "qwen2": replace(DECODER, per_block=(_QWEN_TYPES,), defaults=_QWEN_DEFAULTS, stream=_STREAM),
    "qwen3": replace(
        DECODER,
        per_block=(_QWEN_TYPES,),
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        stream=replace(_STREAM, inside=_HEAD_NORMS),
    ),
    "qwen3_moe": replace(
        DECODER,
        per_block=(_DENSE_BLOCKS, LAYER_TYPES),
        synonyms={"num_experts": "num_local_experts"},
        defaults=_QWEN_DEFAULTS
        | {
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_local_experts": 128,
            "norm_topk_prob": False,
        },
        stream=Stream(
            {
                "input_layernorm": _QKV,
                "post_attention_layernorm": (
                    *_GATED,
                    "mlp.experts.gate_proj",
                    "mlp.experts.up_proj",
                    *_FUSED_EXPERTS,
                ),
            },
            (*_STREAM.writes, "mlp.experts.down_proj"),
            _HEAD_NORMS,
        ),
    ),
    "gemma2": replace(
        DECODER,
        per_block=(replace(LAYER_TYPES, rule=_all_but_every(2)),),
        defaults=_GEMMA_DEFAULTS
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": None,
        },
        tied=True,
        stream=_BEHIND,
    ),
    "gemma3_text": replace(
        DECODER,
        per_block=(
            replace(
                LAYER_TYPES,
                rule=_all_but_every(6, "sliding_window_pattern"),
                numbers={"sliding_window_pattern": 1, "_sliding_window_pattern": 1},
            ),
        ),
        rope_kinds={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
        defaults=_GEMMA_DEFAULTS
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        }
        | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        tied=True,
        stream=_BEHIND,
    ),
    "phi3": replace(
        DECODER,
        queries_keys=(),
        fused="qkv_proj",
        defaults=_LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
        stream=Stream(
            {
                "input_layernorm": ("self_attn.qkv_proj",),
                "post_attention_layernorm": ("mlp.gate_up_proj",),
            }
        ),
    ),
    "olmo2": replace(
        DECODER,
        defaults=_LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
        stream=_BEHIND,
    ),
    "smollm3": replace(
        DECODER,
        per_block=(_SMOLLM3_ROPE, replace(LAYER_TYPES, rule=_without_rope_sliding)),
        defaults=_LLAMA_DEFAULTS
        | {"rope_theta": 2e6, "use_sliding_window": False, "sliding_window": None},
        tied=True,
        stream=_STREAM,
    ),
    "cohere2": replace(
        DECODER,
        norm="layer",
        per_block=(
            replace(
                LAYER_TYPES,
                rule=_all_but_every(4, "sliding_window_pattern"),
                numbers={"sliding_window_pattern": 1, "layer_switch": 1},
            ),
        ),
        defaults={
            "hidden_act": "silu",
            "attention_bias": False,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "rope_theta": 10000.0,
        }
        | {"sliding_window": 4096},
        tied=True,
        stream=Stream({"input_layernorm": (*_QKV, *_GATED)}),
    ),
    "stablelm": replace(
        DECODER,
        norm="layer",
        defaults={
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        }
        | {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False},
        stream=replace(
            _STREAM, inside=("self_attn.q_layernorm.norms", "self_attn.k_layernorm.norms")
        ),
    ),
    "gpt2": Architecture(
        "transformer.",
        "h.{}.",
        ("wte.", "wpe."),
        "ln_f.",
        norm="layer",
        keys=Keys("n_layer", "n_embd", "n_head", "n_head", "n_inner", "n_positions"),
        index_bound=("scale_attn_by_inverse_layer_idx",),
        ignored=r"\.attn\.(bias|masked_bias)$",
        defaults={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "layer_norm_epsilon": 1e-5,
        }
        | {"reorder_and_upcast_attn": False, "add_cross_attention": False},
        learned_positions=True,
        tied=True,
        widening=4,
        queries_keys=(),
        fused="c_attn",
        stream=Stream(
            {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
            ("attn.c_proj", "mlp.c_proj"),
            transposed=True,
        ),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.",
        "layers.{}.",
        ("embed_in.",),
        "final_layer_norm.",
        head="embed_out.",
        norm="layer",
        ignored=rf"attention\.(bias|masked_bias)$|{_INV_FREQ}",
        defaults={
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "layer_norm_eps": 1e-5,
        }
        | {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        queries_keys=(),
        fused="query_key_value",
        fused_by_head=True,
        stream=Stream(
            {
                "input_layernorm": ("attention.query_key_value",),
                "post_attention_layernorm": ("mlp.dense_h_to_4h",),
            },
            ("attention.dense", "mlp.dense_4h_to_h"),
        ),
    ),
}

INDEX_BOUND = ("num_kv_shared_layers", "per_layer_config")
"""Likewise `Architecture.index_bound`, in any family: blocks that read the keys and values of
others, settings by index.
"""
