"""What a model family is: where its blocks are, what its config calls things, which fields belong to single blocks.

A family is one entry of `FAMILIES`; nothing else in the package knows a family by name.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from frankenmerge.errors import Fault, fail

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
class Stream:
    """How a block's tensors meet the residual stream, so that it can be turned to another basis; names behind the block's prefix."""

    norms: Mapping[str, tuple[str, ...]]
    """Norms of the stream, each with the maps that read what it makes."""
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    """Maps whose outputs are added to the stream."""
    inside: tuple[str, ...] = ()
    """What meets the stream nowhere, such as norms of single heads."""
    behind: tuple[str, ...] = ()
    """Norms of what a map writes: their gains belong to the donor's own basis, so such a block cannot be turned."""
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
    per_block: tuple[str, ...] = ("layer_types", "no_rope_layers")
    """Config lists with one entry a block, which move with their blocks."""
    index_bound: tuple[str, ...] = ()
    """Config fields that, when set, make a block's computation depend on its index: such donors cannot be respliced."""
    ignored: str = r"(?!)"
    """Pattern of constant buffers that old checkpoints carry and no loader reads."""
    defaults: Config = field(default_factory=dict)
    """What the family takes for a field that config.json leaves out, for the fields compared between donors."""
    learned_positions: bool = False
    """Whether positions are a matrix beside the embedding."""
    tied: bool = False
    """Whether the head is the embedding when config.json does not say."""
    queries_keys: tuple[str, ...] = ("q_proj", "k_proj")
    """Maps of a block's attention that make queries and keys alone; attention to one position does without them."""
    fused: str | None = None
    """The map that makes queries, keys and values together, in this order."""
    fused_by_head: bool = False
    """Whether the fused outputs are in that order within each head, instead of over all."""
    stream: Stream | None = None
    """How its blocks meet the residual stream; None where nobody has said."""

    def role(self, name: str) -> tuple[Role, int | None, str]:
        """Tell what a tensor is for: (role, block index or None, canonical name).

        A canonical block tensor name holds `{}` for the index. Raises FrankenmergeError for a tensor of no known role.
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


_LLAMA_DEFAULTS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6}
_INV_FREQ = r"rotary_emb\.inv_freq$"
_QKV, _GATED = tuple(f"self_attn.{name}_proj" for name in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
_STREAM = Stream({"input_layernorm": _QKV, "post_attention_layernorm": _GATED})
DECODER = Architecture("model.", "layers.{}.", ("embed_tokens.",), "norm.", ignored=_INV_FREQ, defaults=_LLAMA_DEFAULTS, stream=_STREAM)
"""The layout that Llama began and most families follow."""

FAMILIES: dict[str, Architecture] = {
    "llama": DECODER,
    "mistral": replace(DECODER, defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096}),
    "qwen2": replace(DECODER, defaults=_LLAMA_DEFAULTS | {"use_sliding_window": False}),
    "qwen3": replace(
        DECODER,
        defaults=_LLAMA_DEFAULTS | {"use_sliding_window": False},
        stream=replace(_STREAM, inside=("self_attn.q_norm", "self_attn.k_norm")),
    ),
    "phi3": replace(
        DECODER,
        queries_keys=(),
        fused="qkv_proj",
        stream=Stream({"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}),
    ),
    "olmo2": replace(DECODER, stream=Stream({}, behind=("post_attention_layernorm", "post_feedforward_layernorm"))),
    "gpt2": Architecture(
        "transformer.",
        "h.{}.",
        ("wte.", "wpe."),
        "ln_f.",
        norm="layer",
        keys=Keys("n_layer", "n_embd", "n_head", "n_head", "n_inner", "n_positions"),
        index_bound=("scale_attn_by_inverse_layer_idx",),
        ignored=r"\.attn\.(bias|masked_bias)$",
        defaults={"activation_function": "gelu_new", "scale_attn_weights": True, "layer_norm_epsilon": 1e-5},
        learned_positions=True,
        tied=True,
        queries_keys=(),
        fused="c_attn",
        stream=Stream({"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}, ("attn.c_proj", "mlp.c_proj"), transposed=True),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.",
        "layers.{}.",
        ("embed_in.",),
        "final_layer_norm.",
        head="embed_out.",
        norm="layer",
        ignored=rf"attention\.(bias|masked_bias)$|{_INV_FREQ}",
        defaults={"hidden_act": "gelu", "use_parallel_residual": True, "rotary_pct": 0.25, "layer_norm_eps": 1e-5},
        queries_keys=(),
        fused="query_key_value",
        fused_by_head=True,
        stream=Stream(
            {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
            ("attention.dense", "mlp.dense_4h_to_h"),
        ),
    ),
}

_FREE = {
    "_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "initializer_range", "tie_word_embeddings", "attention_dropout", "attn_pdrop", "embd_pdrop",
    "resid_pdrop", "hidden_dropout", "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params", "pretraining_tp", "vocab_size", "max_window_layers",
    "max_position_embeddings", "n_positions", "n_ctx", "num_hidden_layers", "n_layer", "rope_theta", "rope_scaling",
    "rope_parameters", "head_dim", "sliding_window", "use_sliding_window", "rotary_pct", "rotary_emb_base", "partial_rotary_factor",
    "_attn_implementation_autoset", "id2label", "label2id", "problem_type",
}  # fmt: skip
"""Config fields in which donors may differ, because no block computes differently for them or they are compared apart."""

_EPSILONS = {"rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"}


def architecture_of(config: Config, place: str) -> Architecture:
    """The family of a config.json. Raises FrankenmergeError for a family that is not known."""
    family = config.get("model_type")
    if isinstance(family, str) and family in FAMILIES:
        return FAMILIES[family]
    raise fail(place, f"model_type, one of: {', '.join(sorted(FAMILIES))}", repr(family), "use donors of a supported family")


def quantity(config: Config, name: str) -> int | None:
    """A size by its common name (`blocks`, `width`, `heads`, `kv_heads`, `inner`, `positions`, `vocabulary`)."""
    keys = FAMILIES[config["model_type"]].keys
    value = config.get(getattr(keys, name))
    if value is None and name == "kv_heads":
        return config.get(keys.heads)
    if value is None and name == "inner" and config["model_type"] == "gpt2":
        return 4 * config["n_embd"]
    return value


def is_tied(config: Config) -> bool:
    """Whether the head is the embedding matrix."""
    return config.get("tie_word_embeddings", FAMILIES[config["model_type"]].tied)


def rope(config: Config) -> dict[str, Any]:
    """Rotary position settings in one form, whichever way config.json writes them."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type") or "default"
    settings["rope_theta"] = float(settings.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0)
    shares = (settings.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), config.get("rotary_pct"),
              FAMILIES[config["model_type"]].defaults.get("rotary_pct"))  # fmt: skip
    if (share := next((share for share in shares if share is not None), 1.0)) != 1.0:
        settings["partial_rotary_factor"] = share
    return settings


def window(config: Config) -> int | None:
    """How far back a block's attention reaches where it is limited, None where no block's is."""
    defaults = FAMILIES[config["model_type"]].defaults
    if isinstance(kinds := config.get("layer_types"), list):
        limited = "sliding_attention" in kinds
    else:
        limited = config.get("use_sliding_window", defaults.get("use_sliding_window", True))
    return config.get("sliding_window", defaults.get("sliding_window")) if limited else None


_USUAL_ENTRY = {"layer_types": "full_attention", "no_rope_layers": 1}
"""What every block is where a config has no list of them."""


def entries(config: Config, key: str) -> list:
    """A list with one entry a block, also where config.json leaves it out."""
    return config[key] if isinstance(config.get(key), list) else [_USUAL_ENTRY[key]] * (quantity(config, "blocks") or 0)


def head_width(config: Config) -> int | None:
    """Width of one attention head."""
    width, heads = quantity(config, "width"), quantity(config, "heads")
    return config.get("head_dim") or (width // heads if width and heads else None)


def differences(first: Config, other: Config) -> tuple[list[str], list[str]]:
    """Compare two configs: (reasons why one config cannot describe blocks of both, remarks that do no harm)."""
    if first["model_type"] != other["model_type"]:
        return [f"family: {first['model_type']} and {other['model_type']} compute differently"], []
    architecture = FAMILIES[first["model_type"]]
    both: dict[str, tuple[Any, ...]] = {"head_dim": (head_width(first), head_width(other))}
    for key in sorted((set(first) | set(other) | set(architecture.defaults)) - _FREE - set(architecture.per_block)):
        fallback = architecture.defaults.get(key)
        both[key] = (first.get(key, fallback), other.get(key, fallback))
    both["rope_parameters"] = (rope(first), rope(other))
    both["sliding_window"] = (window(first), window(other))
    for key in architecture.per_block:
        listed = [isinstance(config.get(key), list) for config in (first, other)]
        if listed[0] != listed[1] and set(entries(first, key)) | set(entries(other, key)) != {_USUAL_ENTRY[key]}:
            both[key] = tuple("one entry a block" if has else "absent" for has in listed)
    unequal = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
    told = {key: f"{key}: {a} and {b}" for key, (a, b) in unequal.items()}
    # A field on one side only, and without a default here, is one that the other side's version of the library did not write.
    one_sided = {key for key in unequal if key not in architecture.defaults and None in unequal[key]} - {"sliding_window"}
    harmless = (_EPSILONS | one_sided) & set(told)
    return [told[key] for key in told if key not in harmless], [told[key] for key in told if key in harmless]


def spliced_config(base: Config, blocks: Sequence[tuple[Config, int]], tied: bool) -> dict[str, Any]:
    """The config of a model made of `blocks`, each (config of its donor, its index there), otherwise as `base`.

    Block counts and lists with one entry a block follow the blocks.
    """
    architecture = FAMILIES[base["model_type"]]
    config = deepcopy(dict(base))
    config[architecture.keys.blocks] = len(blocks)
    for key in architecture.per_block:
        if isinstance(base.get(key), list):
            config[key] = [entries(donor, key)[index] for donor, index in blocks]
    config["tie_word_embeddings"] = tied
    return config


def config_faults(config: Config, place: str) -> list[Fault]:
    """What makes a donor's blocks impossible to move, told as faults."""
    architecture = architecture_of(config, place)
    faults = []
    for key in architecture.index_bound:
        if config.get(key):
            faults.append(
                Fault(f"{place}: {key}", "not set", repr(config[key]), "a block of this model depends on its position; use another donor")
            )
    for key in architecture.per_block:
        listed, blocks = config.get(key), quantity(config, "blocks")
        if isinstance(listed, list) and len(listed) != blocks:
            faults.append(
                Fault(f"{place}: {key}", f"one entry for each of {blocks} blocks", f"{len(listed)} entries", "mend the donor's config.json")
            )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            faults.append(Fault(f"{place}: {key}", "an object", repr(config[key]), "mend the donor's config.json"))
    for key in ("rope_theta", "rotary_emb_base"):
        if not isinstance(config.get(key), int | float | None):
            faults.append(Fault(f"{place}: {key}", "a number", repr(config[key]), "mend the donor's config.json"))
    if config.get("use_sliding_window") and "layer_types" not in config:
        faults.append(
            Fault(f"{place}: use_sliding_window", "layer_types beside it, so that the window can move with its block", "no layer_types",
                  "load and save the donor once with a current transformers, which writes layer_types")
        )  # fmt: skip
    return faults
