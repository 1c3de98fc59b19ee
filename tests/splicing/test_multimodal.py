"""Multimodal donors: the language model's blocks move, towers and processors are the base's."""

import json

import pytest
import torch
from families import RECIPES, SIZES, recipe_for, spliced_logits, tiny_config
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import frankenmerge as fm
from frankenmerge.donors.checkpoint import open_checkpoint

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
IDS = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))


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


@pytest.fixture(scope="module", params=TEXTS)
def wrapped(request, tmp_path_factory):
    """Two donors of one wrapper, as they are in memory and on disk."""
    config = config_of(request.param)
    folder, models, folders = tmp_path_factory.mktemp(request.param), [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        path = folder / str(seed)
        model.save_pretrained(path)
        tokens = {f"t{index}": index for index in range(128)}
        content = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
        tokenizer = {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": content}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "preprocessor_config.json").write_text('{"size": 28}')
        models.append(type(model).from_pretrained(path).eval())
        folders.append(path)
    return models, folders


@pytest.mark.parametrize("name", [*RECIPES, "average"])
def test_the_result_loads_in_its_class_and_its_towers_are_the_base_s(wrapped, name, tmp_path):
    models, folders = wrapped
    output = tmp_path / "merged"
    fm.merge(recipe_for(name, folders), output)
    kind = type(models[0])
    merged, info = kind.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base, result = (load_file(each / "model.safetensors") for each in (folders[0], output))
    rest = open_checkpoint(str(folders[0])).by_role["rest", None].values()
    towers = [tower for tower in rest if "language_model" not in tower]
    assert towers and all(torch.equal(base[tower], result[tower]) for tower in towers)
    assert (output / "preprocessor_config.json").read_text() == '{"size": 28}'
    if name == "average":
        block = next(key for key in base if ".layers.3." in key and key not in rest)
        other = load_file(folders[1] / "model.safetensors")
        assert torch.allclose(result[block], (base[block] + other[block]) / 2)
        return
    with torch.no_grad():
        found = merged.eval()(input_ids=IDS, use_cache=False).logits
        expected = spliced_logits(models, RECIPES[name], IDS)
    assert torch.allclose(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_what_is_evaluated_in_memory_is_what_is_merged(wrapped, tmp_path):
    models, folders = wrapped
    if "Qwen3_5" in type(models[0]).__name__:
        pytest.skip("its tokenizer needs a vocabulary of bytes")
    recipe = recipe_for("taller", folders)
    fm.merge(recipe, tmp_path / "merged")
    texts = {"text": "t5 t6 t7 t8 " * 40}
    results = fm.evaluate(recipe, tmp_path / "merged", texts=texts).results
    assert results[0].total.bits_per_byte == pytest.approx(results[1].total.bits_per_byte)
