"""Recipes: what they say, read and written."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD, one_slice, places, refused, sound

from frankenmerge.artefacts.recipe import Block, Seam, recipe_of
from frankenmerge.artefacts.recipe_file import (
    parse_recipe,
)
from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.errors import FrankenmergeError


def test_a_recipe_says_its_blocks_in_order():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert recipe.blocks == [
        Block("first", 0),
        Block("first", 1),
        Block("first", 2),
        *(Block("org/second", index) for index in (1, 2, 3)),
    ]


def test_a_recipe_says_its_seam():
    assert parse_recipe(GOOD, "r.yaml").seams == [Seam(Block("first", 2), Block("org/second", 1))]


def test_slices_that_continue_each_other_have_no_seam():
    assert recipe_of([Block("a", 0), Block("a", 1)]).seams == []
    text = one_slice("[0, 2]") + "  - sources:\n      - model: a\n        layer_range: [2, 4]\n"
    assert parse_recipe(text, "r.yaml").seams == []


@pytest.mark.parametrize(
    "blocks, seams",
    [([0, 0], 1), ([0, 2], 1), ([1, 0], 1), ([0, 1, 0, 1], 1), ([0, 1, 1, 1, 2], 2)],
)
def test_a_repeat_a_jump_and_a_step_back_are_seams(blocks, seams):
    assert len(recipe_of([Block("a", index) for index in blocks]).seams) == seams


def test_a_recipe_is_printed_in_one_line():
    assert str(parse_recipe(GOOD, "r.yaml")) == "first[0:3] second[1:4]"


def test_base_and_tokenizer_are_the_first_donors_when_not_named():
    recipe = parse_recipe(one_slice("[0, 1]", "x/a"), "r.yaml")
    assert (recipe.base, recipe.tokenizer_donor, recipe.donors) == ("x/a", "x/a", ["x/a"])


def test_base_and_tokenizer_are_those_named():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert (recipe.base, recipe.tokenizer_donor) == ("org/second", "org/second")
    other = parse_recipe(
        GOOD.replace("tokenizer_source: base", "tokenizer_source: third"), "r.yaml"
    )
    assert (other.base, other.tokenizer_donor, other.donors) == (
        "org/second",
        "third",
        ["first", "org/second", "third"],
    )


@pytest.mark.parametrize(
    "text",
    [GOOD, one_slice("[0, 1]"), one_slice("[5, 40]", '"öß: #x"'), one_slice("[0, 1]", '"123"')],
)
def test_a_recipe_survives_writing_and_reading(text):
    recipe = parse_recipe(text, "r.yaml")
    assert parse_recipe(recipe.dump(), "again") == recipe


def test_a_recipe_is_written_in_its_own_order_without_what_was_not_said():
    dumped = parse_recipe(one_slice("[0, 2]"), "r.yaml").dump()
    assert dumped.startswith(
        "slices:\n- sources:\n  - model: a\n    layer_range:\n"
    ) and dumped.endswith("merge_method: passthrough\n")
    assert "null" not in dumped


def test_anchors_and_merged_mappings_are_read():
    text = """\
merge_method: passthrough
slices:
  - sources: [&part {model: a, layer_range: [0, 2]}]
  - sources: [{<<: *part, layer_range: [1, 3]}]
"""
    assert str(parse_recipe(text, "r.yaml")) == "a[0:2] a[1:3]"


@pytest.mark.parametrize("merge", ["[{}]", "{{<<: [{}]}}"])
def test_merge_keys_that_multiply_are_refused_before_they_are_written_out(merge):
    """Twelve levels that would be 10^12 keys."""
    letters = "abcdefghijklm"
    levels = [
        f"{one}: &{one} {{<<: {merge.format(', '.join([f'*{before}'] * 10))}, {one}: 1}}"
        for before, one in itertools.pairwise(letters)
    ]
    (fault,) = refused("\n".join(["a: &a {a: 1}", *levels]))
    assert "more than 1,000,000 keys" in fault.found


def test_a_type_may_be_named_as_torch_does():
    assert parse_recipe(GOOD.replace("bfloat16", "torch.bfloat16"), "r.yaml") == parse_recipe(
        GOOD, "r.yaml"
    )


block_lists = st.lists(
    st.builds(Block, st.sampled_from(["a", "b", "org/c"]), st.integers(0, 5)),
    min_size=1,
    max_size=24,
)


@given(block_lists)
@settings(max_examples=200, deadline=None)
def test_the_recipe_of_blocks_yields_these_blocks(blocks):
    assert recipe_of(blocks).blocks == blocks


@given(block_lists)
@settings(max_examples=100, deadline=None)
def test_the_recipe_of_blocks_has_no_more_slices_than_seams_need(blocks):
    recipe = recipe_of(blocks)
    assert len(recipe.slices) == 1 + len(recipe.seams)
    assert sum(
        after != (before[0], before[1] + 1) for before, after in itertools.pairwise(blocks)
    ) == len(recipe.seams)


@given(block_lists)
@settings(max_examples=50, deadline=None)
def test_the_recipe_of_blocks_survives_writing_and_reading(blocks):
    recipe = recipe_of(blocks, base_model="b", dtype="float16")
    assert parse_recipe(recipe.dump(), "again") == recipe


# The rest of the schema


@pytest.mark.parametrize(
    "body",
    [
        "models: [{model: a, parameters: {weight: 1}}, {model: b}]",
        "modules: {default: {models: [{model: a}, {model: b}], parameters: {weight: 1}}}",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, "
        "layer_range: [2, 4]}], base_model: b, parameters: {t: 0}}]",
        "modules: {default: {slices: [{sources: [{model: a, layer_range: [0, "
        "2]}, {model: b, layer_range: [2, 4]}]}]}}",
    ],
)
def test_slices_models_and_modules_name_their_donors(body):
    recipe = sound(f"merge_method: linear\n{body}\n")
    assert [source.model for source in recipe.sources] == ["a", "b"] == recipe.donors
    assert parse_recipe(recipe.dump(), "again") == recipe


@pytest.mark.parametrize(
    "body",
    [
        "models: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
        "models: [{model: a}]\nmodules: {x: {models: [{model: a}]}}",
        "models: []",
        "modules: {}",
        "modules: {x: {}}",
        "modules: {x: {models: [{model: a}], slices: [{sources: [{model: a, "
        "layer_range: [0, 2]}]}]}}",
        "modules: {x: {models: [{model: a}]}, y: {models: [{model: a}]}}",
        "models: [{model: a, layer_range: [0, 2]}]",
        "models: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: union}",
        "models: [{model: a}]\nseed: -1",
        "models: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}",
        "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: one, model: a}}}}",
        "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
        "models: [{model: a}]\n"
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, "
        "token: b, token_id: 3}}}}",
    ],
)
def test_what_contradicts_itself_is_refused(body):
    refused(f"merge_method: linear\n{body}\n")


def test_sources_of_other_lengths_are_refused():
    text = (
        "merge_method: linear\n"
        "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, "
        "layer_range: [0, 3]}]}]\n"
    )
    (fault,) = refused(text)
    assert fault.place == "r.yaml: slices[0]" and "2 and 3 blocks" in fault.expected


@pytest.mark.parametrize("level", ["", "slices[0].", "slices[0].sources[0]."])
@pytest.mark.parametrize(
    "value",
    [
        ".nan",
        ".inf",
        "-.inf",
        "word",
        "null",
        "[]",
        "[1, .nan]",
        "[1, true]",
        "{filter: a}",
        "[{filter: a}]",
        "[{value: .inf}]",
        "{}",
        "[{filter: '', value: 1}]",
        "[{filter: 3, value: 1}]",
        "[{value: 1, filtre: a}]",
        "[1, {value: 1}]",
        "[{value: 1}, {filter: a, value: 2}]",
        "[{value: [{value: 1}]}]",
        "[[1]]",
        "1" + "0" * 400,
    ],
)
def test_a_parameter_that_is_no_value_is_refused(level, value):
    data = yaml.safe_load(GOOD)
    holder = {
        "": data,
        "slices[0].": data["slices"][0],
        "slices[0].sources[0].": data["slices"][0]["sources"][0],
    }[level]
    holder["parameters"] = {"scale": yaml.safe_load(value), "other": 1}
    assert places(yaml.safe_dump(data)) == {f"r.yaml: {level}parameters.scale"}


@pytest.mark.parametrize(
    "name, parts",
    [
        ("a/b", ("a/b", None, None)),
        ("a/b@main", ("a/b", "main", None)),
        ("a+l", ("a", None, "l")),
        ("a/b@v1+c/l@v2", ("a/b", "v1", "c/l@v2")),
    ],
)
def test_a_reference_is_path_revision_and_adapter(name, parts):
    assert reference(name) == parts


@pytest.mark.parametrize("name", ["a@b@c", "a+b+c", "+b", "a+", "a@", "@b"])
def test_what_is_no_reference_is_refused(name):
    with pytest.raises(FrankenmergeError):
        reference(name)


def test_a_folder_of_that_very_name_is_a_folder(tmp_path):
    (tmp_path / "c++@x").mkdir()
    assert reference(str(tmp_path / "c++@x")) == (str(tmp_path / "c++@x"), None, None)


def test_a_reference_written_out_is_the_same():
    written = "{model: {path: a/b, revision: v1}, lora: {path: c/l}}"
    assert sound(
        f"merge_method: linear\nmodels: [{{model: {written}}}]\n"
        f"base_model: {{model: {{path: d}}}}\n"
    ).donors == [
        "a/b@v1+c/l",
        "d",
    ]
