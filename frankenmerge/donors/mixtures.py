"""The table of mixtures: what dense donors become when their MLPs are experts of one model.

Next to `families` the only module that knows families by name.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from frankenmerge.donors.architecture import LAYER_TYPES, SLIDING, Config
from frankenmerge.donors.config import family, head_width, is_tied, quantity, rope, window

DENSE = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768},
}
"""Families whose MLPs compute the same function of the same three maps, each with the values of
fields that config.json may omit and that blocks do not depend on.
"""
MLP = ("gate_proj", "up_proj", "down_proj")
"""Maps of a dense MLP; the last one writes the residual stream."""
_WEIGHTS = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_BLOCK = {*_WEIGHTS, "input_layernorm.weight", "post_attention_layernorm.weight"}
_QKV_BIASES = {f"self_attn.{name}_proj.bias" for name in "qkv"}
_BIASES = {*_QKV_BIASES, "self_attn.o_proj.bias"}
_HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


@dataclass(frozen=True)
class Kind:
    """A family of mixtures of experts: names of tensors within a block, and its config."""

    model_type: str
    class_name: str
    bases: tuple[str, ...]
    """Families of the donors of everything but the experts."""
    shared: Literal["none", "gated", "plain"]
    """Whether there is an expert that every token passes; `gated` ones are required and scaled by
    a gate of their own, `plain` ones may be there.
    """
    fields: Callable[[Config], dict[str, Any]]
    """Fields of the config besides those of all kinds, from the base's complete config."""
    counts: tuple[str, ...]
    """Names of the fields that hold the number of experts and the inner width of each."""
    tensors: frozenset[str] = frozenset(_BLOCK)
    """Tensors of a base's block that a block of this kind has, too."""
    expert: str = "mlp.experts.{}."
    names: Mapping[str, str] = field(default_factory=lambda: {name: name for name in MLP})
    """Names of an expert's maps by those of a dense MLP's."""
    gate: str = "mlp.gate.weight"
    """`[experts, width]`."""
    shared_expert: str = ""
    shared_gate: str | None = None
    """`[1, width]`."""
    obstacles: Callable[[Config], Iterator[tuple[str, str]]] = lambda _: iter(())
    """Settings of a base that this kind cannot have: what is expected, and what is found."""


def _without_window(base: Config) -> Iterator[tuple[str, str]]:
    if size := window(base):
        yield "attention without a window", f"a window of {size} tokens"


def _deepseek_obstacles(base: Config) -> Iterator[tuple[str, str]]:
    yield from _without_window(base)
    if (kind := rope(base)["rope_type"]) not in ("default", "linear", "dynamic"):
        yield "rotary positions without scaling, or with linear or dynamic scaling", kind
    width, heads = quantity(base, "width") or 0, quantity(base, "heads") or 1
    if head_width(base) != width // heads:
        expected = f"heads of width {width // heads}, the model's width divided by their number"
        yield expected, str(head_width(base))


def _mixtral(base: Config) -> dict[str, Any]:
    return {"sliding_window": window(base)}


def _qwen2_moe(base: Config) -> dict[str, Any]:
    part = next(part for part in family(base).per_block if part.key == LAYER_TYPES.key)
    blocks, size = quantity(base, "blocks") or 0, window(base)
    types = [part.of(base, index) for index in range(blocks)]
    if size and part.rule is None and not base.get(part.key):
        types = [SLIDING] * blocks  # Mistral's window is that of all blocks
    limited = {"sliding_window": size, "layer_types": types} if size else {}
    return {
        "use_sliding_window": bool(size),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": base["model_type"] == "qwen2" or base["attention_bias"],
        "shared_expert_intermediate_size": base["intermediate_size"],
        **limited,
    }


def _qwen3_moe(base: Config) -> dict[str, Any]:
    return {
        "attention_bias": base.get("attention_bias", False),
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _deepseek(base: Config) -> dict[str, Any]:
    settings = rope(base)
    kind = settings["rope_type"]
    scaling = {} if kind == "default" else {"type": kind, "factor": settings["factor"]}
    repository = "deepseek-ai/deepseek-moe-16b-base"
    return {
        "attention_bias": base.get("attention_bias", False),
        "rope_theta": settings["rope_theta"],
        **({"rope_scaling": scaling} if scaling else {}),
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "auto_map": {
            "AutoConfig": f"{repository}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{repository}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{repository}--modeling_deepseek.DeepseekForCausalLM",
        },
    }


KINDS: dict[str, Kind] = {
    kind.model_type: kind
    for kind in (
        Kind(
            "mixtral",
            "MixtralForCausalLM",
            ("llama", "mistral"),
            "none",
            _mixtral,
            ("num_local_experts",),
            expert="block_sparse_moe.experts.{}.",
            names={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            gate="block_sparse_moe.gate.weight",
        ),
        Kind(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            ("qwen2", "llama", "mistral"),
            "gated",
            _qwen2_moe,
            ("num_experts", "moe_intermediate_size"),
            tensors=frozenset(_BLOCK | _QKV_BIASES),
            shared_expert="mlp.shared_expert.",
            shared_gate="mlp.shared_expert_gate.weight",
        ),
        Kind(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ("qwen3",),
            "none",
            _qwen3_moe,
            ("num_experts", "moe_intermediate_size"),
            tensors=frozenset(_BLOCK | _BIASES | _HEAD_NORMS),
            obstacles=_without_window,
        ),
        Kind(
            "deepseek",
            "DeepseekForCausalLM",
            ("llama", "mistral"),
            "plain",
            _deepseek,
            ("n_routed_experts", "moe_intermediate_size"),
            tensors=frozenset(_BLOCK | _BIASES),
            obstacles=_deepseek_obstacles,
            shared_expert="mlp.shared_experts.",
        ),
    )
}
"""Every kind by the `model_type` of its config, in the order in which they are tried."""

_OF_DENSE = ("architectures", "auto_map", "pretraining_tp", "mlp_bias", "layer_types")
_OF_DENSE += ("max_window_layers", "no_rope_layers")


def kind_for(base: str, *, shared: bool, prompted: bool) -> Kind | None:
    """The kind that a base's family becomes if none is named; None if there is none.

    Args:
        base: the family.
        shared: whether there is a shared expert.
        prompted: whether that has prompts, and thus a gate.
    """
    fitting = [kind for kind in KINDS.values() if base in kind.bases]
    wanted = "none" if not shared else "gated" if prompted else "plain"
    return next((kind for kind in fitting if kind.shared == wanted), next(iter(fitting), None))


def mixture_config(
    kind: Kind, base: Config, *, experts: int, inner: int, per_token: int, shared: bool
) -> dict[str, Any]:
    """The config of a mixture.

    Fields that the base's config.json leaves to its family's defaults are written out, since the
    kind may have others.

    Args:
        kind: what the mixture becomes.
        base: the config of everything but the experts.
        experts: their number.
        inner: the inner width of each.
        per_token: experts that a token passes.
        shared: whether there is a shared expert.
    """
    name = base["model_type"]
    known = {**DENSE[name], **family(base).defaults}
    if base.get("rope_parameters"):
        known.pop("rope_theta")
    config = {**known, **deepcopy(dict(base)), "intermediate_size": inner}
    config |= {
        "num_key_value_heads": quantity(base, "kv_heads"),
        "head_dim": head_width(base),
        "tie_word_embeddings": is_tied(base),
    }
    fields = kind.fields({**config, "model_type": name})
    if "rope_theta" in fields:  # in the form of older versions alone
        config.pop("rope_parameters", None)
        config.pop("rope_scaling", None)
    for key in (*_OF_DENSE, "attention_bias", "use_sliding_window", "sliding_window"):
        config.pop(key, None)
    config |= dict.fromkeys(kind.counts[:1], experts) | dict.fromkeys(kind.counts[1:], inner)
    config |= {"num_experts_per_tok": per_token, "output_router_logits": False}
    if kind.shared == "plain":
        config["n_shared_experts"] = 1 if shared else None
    return config | fields | {"model_type": kind.model_type, "architectures": [kind.class_name]}
