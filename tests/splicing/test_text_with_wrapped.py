"""Text-only donors and wrapped ones of the same language model, in both directions."""

import json

import pytest
import torch
from families import BLOCKS, RECIPES, block_list, recipe_for, spliced_logits
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from wrapped import TEXTS, config_of, wrappers, write_tokenizer, write_wrapped

import frankenmerge as fm
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

TEXT_ONLY = {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
"""Families of text-only models that are not called as their wrappers' language models."""
PAIRS = ("gemma3", "gemma4", "internvl", "llama4", "llava", "mistral3", "qwen3_5", *TEXT_ONLY)
IDS = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))


def write_text(folder, wrapper, config, **changes):
    """Save a text-only donor with the settings of a wrapper's language model."""
    kind = CONFIG_MAPPING[TEXT_ONLY.get(wrapper, TEXTS[wrapper])]
    known, text = kind().to_dict(), config.text_config.to_dict()
    same = {key: value for key, value in text.items() if key in known and key != "model_type"}
    if rope := same.get("rope_parameters"):
        rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        same["rope_parameters"] = rope
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**(same | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=wrappers(PAIRS))
def pair(request, tmp_path_factory):
    """A wrapper and a text-only donor, as they are in memory and on disk."""
    folder, config = tmp_path_factory.mktemp(request.param), config_of(request.param)
    models = [
        write_wrapped(folder / "wrapped", config, 0),
        write_text(folder / "text", request.param, config),
    ]
    return models, [folder / "wrapped", folder / "text"]


@pytest.fixture(params=["wrapped base", "text-only base"])
def ordered(request, pair):
    """The same, the base first."""
    step = 1 if request.param == "wrapped base" else -1
    return pair[0][::step], pair[1][::step]


@pytest.mark.parametrize("name", ["interleaved", "average"])
@torch.no_grad()
def test_the_result_is_of_the_base_s_kind(ordered, name, tmp_path):
    models, folders = ordered
    output = tmp_path / "merged"
    fm.merge(recipe_for(name, folders), output)
    kind = type(models[0])
    merged, info = kind.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, own = (json.loads((each / "config.json").read_text()) for each in (output, folders[0]))
    assert (written["model_type"], written.keys()) == (own["model_type"], own.keys())
    assert (output / "preprocessor_config.json").exists() == (folders[0].name == "wrapped")
    towers = [name for name in load_file(folders[0] / "model.safetensors") if "visi" in name]
    base, result = (load_file(each / "model.safetensors") for each in (folders[0], output))
    assert all(torch.equal(base[tower], result[tower]) for tower in towers)
    if name == "interleaved":
        found = merged.eval()(input_ids=IDS, use_cache=False).logits
        expected = spliced_logits(models, RECIPES[name], IDS)
        assert torch.allclose(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))
        return
    for index in range(BLOCKS):
        made, one, other = (block_list(each)[index].state_dict() for each in (merged, *models))
        for key, value in made.items():
            assert torch.allclose(value, (one[key] + other[key]) / 2, atol=1e-6), key
    ends = [each.get_input_embeddings().weight for each in (merged, *models)]
    assert torch.allclose(ends[0], (ends[1] + ends[2]) / 2, atol=1e-6)


def test_it_is_checked_evaluated_and_inspected(ordered, tmp_path):
    _, folders = ordered
    assert not fm.compare_donors(*folders).reasons
    recipe = recipe_for("interleaved", folders)
    remarks = resolve(recipe, open_donors(recipe)).remarks
    assert any("left out" in line for line in remarks) == (folders[0].name == "text")
    fm.merge(recipe, tmp_path / "merged")
    verified = fm.verify(tmp_path / "merged")
    assert verified.compared == verified.tensors and not verified.absent
    if folders[0].parent.name.startswith(("internvl", "qwen")):
        pytest.skip("the tokenizer of Qwen needs a vocabulary of bytes")
    texts = {"text": "t5 t6 t7 t8 " * 40}
    results = fm.evaluate(recipe, tmp_path / "merged", texts=texts).results
    assert results[0].lineage.blocks == results[1].lineage.blocks
    assert results[0].total.bits_per_byte == pytest.approx(results[1].total.bits_per_byte)


@pytest.mark.parametrize(
    "wrapper, change, found",
    [
        ("qwen3_vl", {"use_sliding_window": True, "max_window_layers": 2}, "sliding_window: "),
        ("qwen3_vl", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, "rope_para"),
        ("llava", {"num_key_value_heads": 4}, "num_key_value_heads: "),
    ],
)
def test_language_models_that_differ_are_refused(wrapper, change, found, tmp_path):
    config = config_of(wrapper)
    write_wrapped(tmp_path / "wrapped", config, 0)
    if "use_sliding_window" in change:
        change = change | {"sliding_window": 8, "layer_types": None}
    write_text(tmp_path / "text", wrapper, config, **change)
    for folders in (
        [tmp_path / "wrapped", tmp_path / "text"],
        [tmp_path / "text", tmp_path / "wrapped"],
    ):
        with pytest.raises(FrankenmergeError) as caught:
            fm.check(recipe_for("interleaved", folders))
        assert any(found in fault.found for fault in caught.value.faults)
        assert any(found in line for line in fm.compare_donors(*folders).reasons)


@torch.no_grad()
def test_two_wrappers_of_one_language_model_splice_with_each_other(tmp_path):
    config = config_of("llava")
    other = type(config)(
        text_config=config_of("internvl").text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        image_token_id=100,
    )
    folders = [tmp_path / "internvl", tmp_path / "llava"]
    configs = (config_of("internvl"), other)
    models = [
        write_wrapped(*each, seed) for seed, each in enumerate(zip(folders, configs, strict=True))
    ]
    fm.merge(recipe_for("interleaved", folders), tmp_path / "merged")
    merged, info = type(models[0]).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = merged.eval()(input_ids=IDS, use_cache=False).logits
    expected = spliced_logits(models, RECIPES["interleaved"], IDS)
    assert torch.allclose(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))
