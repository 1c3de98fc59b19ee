"""`evaluate` next to a search for a gain: what was won there, and what is won here."""

import json

import invented
import pytest
from conftest import DEMO

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Whole
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.splicing.resolve import resolve


@pytest.fixture
def searched(tmp_path):
    """An average of the demo's donors, the gain that its search found, and a text."""
    names = [str(DEMO / "donors" / name) for name in ("code", "prose")]
    models = [Whole(model=name, parameters={"weight": 0.5}) for name in names]
    recipe = Recipe(merge_method="linear", models=models)
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    text = tmp_path / "code.txt"
    text.write_text((DEMO / "text" / "code.txt").read_text(encoding="utf-8")[:3000])
    key = resolve(recipe, {name: open_checkpoint(name) for name in names}).key
    return recipe, key, text, names


def write_gain(path, key: str, gain: float) -> None:
    found = invented.gain()
    found["plans"] = [found["plans"][0] | {"key": key, "gain": gain, "interval": [0.01, 0.06]}]
    invented.write(path, found)


def test_the_gain_that_was_found_is_shown_beside_the_one_measured(run, searched, tmp_path):
    _, key, text, names = searched
    write_gain(tmp_path / "recipe.gain.json", key, 0.05)
    write_gain(tmp_path / "another.gain.json", key, 0.07)  # that of the recipe's name counts
    code, out, err = run(
        "evaluate", tmp_path / "recipe.yaml", "--text", text, "-o", tmp_path / "e.json"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "e.json").read_text())
    nats = {model["name"]: model["nats_per_token"] for model in record["models"]}
    (check,) = record["gains"]
    best = min(names, key=nats.__getitem__)
    assert (check["predicted"], check["predicted_interval"]) == (0.05, [0.01, 0.06])
    assert check["best_donor"] == best
    assert check["measured"] == pytest.approx(nats[best] - nats[check["recipe"]])
    low, high = check["measured_interval"]
    assert low < check["measured"] < high < low + 0.5
    shown = " ".join(out.split())
    assert "predicted gain 0.050 nats per token (95 % interval 0.010 to 0.060)" in shown
    assert f"measured here {check['measured']:.3f}" in shown


def test_a_gain_on_sampled_tokens_is_shown_with_its_interval_for_a_text(run, searched, tmp_path):
    path = tmp_path / "recipe.gain.json"
    write_gain(path, searched[1], 0.05)
    found = json.loads(path.read_text())
    found["plans"][0]["text_interval"] = [-0.02, 0.09]
    path.write_text(json.dumps(found))
    options = "--text", searched[2], "-o", tmp_path / "e.json"
    code, out, err = run("evaluate", tmp_path / "recipe.yaml", *options)
    assert code == 0, err
    (check,) = json.loads((tmp_path / "e.json").read_text())["gains"]
    assert (check["predicted_interval"], check["predicted_coverage"]) == ([-0.02, 0.09], 0.9)
    assert "(90 % interval -0.020 to 0.090)" in " ".join(out.split())


def test_the_gain_of_another_recipe_is_not_shown(run, searched, tmp_path):
    write_gain(tmp_path / "recipe.gain.json", "0" * 32, 0.05)
    (tmp_path / "broken.gain.json").write_text("{")
    code, out, _ = run("evaluate", tmp_path / "recipe.yaml", "--text", searched[2], "--json")
    assert code == 0 and json.loads(out).get("gains", []) == []
