"""Files of recipes: several stages, and where their donors are looked for."""

import numpy as np
import pytest
import yaml
from conftest import write_donor
from recipe_texts import GOOD, refused
from safetensors.numpy import load_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import (
    load_recipe,
    load_recipes,
    parse_recipes,
)
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors

STAGED = """\
name: one
merge_method: linear
models: [{model: a}, {model: b}]
---
merge_method: passthrough
models: [{model: one}]
"""


def test_stages_are_documents_or_a_list():
    documents = parse_recipes(STAGED, "r.yaml")
    assert [recipe.name for recipe in documents] == ["one", None]
    assert parse_recipes(yaml.safe_dump(list(yaml.safe_load_all(STAGED))), "r.yaml") == documents
    assert parse_recipes(STAGED + "---\n", "r.yaml") == documents


def test_faults_of_all_stages_are_reported_together():
    with pytest.raises(FrankenmergeError) as caught:
        parse_recipes(
            STAGED.replace("linear", "3").replace("models: [{model: one", "model: [{model: one"),
            "r.yaml",
        )
    assert [fault.place for fault in caught.value.faults] == [
        "r.yaml: stage 1: merge_method",
        "r.yaml: stage 2",
        "r.yaml: stage 2: model",
    ]


def test_stages_where_one_recipe_is_wanted_are_refused():
    assert "2 stages" in refused(STAGED)[0].found


def test_a_stage_s_name_is_no_path(folders):
    (folders / "recipes" / "one").mkdir()
    (folders / "recipes" / "r.yaml").write_text(STAGED.replace("model: a", "model: first"))
    stages = load_recipes(folders / "recipes" / "r.yaml")
    assert stages[0].donors == [str(folders / "recipes" / "first"), "b"] and stages[1].donors == [
        "one"
    ]


def test_every_name_of_a_recipe_is_looked_for_next_to_it(folders):
    text = """\
models: [{model: first}]
merge_method: linear
base_model: first
embedding: first
final_norm: first@main
head: first+org/second
tokenizer:
  source: first
  tokens:
    first: {source: first}
    b: {source: {kind: model_token, model: first, token: first}}
"""
    (folders / "recipes" / "r.yaml").write_text(text)
    first, second = str(folders / "recipes" / "first"), str(folders / "recipes" / "org" / "second")
    data = load_recipe(folders / "recipes" / "r.yaml").model_dump(exclude_none=True)
    assert (
        data["models"][0]["model"]
        == data["base_model"]
        == data["embedding"]
        == data["tokenizer"]["source"]
        == first
    )
    assert (data["final_norm"], data["head"]) == (f"{first}@main", f"{first}+{second}")
    tokens = data["tokenizer"]["tokens"]
    assert (
        tokens["first"]["source"] == tokens["b"]["source"]["model"] == first
        and tokens["b"]["source"]["token"] == "first"
    )


def test_a_folder_of_several_spellings_has_the_first_of_them(folders, tmp_path):
    folder = folders / "recipes" / "first"
    (tmp_path / "link").symlink_to(folder)
    text = f"""\
models: [{{model: {folder}/}}, {{model: ./org/second}}, {{model: {tmp_path / "link"}}}]
merge_method: ties
base_model: {folder}
embedding: first@main
final_norm: ./first+org/second/
"""
    (folders / "recipes" / "r.yaml").write_text(text)
    recipe = load_recipe(folders / "recipes" / "r.yaml")
    first, second = f"{folder}/", str(folders / "recipes" / "org" / "second")
    assert [whole.model for whole in recipe.stack.models or []] == [first, second, first]
    assert recipe.base == first and recipe.embedding == f"{first}@main"
    assert recipe.final_norm == f"{first}+{second}"


def test_a_base_of_another_spelling_than_the_source_is_the_same_donor(
    donors, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(donors["a"].parent)
    text = """\
slices:
- sources:
  - {{model: {base}, layer_range: [0, 4]}}
  - {{model: {other}, layer_range: [0, 4]}}
merge_method: task_arithmetic
base_model: {donor}
parameters: {{weight: 0.5}}
"""
    twin = write_donor(tmp_path / "twin", seed=11)
    for name, names in {
        "plain": {"base": "a", "other": twin, "donor": "a"},
        "mixed": {"base": "./a/", "other": twin, "donor": donors["a"]},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(**names))
        assert run("merge", tmp_path / f"{name}.yaml", tmp_path / name)[0] == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "mixed")]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0].keys() == weights[1].keys()
    name = "model.norm.weight"
    base, other = (load_file(donor / "model.safetensors")[name] for donor in (donors["a"], twin))
    assert np.allclose(weights[1][name], base + 0.5 * (other - base), atol=1e-6)


# Files and donors


def test_a_recipe_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FrankenmergeError) as caught:
        load_recipe(tmp_path / "none.yaml")
    assert caught.value.faults[0].place == str(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"\x80"])
def test_a_recipe_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(FrankenmergeError):
        load_recipe(tmp_path / "r.yaml")


def test_a_folder_in_place_of_a_recipe_is_refused(tmp_path):
    with pytest.raises(FrankenmergeError):
        load_recipe(tmp_path)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A recipe with donors next to it, in a folder that is not the working directory."""
    (tmp_path / "recipes" / "first").mkdir(parents=True)
    (tmp_path / "recipes" / "org" / "second").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_relative_donors_are_found_next_to_the_recipe(folders):
    recipe = load_recipe(folders / "recipes" / "r.yaml")
    second = str(folders / "recipes" / "org" / "second")
    assert recipe.donors == [str(folders / "recipes" / "first"), second]
    assert (recipe.base, recipe.tokenizer_donor) == (second, second)


def test_relative_donors_are_looked_for_in_the_working_directory_first(folders):
    (folders / "work" / "first").mkdir()
    assert load_recipe(folders / "recipes" / "r.yaml").donors == [
        "first",
        str(folders / "recipes" / "org" / "second"),
    ]


def test_donors_that_lie_nowhere_keep_their_names(folders):
    (folders / "recipes" / "org" / "second").rmdir()
    recipe = load_recipe(folders / "recipes" / "r.yaml")
    assert (recipe.donors[1], recipe.tokenizer_source) == ("org/second", "base")


def test_donors_that_cannot_be_opened_are_reported_together(donors, tmp_path):
    recipe = recipe_of(
        [Block(str(tmp_path / "x"), 0), Block(str(donors["a"]), 0), Block(str(tmp_path / "y"), 0)]
    )
    with pytest.raises(FrankenmergeError) as caught:
        open_donors(recipe)
    assert [fault.place for fault in caught.value.faults] == [
        str(tmp_path / "x"),
        str(tmp_path / "y"),
    ]


def test_donors_are_opened_under_the_names_the_recipe_gives_them(donors):
    recipe = recipe_of([Block(str(donors["a"]), 0), Block(str(donors["b"]), 0)])
    assert {name: donor.path for name, donor in open_donors(recipe).items()} == {
        str(donors[name]): donors[name] for name in "ab"
    }
