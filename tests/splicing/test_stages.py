"""Stages: their order, what is checked before any merge, and which are merged again."""

import json
import shutil

import pytest
from conftest import write_donor

from frankenmerge.artefacts.recipe_file import parse_recipes
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.stages import in_order, resolve_stages
from frankenmerge.workflows import merging
from frankenmerge.workflows.merging import merge_stages, resolved


def recipes(text: str):
    return parse_recipes(text, "r.yaml")


def stage(name: str | None, *models: str) -> str:
    slices = ", ".join(
        f"{{sources: [{{model: {model}, layer_range: [0, 1]}}]}}" for model in models
    )
    return (f"name: {name}\n" if name else "") + f"merge_method: passthrough\nslices: [{slices}]\n"


def joined(*stages: str) -> str:
    return "---\n".join(stages)


def test_a_single_recipe_is_its_own_result_named_or_not():
    for name in ("x", None):
        assert [recipe.name for recipe in in_order(recipes(stage(name, "a")))] == [name]


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the folders into which a checkpoint was merged."""
    names: list[str] = []
    real = merging.merge

    def noted(splice, output, *rest, **more):
        names.append(output.name)
        return real(splice, output, *rest, **more)

    monkeypatch.setattr(merging, "merge", noted)
    return names


def test_stages_come_after_those_they_use_in_whatever_order_they_are_written():
    text = joined(
        stage("three", "two", "one"), stage(None, "three"), stage("two", "one"), stage("one", "a")
    )
    assert [recipe.name for recipe in in_order(recipes(text))] == ["one", "two", "three", None]


def test_the_last_stage_is_the_result_where_all_have_names():
    assert [
        recipe.name for recipe in in_order(recipes(joined(stage("one", "a"), stage("two", "one"))))
    ] == ["one", "two"]


@pytest.mark.parametrize(
    "stages, said",
    [
        ((stage("one", "two"), stage("two", "one"), stage(None, "one")), "one uses two"),
        ((stage("one", "one"), stage(None, "one")), "one uses one"),
        ((stage("one", "a"), stage("one", "b"), stage(None, "one")), "stage one"),
        ((stage(None, "a"), stage(None, "b")), "without a name"),
        ((stage("one", "a"), stage(None, "b")), "used by none"),
    ],
)
def test_stages_that_make_no_result_are_refused(stages, said):
    with pytest.raises(FrankenmergeError) as caught:
        in_order(recipes(joined(*stages)))
    assert said in str(caught.value) or said.replace("one uses two", "two uses one") in str(
        caught.value
    )


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_later_stages_are_validated_against_what_earlier_ones_will_be(donors, scratch):
    a, b = donors["a"], donors["b"]
    text = joined(stage("one", a, b, a), stage(None, "one").replace("[0, 1]", "[0, STOP]"))
    stages = resolve_stages(recipes(text.replace("STOP", "3")), scratch)
    assert [
        len([made for made in splice.operations if "q_proj" in made.name]) for splice in stages.all
    ] == [3, 3]
    shutil.rmtree(scratch)
    scratch.mkdir()
    with pytest.raises(FrankenmergeError) as caught:
        resolve_stages(recipes(text.replace("STOP", "4")), scratch)
    assert "[0, 3], the blocks of one" in str(caught.value)


def test_faults_of_all_stages_are_reported_together(donors, scratch):
    text = joined(
        stage("one", donors["a"]).replace("[0, 1]", "[0, 9]"),
        stage("two", donors["g"]).replace("passthrough", "nothing"),
        stage(None, "one", "two").replace("passthrough", "anything"),
    )
    with pytest.raises(FrankenmergeError) as caught:
        resolve_stages(recipes(text), scratch, place="r.yaml")
    found = [fault.place for fault in caught.value.faults]
    assert found == [
        "r.yaml: stage one: slices[0].sources[0].layer_range",
        "r.yaml: stage two: merge_method",
        "r.yaml: merge_method",
    ]


def test_a_stage_is_made_again_only_when_its_inputs_changed(donors, tmp_path, made):
    own = write_donor(tmp_path / "own", seed=11)
    text = joined(stage("one", donors["a"]), stage("two", own), stage(None, "one", "two"))
    output = tmp_path / "out"

    def run(changed: str = text) -> list[str]:
        shutil.rmtree(output, ignore_errors=True)
        made.clear()
        kept: list[str] = []
        with resolved(recipes(changed)) as stages:
            result = merge_stages(stages, output, unchanged=kept.append)
        assert result.output == output and sorted([*made, *kept]) == ["one", "out", "two"]
        return made

    assert run() == ["one", "two", "out"]
    provenance = json.loads((output / "frankenmerge.json").read_text())["tensors"]
    folders = {
        "0": output.with_name("out.stages") / "one",
        "1": output.with_name("out.stages") / "two",
    }
    for block, folder in folders.items():
        assert provenance[f"model.layers.{block}.mlp.up_proj.weight"]["donor"] == str(folder)
        assert (
            provenance[f"model.layers.{block}.mlp.up_proj.weight"]["tensor"]
            == "model.layers.0.mlp.up_proj.weight"
        )
    assert run() == ["out"]
    shutil.rmtree(own)
    write_donor(own, seed=12)
    assert run() == ["two", "out"]
    assert run(text.replace("[0, 1]", "[1, 2]", 1)) == ["one", "out"]
    (folders["1"] / "model.safetensors").write_bytes(b"")
    assert run(text.replace("[0, 1]", "[1, 2]", 1)) == ["two", "out"]


def test_the_command_line_merges_stages_and_reports_each(donors, tmp_path, run):
    path = tmp_path / "r.yaml"
    path.write_text(joined(stage("one", donors["a"], donors["b"]), stage(None, "one")))
    code, out, _ = run("check", path, "--json")
    summary = json.loads(out)
    assert (code, summary["depth"], summary["stages"]["one"]["depth"]) == (0, 1, 2)
    code, out, _ = run("check", path)
    assert code == 0 and "Result of stage one" in out and "KV cache per token" in out
    assert (
        run("merge", path, tmp_path / "out", "--dry-run")[0] == 0
        and not (tmp_path / "out").exists()
    )
    assert run("merge", path, tmp_path / "out")[0] == 0
    assert (tmp_path / "out.stages" / "one" / "config.json").is_file()
    assert run("check", path)[0] == 0


def test_the_figures_of_a_check(donors, tmp_path, run):
    path = tmp_path / "r.yaml"
    path.write_text(stage(None, donors["a"], donors["a"]) + "dtype: float16\n")
    code, out, _ = run("check", path, "--json")
    summary = json.loads(out)
    # Two blocks of width 16 with 24 inner, four heads and two for keys; 48 tokens, embedding and
    # head.
    parameters = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) + 2 * 48 * 16 + 16
    assert (code, summary["parameters"], summary["bytes"], summary["dtype"]) == (
        0,
        parameters,
        2 * parameters,
        "float16",
    )
    assert summary["memory"] == {"float16": 2 * parameters, "float32": 4 * parameters}
    assert summary["kv_cache_per_token"] == 2 * 2 * 2 * 4 * 2
    assert summary["computed"] == summary["tensors"] == 2 * 9 + 3


def test_a_stage_is_made_again_when_the_text_of_its_gauge_changed_under_its_path(
    donors, tmp_path, made
):
    text = tmp_path / "fit.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    rotated = f"""\
name: rotated
merge_method: passthrough
slices:
  - sources: [{{model: {donors["a"]}, layer_range: [0, 2]}}]
  - sources: [{{model: {donors["a"]}, layer_range: [2, 4]}}]
    gauge: {{to: previous, fit: {text}}}
"""
    last = (
        "merge_method: passthrough\nslices: [{sources: [{model: rotated, layer_range: [0, 4]}]}]\n"
    )

    def run() -> list[str]:
        made.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with resolved(recipes(f"{rotated}---\n{last}")) as stages:
            merge_stages(stages, tmp_path / "out")
        return list(made)

    assert run() == ["rotated", "out"]
    assert run() == ["out"]
    text.write_text("an entirely other text about a cat that sat on a mat " * 40)
    assert run() == ["rotated", "out"]
