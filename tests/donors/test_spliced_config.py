"""Configs spliced with their blocks, and configs whose blocks cannot be moved."""

import pytest
from configs import GEMMA3, GPT2, LLAMA, MOE, QWEN, QWEN_OLD, SMOLLM3, F, S

from frankenmerge.donors.config import (
    config_faults,
    spliced_config,
)


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
def test_what_config_says_of_blocks_moves_with_them(base, order, changes):
    expected = {key: value for key, value in (base | changes).items() if value is not None}
    config = spliced_config(base, [(base, index) for index in order], tied=False)
    assert config == expected | {"num_hidden_layers": len(order), "tie_word_embeddings": False}


def test_blocks_of_donors_with_and_without_lists_are_listed_together():
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
def test_a_config_whose_blocks_cannot_be_moved_is_reported(base, changes, place):
    assert config_faults(base, "config.json") == []
    (fault,) = config_faults(base | changes, "config.json")
    assert fault.place == f"config.json: {place}"


@pytest.mark.parametrize(
    "changes", [{"num_kv_shared_layers": 0}, {"per_layer_config": None}, {"layer_types": None}]
)
def test_a_field_that_binds_no_block_is_no_fault(changes):
    assert config_faults(LLAMA | changes, "config.json") == []
