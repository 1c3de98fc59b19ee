"""Small configs of several families, and their differences."""

from frankenmerge.donors.config import (
    differences,
)

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


S, F = "sliding_attention", "full_attention"
QWEN_OLD = QWEN | {"max_window_layers": 2}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 8}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "no_rope_layer_interval": 2}
MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4}
