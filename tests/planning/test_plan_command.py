"""The command `plan`: files, options, verified, calibrated and damped plans."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import resolved

from frankenmerge.artefacts.alignment import load_alignment, save_alignment
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.planning.plan import plan
from frankenmerge.planning.search import Constraints


@pytest.fixture
def written(alignments, tmp_path) -> Path:
    save_alignment(alignments["a-deep"], tmp_path / "ad.alignment.safetensors")
    return tmp_path / "ad.alignment.safetensors"


def test_the_command_line_writes_recipes_that_pass_check(written, run, tmp_path):
    code, out, _ = run(
        "plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8, "--top", 3, "--json"
    )
    result = json.loads(out)
    paths = [tmp_path / name for name in ("recipe.yaml", "recipe.2.yaml", "recipe.3.yaml")]
    assert code == 0 and result["written"] == [str(path) for path in paths]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "ad.alignment.safetensors",
        "recipe.2.yaml",
        "recipe.3.yaml",
        "recipe.evidence.json",
        "recipe.yaml",
    ]
    expected = plan([load_alignment(written)], Constraints(8), top=3)
    for path, entry in zip(paths, expected, strict=True):
        assert load_recipe(path) == entry.recipe
        code, out, _ = run("check", path, "--json")
        assert code == 0 and json.loads(out)["depth"] == 8


def test_the_evidence_next_to_the_recipes_is_what_was_printed(written, run, tmp_path):
    code, out, _ = run("plan", written, "-o", tmp_path / "recipe.yaml", "--top", 2, "--json")
    result, evidence = json.loads(out), json.loads((tmp_path / "recipe.evidence.json").read_text())
    assert code == 0
    assert {key: result[key] for key in evidence} == evidence
    assert evidence["plans"] == [
        entry.record(resolved(entry.recipe).key).as_json()
        for entry in plan([load_alignment(written)], Constraints(9), top=2)
    ]
    assert evidence["constraints"] == {
        "depth": 9,
        "max_seams": 4,
        "min_slice": 2,
        "protect_first": 1,
        "protect_last": 1,
    }
    assert evidence["model"]["origin"]["donors"]


def test_planning_twice_writes_the_same_bytes(written, run, tmp_path):
    for folder in ("one", "two"):
        assert run("plan", written, "-o", tmp_path / folder / "recipe.yaml", "--top", 3)[0] == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_command_line_shows_the_plan_and_its_evidence(written, run, tmp_path):
    code, out, _ = run("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8)
    entry = plan([load_alignment(written)], Constraints(8))[0]
    assert code == 0 and f"{entry.predicted_damage:.3f}" in out
    for number, seam in enumerate(entry.seams, 1):
        after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
        assert f"Seam {number}: {after} -> {before}" in out
        assert f"{seam.scores['jaccard']:.3f}" in out


def test_options_reach_the_planner(written, run, tmp_path):
    options = (
        "--depth",
        8,
        "--max-seams",
        1,
        "--min-slice",
        3,
        "--protect-first",
        0,
        "--protect-last",
        2,
    )
    assert run("plan", written, "-o", tmp_path / "recipe.yaml", *options)[0] == 0
    assert (
        load_recipe(tmp_path / "recipe.yaml")
        == plan([load_alignment(written)], Constraints(8, 1, 3, 0, 2))[0].recipe
    )


def test_a_plan_that_cannot_be_is_one_message_and_no_file(written, run, tmp_path):
    code, out, err = run("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 100)
    assert (code, out) == (2, "")
    assert "depth 100" in err and "Traceback" not in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_three_donors_are_planned_from_three_alignments(alignments, run, tmp_path):
    paths = []
    for name in ("a-b", "a-deep", "b-deep"):
        paths.append(tmp_path / f"{name}.alignment.safetensors")
        save_alignment(alignments[name], paths[-1])
    assert run("plan", *paths, "-o", tmp_path / "recipe.yaml", "--depth", 9)[0] == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert {Path(name).name for name in recipe.donors} == {"a", "b", "deep"}
    assert run("check", tmp_path / "recipe.yaml")[0] == 0


def test_verified_plans_are_ranked_by_what_was_measured(written, run, tmp_path, text):
    measured_on = ("--verify", text, "--calibrate", text)
    code, out, _ = run(
        "plan",
        written,
        "-o",
        tmp_path / "recipe.yaml",
        "--depth",
        8,
        "--top",
        4,
        *measured_on,
        "--json",
    )
    result = json.loads(out)
    assert code == 0 and result["model"]["origin"]["splices"] == 16
    measured = [entry["measured_damage"] for entry in result["plans"]]
    assert len(measured) == 4 and measured == sorted(measured)
    code, out, _ = run("evaluate", tmp_path / "recipe.yaml", "--text", text, "--json")
    (check,) = json.loads(out)["predictions"]
    assert check["measured"] == pytest.approx(measured[0], abs=1e-6)
    assert check["predicted"] == result["plans"][0]["predicted_damage"]
    assert check["held"] == (check["low"] <= check["measured"] <= check["high"])


def test_plans_are_predicted_from_what_they_do_on_sampled_tokens(donors, run, tmp_path, text):
    from frankenmerge.evaluation.sampled_damage import damage_on_sampled
    from frankenmerge.models.loading import load_model
    from frankenmerge.splicing.assemble import assemble

    alignment, recipe = tmp_path / "ad.alignment.safetensors", tmp_path / "recipe.yaml"
    code, out, _ = run(
        "align", donors["a"], donors["deep"], "-o", alignment, "--sampled", "--exchange", "--json"
    )
    exchanged = load_alignment(alignment).exchange
    assert code == 0 and load_alignment(alignment).provenance["predicted_from"] == "drawn tokens"
    assert [matrix.shape for pair in exchanged for matrix in pair] == [
        (4, 6),
        (6, 4),
        (4, 4),
        (6, 6),
    ]
    np.testing.assert_allclose(
        json.loads(out)["exchange"]["replacement"][0], exchanged.replacement[0]
    )
    code, out, _ = run(
        "plan",
        alignment,
        "-o",
        recipe,
        "--depth",
        8,
        "--top",
        4,
        "--verify",
        "sampled",
        "--damp",
        "sampled",
        "--json",
    )
    result = json.loads(out)
    assert code == 0 and [entry["basis"] for entry in result["plans"]] == ["drawn"] * 4
    damage = result["damping"]["damage"]
    best = min(damage, key=damage.__getitem__)
    assert result["damping"]["kept"] == (None if best == "none" else best)
    predicted = [entry["predicted_damage"] for entry in result["plans"]]
    assert predicted == sorted(predicted) and predicted[0] == pytest.approx(damage[best], rel=1e-4)
    opened = {str(donors[name]): open_checkpoint(str(donors[name])) for name in ("a", "deep")}
    models = {name: load_model(donor) for name, donor in opened.items()}
    (found,) = damage_on_sampled(
        [resolved(load_recipe(recipe), opened)], models, lambda splice: assemble(splice, models)
    )
    assert found == pytest.approx(damage[best], rel=1e-4)
    code, out, _ = run("evaluate", recipe, "--text", text, "--json")
    assert [check["predicted"] for check in json.loads(out)["predictions"]] == [
        result["plans"][0]["predicted_damage"]
    ]


def test_calibrated_on_sampled_tokens_the_model_says_so(written, run, tmp_path):
    code, out, _ = run(
        "plan",
        written,
        "-o",
        tmp_path / "recipe.yaml",
        "--depth",
        8,
        "--calibrate",
        "sampled",
        "--json",
    )
    assert code == 0 and json.loads(out)["model"]["origin"]["texts"] == ["sampled"]


def test_a_parameter_budget_is_kept_to_and_used(written, donors, run, tmp_path):
    from frankenmerge.donors.checkpoint import open_checkpoint as opened

    recipe, budget = tmp_path / "recipe.yaml", 20_000
    block = sum(
        np.prod(tensor.shape)
        for name, tensor in opened(str(donors["a"])).tensors.items()
        if ".layers.0." in name
    )
    assert run("plan", written, "-o", recipe, "--parameters", "20K")[0] == 0
    code, out, _ = run("check", recipe, "--json")
    assert code == 0 and budget - block < json.loads(out)["parameters"] <= budget


@pytest.mark.parametrize(
    "options, message",
    [
        (("--parameters", "2K"), "at least"),
        (("--parameters", "20K", "--depth", 8), "either --depth or --parameters"),
        (("--parameters", "many"), "11B"),
        (("--verify", "sampled", "--verify", "other.txt"), "either 'sampled' or texts"),
    ],
)
def test_budgets_and_texts_that_cannot_be_are_refused(written, run, tmp_path, options, message):
    code, out, err = run("plan", written, "-o", tmp_path / "recipe.yaml", *options)
    assert code != 0 and out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_damping_on_a_text_is_kept_where_it_loses_less_and_moves_the_prediction(
    written, run, tmp_path, text
):
    options = ("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8, "--json")
    plain = json.loads(run(*options)[1])["plans"][0]
    code, out, _ = run(*options, "--damp", text)
    result = json.loads(out)
    (entry,), damage = result["plans"], result["damping"]["damage"]
    best = min(damage, key=damage.__getitem__)
    assert code == 0 and set(damage) == {"none", "1/n", "1/sqrt(n)", "norms"}
    assert entry["measured_damage"] == damage[best] and result["damping"]["kept"] == (
        None if best == "none" else best
    )
    assert entry["predicted_damage"] == pytest.approx(
        max(0, plain["predicted_damage"] + damage[best] - damage["none"])
    )
    code, out, _ = run("evaluate", tmp_path / "recipe.yaml", "--text", text, "--json")
    (check,) = json.loads(out)["predictions"]
    assert check["measured"] == pytest.approx(damage[best], abs=1e-5)
