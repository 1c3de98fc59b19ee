"""Configs of published checkpoints, saved again by transformers."""

import pytest
from configs import GPT2, LLAMA, reasons

from frankenmerge.donors.families import FAMILIES

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


def test_rotary_settings_of_an_old_gpt_neox_are_compared():
    config = {
        key: value for key, value in PUBLISHED["gpt_neox"].items() if not key.startswith("rotary")
    }
    assert reasons(config, config | {"rotary_emb_base": 10000, "rotary_pct": 0.25}) == []
    assert reasons(config, config | {"rotary_emb_base": 500000})
    assert reasons(config, config | {"rotary_pct": 1.0})
