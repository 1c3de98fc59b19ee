"""Configs: sizes under common names, and what makes two configs differ."""

import pytest
from configs import GEMMA3, GPT2, LLAMA, MOE, QWEN, F, S, reasons, remarks

from frankenmerge.donors.config import (
    FREE,
    differences,
    head_width,
    is_tied,
    quantity,
    rope,
    spliced_config,
)

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
        assert reason.startswith(f"{next(iter(change))}: ")


@pytest.mark.parametrize(
    "one, other",
    [
        ({"unsloth_version": "2024.9"}, {"unsloth_version": "2025.1"}),
        ({"auto_map": {"AutoConfig": "x.Y"}}, {"auto_map": {"AutoConfig": "org/x--x.Y"}}),
        ({"max_length": 20}, {"max_length": 4096}),
        ({"novelty": 3}, {"novelty": 4}),
    ],
)
def test_a_field_that_changes_no_computation_is_a_remark(one, other):
    for family in ("llama", "gemma2"):
        config = LLAMA | {"model_type": family}
        assert reasons(config | one, config | other) == []
        (remark,) = remarks(config | one, config | other)
        assert remark.startswith(f"{next(iter(one))}: ")


@pytest.mark.parametrize("key", sorted({"unsloth_version", "max_length", "temperature"}))
def test_bookkeeping_of_an_inferred_family_is_a_remark(key):
    novel = LLAMA | {"model_type": "novel"}
    assert differences(novel | {key: 1}, novel | {key: 2}) == ([], [f"{key}: 1 and 2"])


def test_the_table_has_every_field_that_transformers_reads():
    """Other fields are bookkeeping in these families, so a missing one would be overlooked."""
    from dataclasses import asdict

    from transformers import CONFIG_MAPPING, PretrainedConfig

    from frankenmerge.donors.families import FAMILIES

    common = set(PretrainedConfig().to_dict()) | FREE | {"is_decoder"}
    for name, family in FAMILIES.items():
        if name not in CONFIG_MAPPING:
            continue
        known = {*family.defaults, *asdict(family.keys).values(), *family.index_bound}
        known |= {key for part in family.per_block for key in (part.key, *part.numbers)}
        fields = {family.synonyms.get(key, key) for key in CONFIG_MAPPING[name]().to_dict()}
        assert fields - known - common - set(family.rope_kinds.values()) == set(), name


@pytest.mark.parametrize(
    "family, one, other",
    [
        ("gemma2", {"hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", {}, {"attention_bias": False}),
        ("starcoder2", {"use_bias": True}, {}),
        ("olmo3", {"rms_norm_eps": 1e-5}, {}),
    ],
)
def test_fields_that_transformers_completes_to_the_same_are_remarks(family, one, other):
    from transformers import CONFIG_MAPPING

    config = LLAMA | {"model_type": family, "rms_norm_eps": None, "hidden_act": None}
    config = {key: value for key, value in config.items() if value is not None}
    assert reasons(config | one, config | other) == []
    oracles = [CONFIG_MAPPING[family](**(config | each)) for each in (one, other)]
    for key in ("hidden_act", "hidden_activation", "attention_bias", "use_bias"):
        if key in oracles[0].to_dict() and (family, key) != ("gemma2", "hidden_act"):
            assert getattr(oracles[0], key) == getattr(oracles[1], key)


def test_a_field_of_an_inferred_family_that_is_not_its_default_is_a_reason():
    config = LLAMA | {"model_type": "starcoder2"}
    assert reasons(config, config | {"use_bias": False}) == ["use_bias: True and False"]
    assert reasons(config, config | {"norm_epsilon": 1e-3})


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
PHI3 = LLAMA | {"model_type": "phi3", "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
PHI3 |= {"original_max_position_embeddings": 64, "pad_token_id": 0}
ORIGINAL = {"original_max_position_embeddings": 64}
LONG_ROPES = {
    "longrope": PHI3 | {"rope_scaling": {"type": "longrope", **FACTORS}},
    "su": PHI3 | {"rope_theta": 1e4, "rope_scaling": {"type": "su", **FACTORS, **ORIGINAL}},
    "both": PHI3 | {"rope_scaling": {"type": "su", "rope_type": "longrope", **FACTORS}},
    "transformers 5": PHI3
    | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            **ORIGINAL,
            **FACTORS,
        }
    },
}


def long_frequencies(config: dict) -> tuple:
    """The frequencies and the scale of long rope, as transformers reads a config."""
    from copy import deepcopy

    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = CONFIG_MAPPING["phi3"](**deepcopy(config))
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](own, "cpu", 256)
    return frequencies.tolist(), scale


@pytest.mark.parametrize("spelling", LONG_ROPES)
def test_long_rope_of_phi3_is_the_same_in_every_spelling(spelling):
    config, first = LONG_ROPES[spelling], LONG_ROPES["longrope"]
    assert long_frequencies(config) == long_frequencies(first)
    assert rope(config) == rope(first) and reasons(config, first) == []


def test_su_as_it_was_published_is_long_rope():
    """Transformers 5 no longer reads it without the number of positions, transformers 4 did."""
    config = PHI3 | {"rope_theta": 1e4, "rope_scaling": {"type": "su", **FACTORS}}
    assert reasons(config, LONG_ROPES["longrope"]) == []
    spliced = spliced_config(config, [(config, 0), (config, 1)], tied=False)
    assert long_frequencies(spliced) == long_frequencies(LONG_ROPES["longrope"])


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 512},
        {"original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [3.0] * 8}},
    ],
)
def test_another_long_rope_is_a_reason(change):
    first = LONG_ROPES["longrope"]
    assert long_frequencies(first | change) != long_frequencies(first)
    found = reasons(first, first | change)
    assert any(reason.startswith("rope_parameters: ") for reason in found)


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
