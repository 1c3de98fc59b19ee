"""Multimodal donors: the language model's blocks move, towers and processors are the base's."""

import pytest
import torch
from families import RECIPES, recipe_for, spliced_logits
from safetensors.torch import load_file
from wrapped import TEXTS, config_of, wrappers, write_wrapped

import frankenmerge as fm
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError

IDS = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=wrappers(TEXTS))
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


def with_towers(folders, towers, **more):
    entries = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    keys = {"merge_method": "linear", "models": entries, "dtype": "float32", "towers": towers}
    return Recipe.model_validate(keys | more)


def test_towers_are_merged_if_the_recipe_says_so(wrapped, tmp_path):
    models, folders = wrapped
    fm.merge(with_towers(folders, "merge"), tmp_path / "merged")
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    result = load_file(tmp_path / "merged" / "model.safetensors")
    assert result.keys() == one.keys()
    for name, value in result.items():
        assert torch.allclose(value, (one[name] + other[name]) / 2, atol=1e-6), name
    _, info = type(models[0]).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fm.merge(with_towers(folders, "base"), tmp_path / "kept")
    fm.merge(with_towers(folders, None), tmp_path / "default")
    kept, default = (
        load_file(tmp_path / each / "model.safetensors") for each in ("kept", "default")
    )
    assert all(torch.equal(kept[name], default[name]) for name in kept)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A wrapper with a LLaMA."""
    folder = tmp_path_factory.mktemp("llava")
    write_wrapped(folder, config_of("llava"), 0)
    return folder


@pytest.mark.parametrize(
    "change, found",
    [
        ({"intermediate_size": 48}, "mlp.fc1.bias: shapes [32] and [48]"),
        ({"hidden_act": "relu"}, "vision_config.hidden_act: "),
    ],
)
def test_towers_that_differ_are_refused_by_name(llava, change, found, tmp_path):
    config = config_of("llava")
    for key, value in change.items():
        setattr(config.vision_config, key, value)
    write_wrapped(tmp_path / "other", config, 1)
    folders = [llava, tmp_path / "other"]
    with pytest.raises(FrankenmergeError) as caught:
        fm.check(with_towers(folders, "merge"))
    places = {fault.place for fault in caught.value.faults}
    assert places == {"recipe: towers"}
    assert any(found in fault.found for fault in caught.value.faults)
    fm.check(with_towers(folders, "base"))


def test_towers_are_not_merged_next_to_blocks_that_move(llava, donors):
    moved = recipe_for("taller", [llava]).model_copy(update={"towers": "merge"})
    text = with_towers([donors["a"], donors["a"]], "merge")
    for recipe, expected in ((moved, "whole models"), (text, "a multimodal base donor")):
        with pytest.raises(FrankenmergeError) as caught:
            fm.check(recipe)
        (fault,) = caught.value.faults
        assert fault.place == "recipe: towers" and expected in fault.expected
