"""Multimodal donors: the language model's blocks move, towers and processors are the base's."""

import pytest
import torch
from families import RECIPES, recipe_for, spliced_logits
from safetensors.torch import load_file
from wrapped import TEXTS, config_of, write_wrapped

import frankenmerge as fm
from frankenmerge.donors.checkpoint import open_checkpoint

IDS = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=TEXTS)
def wrapped(request, tmp_path_factory):
    """Two donors of one wrapper, as they are in memory and on disk."""
    folder, config = tmp_path_factory.mktemp(request.param), config_of(request.param)
    folders = [folder / str(seed) for seed in (0, 1)]
    models = [write_wrapped(path, config, seed) for seed, path in enumerate(folders)]
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
