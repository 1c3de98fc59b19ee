"""A mixture's config says of attention, norms and positions what its base's says."""

import pytest
from transformers import AutoConfig

from frankenmerge.donors.mixtures import KINDS, kind_for, mixture_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
SAME = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "rms_norm_eps", "vocab_size", "max_position_embeddings", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
BASES = {
    "llama of defaults": {"model_type": "llama"},
    "old llama": {"model_type": "llama", "rope_theta": 5e5, "num_key_value_heads": 2},
    "llama 3": {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": 32,
    },
    "new llama": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "mistral of defaults": {"model_type": "mistral"},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "qwen2 of defaults": {"model_type": "qwen2"},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3 of defaults": {"model_type": "qwen3"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "attention_bias": True},
}


def configs(base: dict, *, shared: bool):
    """What transformers reads from a base's config.json, and from its mixture's."""
    groups = {} if base["model_type"] == "llama" else {"num_key_value_heads": 2}
    base = SMALL | groups | base
    kind = kind_for(base["model_type"], shared=shared, prompted=True)
    assert kind
    made = mixture_config(kind, base, experts=3, inner=96, per_token=2, shared=shared)
    assert made["model_type"] == kind.model_type
    return AutoConfig.for_model(**base), AutoConfig.for_model(**made)


def head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_a_mixture_has_its_bases_settings(name, shared):
    dense, made = configs(BASES[name], shared=shared)
    for key in SAME:
        assert getattr(made, key) == getattr(dense, key), key
    assert head_width(made) == head_width(dense)


@pytest.mark.parametrize("name", ["mistral of defaults", "mistral"])
def test_a_window_stays(name):
    dense, made = configs(BASES[name], shared=False)
    assert made.sliding_window == dense.sliding_window
    dense, made = configs(BASES[name], shared=True)
    kinds = {"sliding_attention"} if dense.sliding_window else {"full_attention"}
    assert set(made.layer_types) == kinds
    assert (made.sliding_window or None) == dense.sliding_window


def test_windows_of_some_blocks_stay():
    base = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    dense, made = configs({"model_type": "qwen2"} | base, shared=True)
    assert made.layer_types == dense.layer_types and len(set(made.layer_types)) == 2
    assert made.sliding_window == dense.sliding_window == 8


@pytest.mark.parametrize(("name", "biases"), [("qwen2", True), ("new llama", False)])
def test_qwen2_moe_has_the_biases_of_its_base(name, biases):
    assert configs(BASES[name], shared=True)[1].qkv_bias is biases


def test_deepseek_has_the_older_form_of_positions():
    made = mixture_config(
        KINDS["deepseek"],
        SMALL | BASES["new llama"],
        experts=2,
        inner=96,
        per_token=1,
        shared=False,
    )
    assert made["rope_theta"] == 1e5 and "rope_parameters" not in made
    assert "rope_scaling" not in made and made["n_shared_experts"] is None


@pytest.mark.parametrize(
    ("kind", "base", "found"),
    [
        ("deepseek", "llama 3", "llama3"),
        ("deepseek", "mistral of defaults", "a window of 4096 tokens"),
        ("qwen3_moe", "windowed", "a window of 8 tokens"),
    ],
)
def test_what_a_kind_cannot_have_is_named(kind, base, found):
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    settings = BASES | {"windowed": {"model_type": "qwen3"} | windowed}
    assert found in [each for _, each in KINDS[kind].obstacles(SMALL | settings[base])]
