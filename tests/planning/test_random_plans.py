"""`plan --random`: different recipes of one depth, the same for the same seed."""

import json

from frankenmerge.artefacts.recipe_file import load_recipe


def drawn(run, folder, donors, *options):
    folder.mkdir()
    args = ("plan", donors["a"], donors["b"], "--random", 5, "-o", folder / "r.yaml", "--json")
    code, out, err = run(*args, *options)
    assert code == 0, err
    return json.loads(out), [path.read_bytes() for path in sorted(folder.iterdir())]


def test_random_recipes_are_different_valid_and_the_same_for_one_seed(donors, run, tmp_path):
    found, files = drawn(run, tmp_path / "one", donors, "--depth", 6, "--seed", 4)
    assert len(set(files)) == len(found["plans"]) == 5
    for path in found["written"]:
        recipe = load_recipe(path)
        assert len(recipe.blocks) == 6 and len(recipe.seams) <= 4
        assert run("check", path)[0] == 0
    assert files == drawn(run, tmp_path / "two", donors, "--depth", 6, "--seed", 4)[1]
    assert files != drawn(run, tmp_path / "three", donors, "--depth", 6, "--seed", 5)[1]
    assert files != drawn(run, tmp_path / "four", donors, "--depth", 7, "--seed", 4)[1]


def test_they_are_measured_as_controls(donors, run, tmp_path, text):
    found, _ = drawn(run, tmp_path / "one", donors)
    recipes = found["written"][:2]
    code, out, err = run("evaluate", *recipes, "--text", text, "--json")
    assert code == 0, err
    measured = {model["name"] for model in json.loads(out)["models"]}
    assert set(recipes) <= measured


def test_too_many_or_too_deep_are_refused(donors, run, tmp_path):
    for options in (
        ("--random", 900, "--depth", 4, "--max-seams", 1),
        ("--random", 1, "--depth", 90),
    ):
        args = ("plan", donors["a"], donors["b"], "-o", tmp_path / "r.yaml")
        code, out, err = run(*args, *options)
        assert (code, out) == (2, "") and "remedy:" in err and "Traceback" not in err
        assert not list(tmp_path.glob("*.yaml"))
    code, _, err = run(
        "plan", donors["a"], donors["wide"], "--random", 1, "-o", tmp_path / "r.yaml"
    )
    assert code == 2 and "hidden_size" in err or "width" in err
