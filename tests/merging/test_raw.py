"""`merge --raw`: tensors of any architecture, compared with the methods' plain formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from frankenmerge import api as fm
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.write_plan import MergeOptions

SHAPES = {
    "unet.down.0.conv.weight": (6, 4, 3, 3),
    "unet.down.0.conv.bias": (6,),
    "text{0}.embed": (10, 8),
    "head.weight": (3, 8),
    "scale": (),
}


def write_tensors(path: Path, seed: int, dtype=np.float32, **others) -> Path:
    random = np.random.default_rng(seed)
    made = {n: random.standard_normal(shape).astype(dtype) for n, shape in SHAPES.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(array) for name, array in (made | others).items()}, path)
    return path


def write_shards(folder: Path, seed: int, index: bool) -> Path:
    """The tensors of a seed in two files, with an index or without."""
    whole = load_file(write_tensors(folder.parent / f"whole{seed}.safetensors", seed))
    folder.mkdir()
    names = list(whole)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, some in parts.items():
        save_file({name: whole[name] for name in some}, folder / file)
    if index:
        mapped = {name: file for file, some in parts.items() for name in some}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    return folder


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return [write_tensors(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2, 3)]


def recipe_of(files, method: str, base=None, models=None, **others) -> Recipe:
    parameters = models or [{}] * len(files)
    listed = [
        {"model": str(file), "parameters": own} for file, own in zip(files, parameters, strict=True)
    ]
    start = {"base_model": str(base)} if base else {}
    return Recipe.model_validate({"models": listed, "merge_method": method} | start | others)


def merged(recipe: Recipe, output: Path, **options) -> dict[str, np.ndarray]:
    fm.merge(recipe, output, MergeOptions(**options), raw=True)
    shards = sorted(output.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def refused(recipe: Recipe, output: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(FrankenmergeError) as caught:
        fm.merge(recipe, output, raw=True)
    assert not output.exists()
    assert all(all(fault) for fault in caught.value.faults)
    return [fault[:3] for fault in caught.value.faults]


def arc(one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    angle = np.arccos((one * other).sum() / lengths[0] / lengths[1])
    weights = np.sin((1 - t) * angle), np.sin(t * angle)
    return (weights[0] * one + weights[1] * other) / np.sin(angle)


# Results


def test_a_weighted_mean(files, tmp_path):
    models = [{"weight": 1.0}, {"weight": 2.0}, {"weight": 3.0}]
    made = merged(recipe_of(files, "linear", models=models), tmp_path / "out")
    arrays = [load_file(file) for file in files]
    assert made.keys() == SHAPES.keys()
    for name in SHAPES:
        mean = sum(w * a[name].astype(float) for w, a in zip((1, 2, 3), arrays, strict=True)) / 6
        np.testing.assert_allclose(made[name], mean, rtol=1e-6, atol=1e-7, err_msg=name)


def test_task_arithmetic_from_a_base_that_is_no_model(files, tmp_path):
    base, *models = files
    weights = [{"weight": 0.5}, {"weight": -0.25}]
    made = merged(recipe_of(models, "task_arithmetic", base, weights), tmp_path / "out")
    start, one, two = (load_file(file) for file in files)
    for name in SHAPES:
        expected = start[name] + 0.5 * (one[name] - start[name]) - 0.25 * (two[name] - start[name])
        np.testing.assert_allclose(made[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_slerp_turns_each_tensor(files, tmp_path):
    recipe = recipe_of(files[:2], "slerp", files[0], parameters={"t": 0.3})
    made = merged(recipe, tmp_path / "out")
    one, two = (load_file(file) for file in files[:2])
    for name in ("unet.down.0.conv.weight", "head.weight"):
        turned = arc(one[name].astype(float), two[name].astype(float), 0.3)
        np.testing.assert_allclose(made[name], turned, rtol=1e-5, atol=1e-6)


def test_filters_by_name(files, tmp_path):
    weight = [{"filter": "conv", "value": 0.0}, {"filter": "{0}", "value": 0.5}, {"value": 1.0}]
    models = [{"weight": 1.0}, {"weight": weight}]
    recipe = recipe_of(files[:2], "linear", models=models, parameters={"normalize": False})
    made = merged(recipe, tmp_path / "out")
    one, two = (load_file(file) for file in files[:2])
    for name in SHAPES:
        share = 0.0 if "conv" in name else 0.5 if "{0}" in name else 1.0
        np.testing.assert_allclose(made[name], one[name] + share * two[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [False, True])
def test_folders_and_files_are_merged_alike(index, files, tmp_path):
    folder = write_shards(tmp_path / "folder", 2, index)
    one = merged(
        recipe_of([files[0], folder], "linear", models=[{"weight": 1}] * 2), tmp_path / "x"
    )
    two = merged(recipe_of(files[:2], "linear", models=[{"weight": 1}] * 2), tmp_path / "y")
    assert all(np.array_equal(one[name], two[name]) for name in SHAPES)


def test_shards_have_an_index_and_there_is_no_config(files, tmp_path):
    recipe = recipe_of(files[:2], "linear", models=[{"weight": 1}] * 2)
    whole = merged(recipe, tmp_path / "whole")
    small = {"README.md", "frankenmerge.json", "recipe.yaml"}
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == small | {"model.safetensors"}
    made = merged(recipe, tmp_path / "shards", shard_size=500)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES) and len(set(index["weight_map"].values())) > 1
    assert all(np.array_equal(whole[name], made[name]) for name in SHAPES)


def test_types_are_kept_tensor_by_tensor_or_set(tmp_path):
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tensors = {"a": torch.randn(5, 4).bfloat16(), "b": torch.randn(3), "ids": torch.arange(4)}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_torch(tensors, paths[-1])
    models = [{"weight": 1}] * 2
    fm.merge(recipe_of(paths, "linear", models=models), tmp_path / "kept", raw=True)
    kept = load_torch(tmp_path / "kept" / "model.safetensors")
    assert [kept[name].dtype for name in "ab"] == [torch.bfloat16, torch.float32]
    assert kept["ids"].tolist() == [0, 1, 2, 3]
    one, two = map(load_torch, paths)
    assert torch.equal(kept["a"], ((one["a"].float() + two["a"].float()) / 2).bfloat16())
    fm.merge(recipe_of(paths, "linear", models=models, dtype="float16"), tmp_path / "set", raw=True)
    made = load_torch(tmp_path / "set" / "model.safetensors")
    assert [made[name].dtype for name in ("a", "b", "ids")] == [torch.float16] * 2 + [torch.int64]


def test_a_passthrough_copies(files, tmp_path):
    made = merged(recipe_of(files[:1], "passthrough"), tmp_path / "out")
    assert all(np.array_equal(made[name], load_file(files[0])[name]) for name in SHAPES)


# Faults


def test_missing_names_and_other_shapes_are_all_named(files, tmp_path):
    tensors = load_file(files[1])
    del tensors["head.weight"]
    tensors |= {"scale": np.zeros(2, np.float32), "more": np.zeros(1, np.float32)}
    save_file(tensors, files[1])
    found = refused(recipe_of(files[:2], "linear", models=[{"weight": 1}] * 2), tmp_path / "out")
    assert {place for place, _, _ in found} == {
        f"{files[1]}: head.weight",
        f"{files[1]}: scale",
        f"{files[0]}: more",
    }
    assert any("[2]" in shape for _, _, shape in found)


def test_mixed_types_need_a_dtype(files, tmp_path):
    write_tensors(files[1], 2, np.float16)
    models = [{"weight": 1}] * 2
    ((place, _, found),) = refused(recipe_of(files[:2], "linear", models=models), tmp_path / "out")
    assert place == "recipe: dtype" and "F16 and F32" in found
    merged(recipe_of(files[:2], "linear", models=models, dtype="float32"), tmp_path / "out")


def test_integers_that_differ(tmp_path):
    paths = [
        write_tensors(tmp_path / f"{seed}.safetensors", seed, ids=np.arange(seed, seed + 3))
        for seed in (1, 2)
    ]
    ((place, _, found),) = refused(
        recipe_of(paths, "linear", models=[{"weight": 1}] * 2), tmp_path / "out"
    )
    assert place == "recipe: ids" and "I64" in found


@pytest.mark.parametrize(
    "others, words",
    [
        ({"tokenizer_source": "base"}, "tokenizer_source"),
        ({"parameters": {"weight": [0.0, 1.0]}}, "gradient"),
        ({"parameters": {"weight": 1, "densty": 1}}, "densty"),
        ({"parameters": {"weight": [{"filter": "convv", "value": 1}, {"value": 1}]}}, "convv"),
        ({}, "weight"),
    ],
)
def test_recipes_that_mean_nothing_here(others, words, files, tmp_path):
    found = refused(recipe_of(files[:2], "linear", **others), tmp_path / "out")
    assert words in str(found)


def test_slices_and_stages(files, tmp_path):
    part = {"sources": [{"model": str(files[0]), "layer_range": [0, 1]}]}
    recipe = Recipe.model_validate({"slices": [part], "merge_method": "passthrough"})
    assert "slices" in str(refused(recipe, tmp_path / "out"))


def test_a_tensor_in_two_files_of_a_folder(files, tmp_path):
    folder = write_shards(tmp_path / "folder", 2, index=False)
    (folder / "again.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    found = refused(
        recipe_of([files[0], folder], "linear", models=[{"weight": 1}] * 2), tmp_path / "out"
    )
    assert len(found) == 2 and "also in" in found[0][2]


# The command


@pytest.fixture
def recipe_file(files, tmp_path) -> Path:
    recipe = recipe_of(files, "linear", models=[{"weight": 1}] * 3)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(exclude_none=True)))
    return path


def test_the_command_checks_merges_and_verifies(run, recipe_file, tmp_path):
    code, out, _ = run("check", "--raw", recipe_file, "--json")
    planned = json.loads(out)
    assert code == 0 and planned["tensors"] == 5 and "depth" not in planned
    code, out, _ = run("merge", "--raw", recipe_file, tmp_path / "out", "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists() and "blocks" not in out
    code, out, _ = run("merge", "--raw", recipe_file, tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["tensors"], found["bytes"]) == (5, planned["bytes"])
    code, out, _ = run("check", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["tensors"] == 5
    assert json.loads((tmp_path / "out" / "frankenmerge.json").read_text())["raw"] is True


def test_without_raw_the_message_names_the_option(run, recipe_file, tmp_path):
    code, _, err = run("merge", recipe_file, tmp_path / "out")
    assert code == 2 and "--raw" in err
