"""A plan's prediction is found by the recipe's key, and compared with what was measured."""

import json
import os
import shutil

import invented
import numpy as np
import pytest
from conftest import resolved

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.evaluation.bench import Result
from frankenmerge.evaluation.language import Loss
from frankenmerge.planning.damping import damped
from frankenmerge.workflows.predictions import check_predictions, donors_loss, planned_for

WRITES = ("self_attn.o_proj", "mlp.down_proj")
FACTORS = [1, 0.5, 0.5, 1]


@pytest.fixture
def plain(donors) -> Recipe:
    a, b = str(donors["a"]), str(donors["b"])
    return recipe_of([Block(a, 0), Block(a, 1), Block(b, 1), Block(b, 2)])


@pytest.fixture
def scaled(plain) -> Recipe:
    recipe = damped(plain, FACTORS, WRITES)
    assert recipe.blocks == plain.blocks
    return recipe


def entry(recipe: Recipe, predicted: float, *, key: str | None = None, summary: str = "same"):
    """A plan of a recipe, as `plan` writes it; without a key as version 0.1 wrote it."""
    (plan,) = invented.evidence()["plans"]
    content = plan | {
        "recipe": recipe.model_dump(exclude_none=True),
        "summary": summary,
        "predicted_damage": predicted,
        "interval": [predicted - 0.1, predicted + 0.1],
    }
    return content | ({"key": key} if key else {})


def write_evidence(path, *plans) -> None:
    invented.write(path, invented.evidence() | {"plans": list(plans)})


def predicted(recipe: Recipe, file) -> float | None:
    plan = planned_for(resolved(recipe), file)
    return plan and plan.predicted_damage


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_a_damped_and_an_undamped_plan_of_one_summary_are_never_confused(
    plain, scaled, tmp_path, keyed, order
):
    plans = [
        entry(recipe, value, key=resolved(recipe).key if keyed else None)
        for recipe, value in ((plain, 1.0), (scaled, 2.0))
    ]
    write_evidence(tmp_path / "r.evidence.json", *plans[::order])
    assert predicted(plain, tmp_path / "r.yaml") == 1.0
    assert predicted(scaled, tmp_path / "r.yaml") == 2.0
    other = damped(plain, [1, 0.25, 0.25, 1], WRITES)
    assert predicted(other, tmp_path / "r.yaml") is None


def test_only_the_key_counts_where_there_is_one(plain, scaled, tmp_path):
    write_evidence(tmp_path / "r.evidence.json", entry(plain, 1.0, key=resolved(scaled).key))
    assert predicted(plain, tmp_path / "r.yaml") is None
    assert predicted(scaled, tmp_path / "r.yaml") == 1.0


@pytest.mark.parametrize("newer", ["recipe", "other"])
def test_of_two_evidence_files_that_of_the_recipe_counts(plain, tmp_path, newer):
    key = resolved(plain).key
    for name, value in (("recipe", 1.0), ("other", 2.0)):
        path = tmp_path / f"{name}.evidence.json"
        write_evidence(path, entry(plain, value, key=key))
        os.utime(path, (0, 1000 if name == newer else 0))
    for file in ("recipe.yaml", "recipe.2.yaml"):
        assert predicted(plain, tmp_path / file) == 1.0
    assert predicted(plain, tmp_path / "other.yaml") == 2.0
    # Neither is named after this one: the one written last counts.
    assert predicted(plain, tmp_path / "third.yaml") == {"recipe": 1.0, "other": 2.0}[newer]


def test_files_that_are_not_evidence_are_skipped(plain, tmp_path):
    (tmp_path / "a.evidence.json").write_text('{"of": "another program"}')
    (tmp_path / "b.evidence.json").write_text("{")
    assert predicted(plain, tmp_path / "r.yaml") is None
    write_evidence(tmp_path / "c.evidence.json", entry(plain, 1.0, key=resolved(plain).key))
    assert predicted(plain, tmp_path / "r.yaml") == 1.0
    assert predicted(plain, tmp_path / "elsewhere" / "r.yaml") is None


def test_a_plan_of_version_01_is_found_by_its_recipe_wherever_it_is_called_from(
    donors, tmp_path, monkeypatch
):
    """Its donors were named relative to the folder of its file."""
    for name in "ab":
        shutil.copytree(donors[name], tmp_path / name)
    blocks = [Block("a", 0), Block("b", 1), Block("b", 2)]
    recipe, other = recipe_of(blocks), damped(recipe_of(blocks), [1, 0.5, 1], WRITES)
    (tmp_path / "r.yaml").write_text(recipe.dump())
    write_evidence(tmp_path / "r.evidence.json", entry(other, 2.0), entry(recipe, 1.0))
    assert "key" not in json.loads((tmp_path / "r.evidence.json").read_text())["plans"][0]
    assert predicted(load_recipe(tmp_path / "r.yaml"), tmp_path / "r.yaml") == 1.0
    monkeypatch.chdir(tmp_path)
    assert predicted(load_recipe(tmp_path / "r.yaml"), tmp_path / "r.yaml") == 1.0


def test_a_plan_of_version_01_with_other_donors_is_not_the_recipe_s(donors, plain, tmp_path):
    other = recipe_of([Block(str(donors["deep"]), block.index) for block in plain.blocks])
    write_evidence(tmp_path / "r.evidence.json", entry(other, 2.0, summary=str(plain)))
    assert predicted(plain, tmp_path / "r.yaml") is None


def result(name: str, nats: float, role: str = "donor") -> Result:
    return Result(name, role, {"text": Loss(np.full(10, nats), 20)})


@pytest.mark.parametrize(("loss", "held"), [(2.75 + 1.05, True), (2.75 + 1.2, False)])
def test_measured_damage_is_above_the_donors_own_loss_by_their_shares(donors, tmp_path, loss, held):
    a, b = str(donors["a"]), str(donors["b"])
    recipe = recipe_of([Block(a, 0), Block(b, 1), Block(b, 2), Block(b, 3)])
    splice, file = resolved(recipe), tmp_path / "r.yaml"
    write_evidence(tmp_path / "r.evidence.json", entry(recipe, 1.0, key=splice.key))
    results = [result("r", loss, "recipe"), result(a, 2.0), result(b, 3.0)]
    assert donors_loss(splice, {a: 2.0, b: 3.0}) == pytest.approx(0.25 * 2 + 0.75 * 3)
    (check,) = check_predictions(results, {"r": splice}, {"r": file})
    assert check.measured == pytest.approx(loss - 2.75) and check.held is held
    assert (check.recipe, check.predicted, check.low, check.high) == ("r", 1.0, 0.9, 1.1)
    assert check_predictions(results, {"r": splice}, {}) == []  # a recipe without a file
    assert check_predictions(results[:2], {"r": splice}, {"r": file}) == []  # a donor is missing
