"""Small multimodal donors: a wrapper of every kind around a tiny language model."""

import json
from pathlib import Path

import pytest
import torch
from families import SIZES, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

TEXTS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "internvl": "qwen2",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "mllama": "mllama_text_model",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
}
"""Wrappers, and the family of the language model in each."""
QUICK = ("gemma3", "llava", "mllama", "qwen3_vl")
"""Those that every run of the tests has; the others are slow."""
VISION = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "projection_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "num_position_embeddings"), 16),
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), [1]),
    "num_global_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "gemma4": {"hidden_size_per_layer_input": 0},
    "mllama": {"cross_attention_layers": [3]},
    "qwen2_5_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1e4,
        }
    },
}


def config_of(wrapper):
    kind = CONFIG_MAPPING[wrapper]
    known = kind().to_dict()
    tower = known.get("vision_config") or {}
    vision = {key: value for key, value in VISION.items() if key in tower}
    if wrapper == "mllama":
        vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    if "model_type" in tower:
        vision["model_type"] = tower["model_type"]
    marks = {
        key: 100 for key in known if key.endswith(("token_id", "token_index")) and key not in SIZES
    }
    text = tiny_config(TEXTS[wrapper]).to_dict() | TEXT.get(wrapper, {})
    return kind(text_config=text, vision_config=vision, **marks)


def write_wrapped(folder: Path, config, seed: int) -> PreTrainedModel:
    """Save a wrapper with random weights, a tokenizer and a processor; returns it as loaded."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return type(model).from_pretrained(folder).eval()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 128 words."""
    tokens = {f"t{index}": index for index in range(128)}
    content = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
    tokenizer = {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": content}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def wrappers(names):
    """Parameters of a fixture: all these wrappers, those marked as slow that are."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
