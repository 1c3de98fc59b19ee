"""The table of families: one entry each; no other module knows a family by name."""

from collections.abc import Callable
from dataclasses import replace

from frankenmerge.donors.architecture import (
    FULL,
    LAYER_TYPES,
    NO_ROPE_LAYERS,
    SLIDING,
    Architecture,
    Config,
    Keys,
    PerBlock,
    Stream,
)


def _from_the_window_on(config: Config, index: int) -> str:
    """Qwen: the first `max_window_layers` blocks have full attention."""
    limited = (
        config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    )
    return SLIDING if limited and index >= config.get("max_window_layers", 28) else FULL


def _all_but_every(default: int, number: str = "") -> Callable[[Config, int], str]:
    """Gemma, Cohere: the last block of each group has full attention, the others a window.

    The size of a group is the config field `number`, or the default.
    """
    return lambda config, index: FULL if (index + 1) % config.get(number, default) == 0 else SLIDING


def _has_rope(config: Config, index: int) -> int:
    """SmolLM3: every n-th block has no rotary positions."""
    return int((index + 1) % config.get("no_rope_layer_interval", 4) != 0)


def _without_rope_sliding(config: Config, index: int) -> str:
    """SmolLM3: the window, if there is one, applies to the blocks without rotary positions."""
    limited = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return SLIDING if limited and not _SMOLLM3_ROPE.of(config, index) else FULL


def _is_dense(config: Config, index: int) -> bool:
    """Qwen's mixtures of experts: some blocks have a dense MLP instead."""
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
"""The router, and the experts' input maps as transformers 5 has them in memory, one tensor for all
experts.
"""
_OUTPUT_NORMS = Stream({}, output_norms=("post_attention_layernorm", "post_feedforward_layernorm"))
_INV_FREQ = r"rotary_emb\.inv_freq$"
DECODER = Architecture(
    "model.", "layers.{}.", ("embed_tokens.",), "norm.", ignored=_INV_FREQ, defaults=_LLAMA_DEFAULTS
)
"""Llama's layout, which most families follow."""
USUAL = replace(
    DECODER,
    per_block=(),
    defaults={},
    tied=True,
    queries_keys=(),  # whether attention to a single position is its value is not known
    listed=False,
)
"""What a family that is not in the table begins with; its names are inferred from its tensors, and
its blocks are compared with transformers' own before they move.
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
        stream=_OUTPUT_NORMS,
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
        stream=_OUTPUT_NORMS,
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
        stream=_OUTPUT_NORMS,
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

TEXT_ONLY = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language models of wrappers that compute with text alone what a text-only family computes: the
positions that they have for images are the same in all three axes.
"""
INDEX_BOUND = ("num_kv_shared_layers", "per_layer_config")
"""Like `Architecture.index_bound`, for every family of the table: blocks that read the keys and
values of other blocks, settings by index.
"""
