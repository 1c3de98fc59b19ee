"""Plans that are calibrated, verified and damped: the API and the command line give the same."""

import json

import pytest

import frankenmerge as fm
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.planning.search import Constraints

TEXT = "the quick brown fox jumps over the lazy dog and The Cat sat on a mat " * 3


@pytest.fixture
def alignment(donors, tmp_path, run):
    path = tmp_path / "ad.alignment.safetensors"
    assert run("align", donors["a"], donors["deep"], "-o", path)[0] == 0
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("on", [pytest.param("sampled", marks=pytest.mark.slow), "text"])
@pytest.mark.parametrize("steps", [("calibrate",), ("verify",), ("damp",), ("calibrate", "damp")])
def test_the_api_writes_what_the_command_line_writes(alignment, text, run, tmp_path, on, steps):
    value = text if on == "text" else "sampled"
    options = [part for step in steps for part in (f"--{step}", value)]
    theirs, ours = tmp_path / "theirs" / "recipe.yaml", tmp_path / "ours" / "recipe.yaml"
    code, out, err = run("plan", alignment, "-o", theirs, "--depth", 8, "--top", 3, *options)
    assert code == 0, err
    chosen = dict.fromkeys(steps, [text] if on == "text" else "sampled")
    planned = fm.plan(fm.load_alignment(alignment), 8, top=3, **chosen)
    paths = fm.write_plans(planned, ours)
    assert [path.name for path in paths] == ["recipe.yaml", "recipe.2.yaml", "recipe.3.yaml"]
    assert sorted(path.name for path in ours.parent.iterdir()) == sorted(
        path.name for path in theirs.parent.iterdir()
    )
    for path in ours.parent.iterdir():
        assert path.read_bytes() == (theirs.parent / path.name).read_bytes(), path.name
    for path, plan in zip(paths, planned.plans, strict=True):
        assert load_recipe(path) == plan.recipe
    assert (planned.damped is not None) == ("damp" in steps)
    evidence = json.loads((ours.parent / "recipe.evidence.json").read_text())
    origin = evidence["model"]["origin"]
    assert origin.get("texts") != [str(value)] or "calibrate" in steps
    assert len({plan["key"] for plan in evidence["plans"]}) == 3


def test_texts_may_be_given_by_name(alignment, text):
    loaded = fm.load_alignment(alignment)
    from_file = fm.plan(loaded, Constraints(8), top=2, verify=[text])
    by_name = fm.plan(loaded, Constraints(8), top=2, verify={"any": TEXT})
    assert from_file.plans == by_name.plans
    assert all(plan.measured is not None for plan in from_file.plans)


def test_a_plan_is_measured_as_evaluate_measures_it(alignment, text):
    (plan,) = fm.plan(fm.load_alignment(alignment), 8, verify=[text]).plans
    evaluated = fm.evaluate(plan.recipe, texts=[text])
    losses = {result.name: result.total.nats_per_token for result in evaluated.results}
    blocks = plan.recipe.blocks
    own = sum(losses[block.model] for block in blocks) / len(blocks)
    assert plan.measured == pytest.approx(evaluated.results[0].total.nats_per_token - own, abs=1e-5)


def test_without_measurements_nothing_is_opened(alignment, monkeypatch):
    def opened(*_arguments, **_options):
        raise AssertionError("a donor was opened")

    monkeypatch.setattr("frankenmerge.workflows.planning.open_donor", opened)
    monkeypatch.setattr("frankenmerge.workflows.measuring.open_donor", opened)
    assert len(fm.plan(fm.load_alignment(alignment), 8, top=3).plans) == 3
