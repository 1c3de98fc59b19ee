"""The commands on tiny vision transformers."""

import json

import numpy as np
import pytest
from PIL import Image
from vision import write_images, write_vision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    write_vision(root / "a")
    write_vision(root / "b", seed=1, hidden_size=24)
    write_images(root / "images")
    return root


def as_json(run, *arguments: object) -> dict:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_inspect_says_what_it_is(folder, run):
    (row,) = as_json(run, "inspect", folder / "a")["donors"]
    assert row["images"] == {"height": 8, "width": 8, "channels": 1, "patch": 2}
    assert "8 x 8 x 1, patches of 2" in run("inspect", folder / "a")[1]


def test_features_ranks_the_images_of_a_folder(folder, run, tmp_path):
    found = as_json(
        run,
        *("features", folder / "a", "--images", folder / "images", "--neurons", "2,5"),
        *("--tokens", 3, "--layers", "1,3", "-o", tmp_path / "sheet.png"),
    )
    row = found["features"][1]
    assert (row["block"], row["neuron"], len(row["texts"])) == (1, 5, 3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = np.asarray(Image.open(folder / "images" / found["features"][0]["texts"][0]))
    np.testing.assert_array_equal(sheet[:64:8, :64:8], first)


def test_features_by_ascent(folder, run, tmp_path):
    arguments = ("features", folder / "a", "--method", "pixels", "--steps", 4, "--layers", "2")
    found = as_json(run, *arguments, "-o", tmp_path / "sheet.png")
    assert [row["neuron"] for row in found["features"]] == [0, 1, 2, 3]
    assert len(np.asarray(Image.open(tmp_path / "sheet.png"))) == 64 + 4
    assert "standard deviations" in run(*arguments)[1]


def test_analyze_align_and_report(folder, run, tmp_path):
    for name in "ab":
        as_json(
            run,
            *("analyze", folder / name, "--images", folder / "images", "--method", "pixels"),
            *("--neurons", "0-2", "-o", tmp_path / f"{name}.atlas.safetensors"),
        )
    found = as_json(
        run,
        *("align", tmp_path / "a.atlas.safetensors", tmp_path / "b.atlas.safetensors"),
        *("--method", "pixels", "-o", tmp_path / "ab.alignment.safetensors"),
    )
    assert found["shared_neurons"] == 16 and found["searched"]["neurons"] == [0, 1, 2]
    code, _, err = run("plan", tmp_path / "ab.alignment.safetensors", "-o", tmp_path / "r.yaml")
    assert code == 2 and "one of vision transformers" in err
    as_json(run, "report", tmp_path, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Images by gradient ascent of" in page and "Top-activating images of" in page
    assert page.count('<img src="data:image/png;base64,') == 2 * 4 * (3 + 8 * 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("features", "{a}", "--method", "greedy"),
        ("features", "{a}", "--bos"),
        ("analyze", "{a}", "--method", "greedy", "-o", "{out}.atlas.safetensors"),
        ("evaluate", "{a}", "--text", "{a}/config.json"),
        ("heal", "{recipe}", "{out}"),
    ],
)
def test_what_needs_a_language_model_says_so(arguments, folder, run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    models = [{"model": str(folder / "a")}] * 2
    slerp = {"base_model": str(folder / "a"), "parameters": {"t": 0.5}}
    recipe.write_text(json.dumps({"merge_method": "slerp", **slerp, "models": models}))
    names = {"a": folder / "a", "out": tmp_path / "out", "recipe": recipe}
    code, _, err = run(*(argument.format(**names) for argument in arguments))
    assert code == 2 and "a language model" in err and "a vision transformer (vit)" in err


def test_images_are_for_vision_transformers(folder, donors, run, tmp_path):
    for arguments in (("--images", folder / "images"), ("--method", "pixels")):
        code, _, err = run("features", donors["a"], *arguments)
        assert code == 2 and "a vision transformer" in err and arguments[0] in err
    (tmp_path / "empty").mkdir()
    code, _, err = run("features", folder / "a", "--images", tmp_path / "empty")
    assert code == 2 and "two at least" in err


def test_whole_models_merge(folder, run, tmp_path):
    write_vision(tmp_path / "c", seed=2)
    models = [{"model": str(path)} for path in (folder / "a", tmp_path / "c")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    as_json(run, "merge", tmp_path / "r.yaml", tmp_path / "merged")
    found = as_json(run, "features", tmp_path / "merged", "--images", folder / "images")
    assert len(found["features"]) == 12
