"""What a family is: roles of tensor names, configs compared and spliced."""

import pytest

from frankenmerge.donors.config import (
    config_faults,
    differences,
    head_width,
    is_tied,
    quantity,
    rope,
    spliced_config,
)
from frankenmerge.donors.families import FAMILIES
from frankenmerge.donors.inferred import architecture_of
from frankenmerge.errors import FrankenmergeError

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
QWEN = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 100,
}


def reasons(first: dict, other: dict) -> list[str]:
    forward, backward = differences(first, other)[0], differences(other, first)[0]
    assert len(forward) == len(backward)
    return forward


def remarks(first: dict, other: dict) -> list[str]:
    return differences(first, other)[1]


# Roles


@pytest.mark.parametrize(
    "family, name, role, index, canonical",
    [
        (
            "llama",
            "model.layers.0.self_attn.q_proj.weight",
            "block",
            0,
            "model.layers.{}.self_attn.q_proj.weight",
        ),
        (
            "llama",
            "model.layers.31.input_layernorm.weight",
            "block",
            31,
            "model.layers.{}.input_layernorm.weight",
        ),
        ("llama", "layers.7.mlp.up_proj.weight", "block", 7, "model.layers.{}.mlp.up_proj.weight"),
        ("llama", "model.embed_tokens.weight", "embedding", None, "model.embed_tokens.weight"),
        ("llama", "model.norm.weight", "final", None, "model.norm.weight"),
        ("llama", "lm_head.weight", "head", None, "lm_head.weight"),
        (
            "llama",
            "model.layers.3.self_attn.rotary_emb.inv_freq",
            "ignored",
            None,
            "model.layers.3.self_attn.rotary_emb.inv_freq",
        ),
        ("llama", "model.rotary_emb.inv_freq", "ignored", None, "model.rotary_emb.inv_freq"),
        (
            "gpt2",
            "transformer.h.11.attn.c_attn.weight",
            "block",
            11,
            "transformer.h.{}.attn.c_attn.weight",
        ),
        ("gpt2", "h.11.attn.c_attn.weight", "block", 11, "transformer.h.{}.attn.c_attn.weight"),
        ("gpt2", "h.11.attn.c_attn.bias", "block", 11, "transformer.h.{}.attn.c_attn.bias"),
        ("gpt2", "transformer.wte.weight", "embedding", None, "transformer.wte.weight"),
        ("gpt2", "wpe.weight", "embedding", None, "transformer.wpe.weight"),
        ("gpt2", "transformer.ln_f.bias", "final", None, "transformer.ln_f.bias"),
        ("gpt2", "ln_f.bias", "final", None, "transformer.ln_f.bias"),
        ("gpt2", "lm_head.weight", "head", None, "lm_head.weight"),
        ("gpt2", "h.0.attn.bias", "ignored", None, "h.0.attn.bias"),
        (
            "gpt2",
            "transformer.h.0.attn.masked_bias",
            "ignored",
            None,
            "transformer.h.0.attn.masked_bias",
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.dense.bias",
            "block",
            5,
            "gpt_neox.layers.{}.attention.dense.bias",
        ),
        ("gpt_neox", "gpt_neox.embed_in.weight", "embedding", None, "gpt_neox.embed_in.weight"),
        (
            "gpt_neox",
            "gpt_neox.final_layer_norm.bias",
            "final",
            None,
            "gpt_neox.final_layer_norm.bias",
        ),
        ("gpt_neox", "embed_out.weight", "head", None, "embed_out.weight"),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.bias",
            "ignored",
            None,
            "gpt_neox.layers.5.attention.bias",
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.masked_bias",
            "ignored",
            None,
            "gpt_neox.layers.5.attention.masked_bias",
        ),
    ],
)
def test_a_name_has_its_role(family, name, role, index, canonical):
    assert FAMILIES[family].role(name) == (role, index, canonical)


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "vision.weight"),
        ("llama", "model.layers.x.weight"),
        ("llama", "score.weight"),
        ("gpt2", "model.layers.0.x"),
    ],
)
def test_a_name_of_no_role_is_refused(family, name):
    with pytest.raises(FrankenmergeError, match=name):
        FAMILIES[family].role(name)


@pytest.mark.parametrize("family", ["mamba", None, 3, ["llama"], {}])
def test_an_unknown_family_is_refused_and_the_known_ones_are_named(family):
    with pytest.raises(FrankenmergeError, match="gpt2, gpt_neox, llama"):
        architecture_of({"model_type": family}, {}, "config.json")


# Sizes


def test_sizes_have_common_names():
    names = ("blocks", "width", "heads", "kv_heads", "inner", "positions", "vocabulary")
    assert [quantity(LLAMA, name) for name in names] == [4, 64, 4, 2, 96, 128, 100]
    assert [quantity(GPT2, name) for name in names] == [4, 64, 4, 4, 256, 128, 100]
    assert quantity(GPT2 | {"n_inner": 100}, "inner") == 100


def test_heads_without_groups_have_keys_of_their_own():
    assert (
        quantity(
            {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}, "kv_heads"
        )
        == 4
    )


def test_a_head_is_its_share_of_the_width_when_not_said():
    assert (head_width(LLAMA), head_width(LLAMA | {"head_dim": 32}), head_width(GPT2)) == (
        16,
        32,
        16,
    )


@pytest.mark.parametrize("config, tied", [(LLAMA, False), (GPT2, True)])
def test_a_family_says_whether_its_head_is_tied_when_the_config_does_not(config, tied):
    assert is_tied(config) is tied
    assert is_tied(config | {"tie_word_embeddings": not tied}) is not tied


# Comparison


def test_a_config_does_not_differ_from_itself():
    for config in (LLAMA, QWEN, GPT2):
        assert differences(config, dict(config)) == ([], [])


def test_rope_settings_of_old_and_new_style_are_equal():
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}}
    assert rope(old) == rope(new) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert differences(old, new) == ([], [])


def test_rope_settings_that_are_not_said_are_the_defaults():
    assert differences(LLAMA, LLAMA | {"rope_theta": 10000.0, "rope_scaling": None}) == ([], [])
    assert differences(
        LLAMA, LLAMA | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    ) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_other_rope_settings_are_a_reason(change):
    (reason,) = reasons(LLAMA, LLAMA | change)
    assert reason.startswith("rope_parameters: ")


@pytest.mark.parametrize(
    "key, change",
    [
        ("hidden_size", 32),
        ("intermediate_size", 64),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
    ],
)
def test_what_blocks_compute_with_is_a_reason(key, change):
    assert any(reason.startswith(f"{key}: ") for reason in reasons(LLAMA, LLAMA | {key: change}))


def test_another_family_is_the_only_reason():
    assert reasons(LLAMA, GPT2) == ["family: llama and gpt2 compute differently"]


def test_another_window_is_a_reason_where_a_block_has_one():
    limited = QWEN | {"max_window_layers": 3}
    assert reasons(limited, limited | {"sliding_window": 16}) == ["sliding_window: 8 and 16"]
    assert reasons(limited, QWEN) == ["sliding_window: 8 and None"]
    assert reasons(QWEN, QWEN | {"sliding_window": 16}) == []


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_and_none_are_a_reason(family):
    config = LLAMA | {"model_type": family}
    assert reasons(config | {"sliding_window": 4096}, config | {"sliding_window": None})


def test_a_window_other_than_the_familys_default_is_a_reason_where_the_default_is_left_out():
    config = LLAMA | {"model_type": "mistral"}
    assert reasons(config, config | {"sliding_window": 4096}) == []
    assert reasons(config, config | {"sliding_window": 8})


def test_rotary_settings_of_an_old_gpt_neox_are_compared():
    config = {
        key: value for key, value in PUBLISHED["gpt_neox"].items() if not key.startswith("rotary")
    }
    assert reasons(config, config | {"rotary_emb_base": 10000, "rotary_pct": 0.25}) == []
    assert reasons(config, config | {"rotary_emb_base": 500000})
    assert reasons(config, config | {"rotary_pct": 1.0})


def test_another_norm_epsilon_is_a_remark():
    assert differences(LLAMA, LLAMA | {"rms_norm_eps": 1e-5}) == (
        [],
        ["rms_norm_eps: 1e-06 and 1e-05"],
    )
    assert differences(GPT2, GPT2 | {"layer_norm_epsilon": 1e-6}) == (
        [],
        ["layer_norm_epsilon: 1e-05 and 1e-06"],
    )


@pytest.mark.parametrize(
    "config, defaults",
    [
        (LLAMA, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}),
        (
            GPT2,
            {
                "activation_function": "gelu_new",
                "scale_attn_weights": True,
                "layer_norm_epsilon": 1e-5,
            },
        ),
        (
            LLAMA | {"model_type": "gpt_neox", "hidden_act": "gelu"},
            {"use_parallel_residual": True, "rotary_pct": 0.25, "layer_norm_eps": 1e-5},
        ),
    ],
)
def test_a_default_left_out_equals_the_default_written(config, defaults):
    assert differences(config, config | defaults) == ([], [])


@pytest.mark.parametrize(
    "key",
    [
        "torch_dtype",
        "vocab_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "transformers_version",
        "bos_token_id",
        "use_cache",
    ],
)
def test_what_blocks_do_not_compute_with_is_nothing(key):
    assert differences(LLAMA, LLAMA | {key: 7}) == ([], [])


def test_a_field_of_one_version_of_the_library_is_a_remark():
    assert differences(LLAMA, LLAMA | {"novelty": 3}) == ([], ["novelty: None and 3"])


def test_of_a_family_that_is_not_in_the_table_no_default_is_known():
    novel = LLAMA | {"model_type": "novel"}
    assert differences(novel, dict(novel)) == ([], [])
    for change in (
        {"novelty": 3},
        {"rope_theta": 10000.0},
        {"layer_types": ["full_attention"] * 4},
        {"head_dim": 32},
    ):
        (reason,) = reasons(novel, novel | change)
        assert reason.startswith(
            "rope_parameters: " if "rope_theta" in change else f"{next(iter(change))}: "
        )


PUBLISHED = {
    "llama": LLAMA | {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "mistral": LLAMA | {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
    "qwen2": LLAMA
    | {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "use_sliding_window": False,
    },
    "qwen3": LLAMA
    | {
        "model_type": "qwen3",
        "rope_theta": 1000000,
        "head_dim": 16,
        "sliding_window": None,
        "max_window_layers": 28,
    }
    | {"use_sliding_window": False},
    "phi3": LLAMA
    | {
        "model_type": "phi3",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "original_max_position_embeddings": 128,
        "sliding_window": 64,
    },
    "olmo2": LLAMA
    | {"model_type": "olmo2", "rope_theta": 500000, "rope_scaling": None, "attention_bias": False},
    "gpt_neox": {
        key: value
        for key, value in LLAMA.items()
        if key not in ("rms_norm_eps", "num_key_value_heads")
    }
    | {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "gpt2": GPT2 | {"n_ctx": 128, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "mixtral": LLAMA
    | {
        "model_type": "mixtral",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 4,
    }
    | {"num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.02},
    "qwen3_moe": LLAMA
    | {
        "model_type": "qwen3_moe",
        "rope_theta": 1000000.0,
        "head_dim": 32,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    | {
        "max_window_layers": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    | {
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "rope_scaling": None,
        "attention_bias": False,
    },
    "gemma2": {key: value for key, value in LLAMA.items() if key != "hidden_act"}
    | {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32,
    }
    | {
        "query_pre_attn_scalar": 224,
        "sliding_window": 64,
        "sliding_window_size": 64,
        "attn_logit_softcapping": 50.0,
    }
    | {"final_logit_softcapping": 30.0, "rope_theta": 10000.0, "cache_implementation": "hybrid"},
    "gemma3_text": {key: value for key, value in LLAMA.items() if key != "hidden_act"}
    | {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32,
        "query_pre_attn_scalar": 256,
    }
    | {
        "sliding_window": 64,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    }
    | {
        "rope_scaling": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
    "smollm3": LLAMA
    | {
        "model_type": "smollm3",
        "rope_theta": 5000000.0,
        "rope_scaling": None,
        "no_rope_layer_interval": 4,
        "sliding_window": None,
    }
    | {
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "cohere2": {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
    | {
        "model_type": "cohere2",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "head_dim": 16,
    }
    | {
        "sliding_window": 64,
        "sliding_window_pattern": 4,
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
    },
    "stablelm": {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
    | {
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
    },
}
"""Configs in the fields that published checkpoints of each family have."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_config_saved_anew_by_the_library_can_be_spliced_with_itself(family):
    from transformers import AutoConfig

    old = PUBLISHED[family] | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    new = AutoConfig.for_model(**old).to_dict()
    assert reasons(old, new) == []


# Spliced configs


def test_layer_types_move_with_their_blocks():
    first = QWEN | {"layer_types": ["f0", "f1", "f2", "f3"]}
    other = QWEN | {"layer_types": ["o0", "o1", "o2", "o3", "o4"], "num_hidden_layers": 5}
    blocks = [(first, 0), (first, 2), (other, 4), (other, 0), (first, 2)]
    config = spliced_config(first, blocks, tied=True)
    assert config == first | {
        "layer_types": ["f0", "f2", "o4", "o0", "f2"],
        "num_hidden_layers": 5,
        "tie_word_embeddings": True,
    }


def test_splicing_configs_leaves_the_donors_configs_alone():
    first = QWEN | {"layer_types": ["f0", "f1", "f2", "f3"], "rope_parameters": {"rope_theta": 1.0}}
    config = spliced_config(first, [(first, 3)], tied=False)
    config["rope_parameters"]["rope_theta"] = 2.0
    assert (first["layer_types"], first["rope_parameters"], first["num_hidden_layers"]) == (
        ["f0", "f1", "f2", "f3"],
        {"rope_theta": 1.0},
        4,
    )


def test_blocks_are_counted_in_the_familys_own_field():
    assert spliced_config(GPT2, [(GPT2, 0)] * 7, tied=True) == GPT2 | {
        "n_layer": 7,
        "tie_word_embeddings": True,
    }


S, F = "sliding_attention", "full_attention"
QWEN_OLD = QWEN | {"max_window_layers": 2}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 8}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "no_rope_layer_interval": 2}
MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4}


@pytest.mark.parametrize(
    "base, order, changes",
    [
        (
            QWEN_OLD,
            [0, 1, 2, 1, 2, 3],
            {"layer_types": [F, F, S, F, S, S], "max_window_layers": None},
        ),
        (QWEN_OLD, [0, 1, 0, 1, 2, 3], {"max_window_layers": 4}),
        (
            QWEN_OLD | {"layer_types": [F, F, S, S]},
            [0, 1, 0, 2],
            {"layer_types": [F, F, F, S], "max_window_layers": 3},
        ),
        (
            QWEN_OLD | {"layer_types": [F, F, S, S]},
            [3, 0],
            {"layer_types": [S, F], "max_window_layers": None},
        ),
        (QWEN | {"max_window_layers": 4}, [0, 1, 2, 3] * 2, {"max_window_layers": 8}),
        (QWEN_OLD | {"use_sliding_window": False}, [0, 1, 2, 3] * 2, {}),
        (LLAMA | {"model_type": "gemma2"}, [0, 1, 1, 2, 3], {"layer_types": [S, F, F, S, F]}),
        (LLAMA | {"model_type": "gemma2"}, [0, 1, 2, 1, 2, 3], {}),
        (GEMMA3, [0, 5, 5, 4], {"layer_types": [S, F, F, S]}),
        (GEMMA3, [0, 1, 2, 3, 4, 5, 0, 1], {}),
        (
            GEMMA3 | {"sliding_window_pattern": 3},
            [0, 1, 2, 4, 5],
            {"layer_types": [S, S, F, S, F], "sliding_window_pattern": None},
        ),
        (GEMMA3 | {"sliding_window_pattern": 3}, [0, 2, 3, 5], {"sliding_window_pattern": 2}),
        (
            GEMMA3 | {"_sliding_window_pattern": 6, "layer_types": [S] * 5 + [F]},
            [0, 5, 1, 5],
            {"_sliding_window_pattern": 2, "layer_types": [S, F, S, F]},
        ),
        (
            LLAMA | {"model_type": "cohere2", "sliding_window_pattern": 4, "layer_switch": 4},
            [0, 3, 3],
            {"layer_types": [S, F, F], "sliding_window_pattern": None, "layer_switch": None},
        ),
        (SMOLLM3, [0, 1, 1, 2], {"no_rope_layers": [1, 0, 0, 1], "no_rope_layer_interval": None}),
        (
            SMOLLM3
            | {"no_rope_layers": [1, 1, 0, 0], "use_sliding_window": True, "sliding_window": 8},
            [3, 0, 2],
            {"no_rope_layers": [0, 1, 0], "no_rope_layer_interval": None},
        ),
        (
            SMOLLM3
            | {"layer_types": [S, F, F, S], "use_sliding_window": True, "sliding_window": 8},
            [3, 0, 1],
            {"no_rope_layers": [0, 1, 0], "layer_types": [S, S, F], "no_rope_layer_interval": None},
        ),
        (
            MOE | {"decoder_sparse_step": 2},
            [0, 1, 1, 2],
            {"mlp_only_layers": [0, 3], "decoder_sparse_step": 1},
        ),
        (MOE | {"decoder_sparse_step": 2}, [2, 3, 0, 1], {}),
        (MOE | {"mlp_only_layers": [1]}, [0, 1, 1, 3], {"mlp_only_layers": [1, 2]}),
        (MOE | {"mlp_only_layers": [], "decoder_sparse_step": 1}, [3, 3], {}),
        (MOE | {"num_experts": 0, "mlp_only_layers": []}, [3, 3], {"mlp_only_layers": [0, 1]}),
    ],
)
def test_what_config_tells_of_blocks_moves_with_them(base, order, changes):
    expected = {key: value for key, value in (base | changes).items() if value is not None}
    config = spliced_config(base, [(base, index) for index in order], tied=False)
    assert config == expected | {"num_hidden_layers": len(order), "tie_word_embeddings": False}


def test_blocks_of_donors_that_tell_and_that_do_not_are_told_together():
    old = GEMMA3 | {"sliding_window_pattern": 2}
    new = GEMMA3 | {"layer_types": [F, F, S, S, F, F]}
    order = [(old, 0), (new, 0), (new, 2), (old, 5), (old, 1)]
    assert spliced_config(old, order, tied=True)["layer_types"] == [S, F, S, F, F]
    assert spliced_config(new, order, tied=True)["layer_types"] == [S, F, S, F, F]


def test_code_of_a_donor_is_not_named_in_the_result():
    assert "auto_map" not in spliced_config(
        LLAMA | {"auto_map": {"AutoConfig": "x.Y"}}, [(LLAMA, 0)], tied=False
    )


# Blocks that cannot be moved


@pytest.mark.parametrize(
    "base, changes, place",
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (LLAMA, {"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        (LLAMA, {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        (LLAMA, {"layer_types": [F] * 3}, "layer_types"),
        (LLAMA, {"layer_types": "full_attention"}, "layer_types"),
        (SMOLLM3, {"no_rope_layers": [1]}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        (QWEN, {"max_window_layers": -1}, "max_window_layers"),
        (QWEN, {"max_window_layers": None}, "max_window_layers"),
        (GEMMA3, {"sliding_window_pattern": "6"}, "sliding_window_pattern"),
        (MOE, {"mlp_only_layers": [4]}, "mlp_only_layers"),
        (MOE, {"mlp_only_layers": [True]}, "mlp_only_layers"),
        (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (GEMMA3, {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
        (GEMMA3, {"rope_local_base_freq": "10000"}, "rope_local_base_freq"),
    ],
)
def test_a_config_whose_blocks_cannot_be_moved_is_told(base, changes, place):
    assert config_faults(base, "config.json") == []
    (fault,) = config_faults(base | changes, "config.json")
    assert fault.place == f"config.json: {place}"


@pytest.mark.parametrize(
    "changes", [{"num_kv_shared_layers": 0}, {"per_layer_config": None}, {"layer_types": None}]
)
def test_a_field_that_binds_no_block_is_no_fault(changes):
    assert config_faults(LLAMA | changes, "config.json") == []


# Rotary positions of their own for each kind of attention


def test_rope_settings_for_kinds_of_attention_are_equal_in_both_styles():
    old = GEMMA3 | {
        "rope_theta": 5e5,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    }
    kinds = {
        F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        S: {"rope_type": "default", "rope_theta": 1e4},
    }
    assert rope(old) == rope(GEMMA3 | {"rope_parameters": kinds}) == kinds
    assert rope(GEMMA3) == {
        F: {"rope_type": "default", "rope_theta": 1e6},
        S: {"rope_type": "default", "rope_theta": 1e4},
    }
    assert reasons(old, GEMMA3 | {"rope_parameters": kinds}) == []
    (reason,) = reasons(old, old | {"rope_local_base_freq": 5e4})
    assert reason.startswith("rope_parameters: ")


@pytest.mark.parametrize(
    "family, key, value",
    [
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma3_text", "final_logit_softcapping", 30.0),
        ("cohere2", "logit_scale", 1.0),
        ("stablelm", "use_parallel_residual", True),
        ("qwen3_moe", "norm_topk_prob", True),
        ("mixtral", "num_experts_per_tok", 1),
        ("gemma2", "query_pre_attn_scalar", 64),
    ],
)
def test_an_option_other_than_the_familys_default_is_a_reason_where_the_default_is_left_out(
    family, key, value
):
    config = LLAMA | {"model_type": family}
    assert config.get(key) is None
    assert any(reason.startswith(f"{key}: ") for reason in reasons(config, config | {key: value}))


def test_experts_are_counted_under_both_names():
    assert (
        reasons(
            MOE,
            {key: value for key, value in MOE.items() if key != "num_experts"}
            | {"num_local_experts": 4},
        )
        == []
    )
    assert reasons(MOE, MOE | {"num_experts": 8}) == ["num_local_experts: 4 and 8"]
