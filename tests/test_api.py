"""The functions of `import frankenmerge`: the same stages as the command line's."""

import json
import subprocess
import sys

import numpy as np
import pytest

import frankenmerge as fm
from frankenmerge.errors import FrankenmergeError

TEXT = "a quick brown fox jumps over the lazy dog " * 20


@pytest.fixture
def best(donors):
    return fm.plan(fm.align(donors["a"], donors["b"]), 6).plans[0]


def test_align_takes_donors_and_atlases_alike(donors):
    atlas = fm.analyze(donors["a"])
    mixed, whole = fm.align(atlas, donors["b"]), fm.align(donors["a"], str(donors["b"]))
    assert mixed.scores.keys() == whole.scores.keys()
    assert all(
        np.array_equal(mixed.scores[name].matrix, whole.scores[name].matrix)
        for name in mixed.scores
    )


def test_a_plan_is_merged_and_evaluated_as_on_the_command_line(donors, best, run, tmp_path):
    from safetensors.numpy import load_file

    (tmp_path / "recipe.yaml").write_text(best.recipe.dump())
    (tmp_path / "text.txt").write_text(TEXT)
    made = fm.merge(best.recipe, tmp_path / "ours")
    assert run("merge", tmp_path / "recipe.yaml", tmp_path / "theirs")[0] == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert made.tensors == len(ours) and ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    virtual, *own = fm.evaluate(best.recipe, texts={"text": TEXT}).results
    merged, *_ = fm.evaluate(tmp_path / "ours", texts=[tmp_path / "text.txt"]).results
    code, out, _ = run(
        "evaluate", tmp_path / "recipe.yaml", "--text", tmp_path / "text.txt", "--json"
    )
    losses = {model["name"]: model["nats_per_token"] for model in json.loads(out)["models"]}
    assert code == 0 and losses[str(tmp_path / "recipe.yaml")] == pytest.approx(
        virtual.total.nats_per_token, abs=1e-6
    )
    assert merged.total.nats_per_token == pytest.approx(virtual.total.nats_per_token, abs=1e-6)
    assert [result.role for result in own] == ["donor", "donor"]
    assert all(
        losses[result.name] == pytest.approx(result.total.nats_per_token, abs=1e-6) for result in own
    )


def test_a_recipe_may_be_its_file(best, tmp_path):
    (tmp_path / "recipe.yaml").write_text(best.recipe.dump())
    from_file, *_ = fm.evaluate(tmp_path / "recipe.yaml", texts={"text": TEXT}).results
    from_value, *_ = fm.evaluate(best.recipe, texts={"text": TEXT}).results
    assert np.array_equal(from_file.total.nats, from_value.total.nats)


def test_mistakes_are_raised(tmp_path):
    with pytest.raises(FrankenmergeError, match="neither"):
        fm.analyze(tmp_path / "nowhere")


def test_the_package_offers_its_functions():
    assert {"analyze", "align", "plan", "merge", "evaluate"} <= set(dir(fm))
    with pytest.raises(AttributeError, match="analyze"):
        _ = fm.analyse


def test_everything_offered_is_there():
    assert all(callable(getattr(fm, name)) for name in fm._OFFERED)


def test_importing_it_imports_nothing_heavy():
    code = "import sys; from frankenmerge.splicing import diagram; print({'torch', 'numpy', 'transformers', 'click'} & sys.modules.keys())"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
