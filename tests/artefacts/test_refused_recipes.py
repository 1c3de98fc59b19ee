"""Recipes that are refused with all that is wrong; any document is a recipe or refused."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD, one_slice, places, refused

from frankenmerge.artefacts.recipe_file import (
    parse_recipe,
    parse_recipes,
)
from frankenmerge.errors import FrankenmergeError


def test_unknown_keys_of_every_level_are_reported_together_with_their_paths():
    text = """\
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
        wieght: 1
    name: first
  - sources:
      - model: b
        layer_range: [1, 4]
        layer_ranges: [1, 4]
merge_method: passthrough
merge_methods: linear
speed: 3
"""
    found = refused(text)
    assert {fault.place for fault in found} == {
        "r.yaml: slices[0].sources[0].wieght",
        "r.yaml: slices[0].name",
        "r.yaml: slices[1].sources[0].layer_ranges",
        "r.yaml: merge_methods",
        "r.yaml: speed",
    }
    expected = {
        fault.place.rpartition(".")[2].rpartition(" ")[2]: fault.expected for fault in found
    }
    assert (
        expected["wieght"]
        == expected["layer_ranges"]
        == "one of: model, layer_range, filter, parameters"
    )
    assert expected["name"] == "one of: sources, base_model, parameters, gauge"
    assert expected["speed"].startswith("one of: name, slices, models, modules, merge_method")
    remedies = {fault.place.rpartition(".")[2].rpartition(" ")[2]: fault.remedy for fault in found}
    assert (remedies["merge_methods"], remedies["layer_ranges"]) == (
        "write merge_method",
        "write layer_range",
    )


def test_a_misplaced_key_is_refused_with_the_keys_of_its_own_level():
    (fault,) = refused(one_slice("[0, 1]") + "sources: []\n")
    assert fault.place == "r.yaml: sources" and "slices" in fault.expected


def test_unknown_keys_and_wrong_values_are_reported_together():
    text = (
        GOOD.replace("[0, 3]", "[3, 0]")
        .replace("passthrough", "[slerp]")
        .replace("dtype:", "dtyp:")
    )
    text += "models: [{model: a}]\n"
    assert places(text) == {
        "r.yaml: slices[0].sources[0].layer_range",
        "r.yaml: merge_method",
        "r.yaml: dtyp",
        "r.yaml",
    }


@pytest.mark.parametrize(
    "layer_range",
    [
        "[3, 0]",
        "[2, 2]",
        "[-1, 2]",
        "[-3, -1]",
        "[0]",
        "[0, 1, 2]",
        "[]",
        "3",
        "'[0, 1]'",
        "[0.0, 2.0]",
        "[0, 1.5]",
        "['0', '1']",
        "[true, 2]",
        "[null, 2]",
        "null",
        "{a: 1}",
    ],
)
def test_a_range_that_is_none_is_refused(layer_range):
    assert all(
        place.startswith("r.yaml: slices[0].sources[0].layer_range")
        for place in places(one_slice(layer_range))
    )


def test_a_missing_range_is_reported():
    (fault,) = refused("merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n")
    assert (fault.place, fault.found) == ("r.yaml: slices[0].sources[0].layer_range", "nothing")


@pytest.mark.parametrize("missing", ["slices", "merge_method"])
def test_a_missing_part_is_reported(missing):
    text = {
        "slices": "merge_method: passthrough\n",
        "merge_method": one_slice("[0, 1]").partition("\n")[2],
    }[missing]
    (fault,) = refused(text)
    wanted = {
        "slices": ("r.yaml", "none of them"),
        "merge_method": ("r.yaml: merge_method", "nothing"),
    }
    assert (fault.place, fault.found) == wanted[missing]


@pytest.mark.parametrize(
    "slices",
    ["[]", "null", "3", "{}", "[null]", "[{}]", "[{sources: []}]", "[{sources: null}]", "[3]"],
)
def test_slices_that_hold_no_block_are_refused(slices):
    found = places(f"merge_method: passthrough\nslices: {slices}\n")
    assert all(place.startswith("r.yaml: slices") for place in found) or (
        slices == "null" and found == {"r.yaml"}
    )


@pytest.mark.parametrize("model", ["''", "3", "null", "[a]", "true"])
def test_a_model_that_is_no_name_is_refused(model):
    assert places(one_slice("[0, 1]", model)) == {"r.yaml: slices[0].sources[0].model"}


@pytest.mark.parametrize("method", ["''", "null", "[passthrough]", "3"])
def test_a_merge_method_that_is_no_name_is_refused(method):
    (fault,) = refused(GOOD.replace("passthrough", method))
    assert fault.place == "r.yaml: merge_method"


@pytest.mark.parametrize("dtype", ["int8", "bf16", "3", "[float16]"])
def test_a_dtype_of_no_known_name_is_refused(dtype):
    assert places(GOOD.replace("bfloat16", dtype)) == {"r.yaml: dtype"}


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "dtype: float16\n",
        GOOD.replace("layer_range: [0, 3]", "layer_range: [0, 3]\n        model: first"),
        GOOD.replace("merge_method", "slices: []\nmerge_method"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(text):
    (fault,) = refused(text)
    assert "occurs twice" in fault.found and "line" in fault.found


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!mine x",
        "!!python/tuple [1]",
    ],
)
def test_an_unsafe_tag_is_refused(tag):
    (fault,) = refused(GOOD + f"x: {tag}\n")
    assert fault.expected == "YAML"


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\t- x",
        "*nowhere",
        "a: 2024-13-45",
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "? [a]\n: b",
        "[" * 5000,
        "a: \0",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_yaml_is_refused(text):
    refused(text)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "7", "null"])
def test_yaml_that_is_no_mapping_is_refused(text):
    assert places(text) == {"r.yaml"}


def test_keys_that_are_no_words_are_refused():
    assert len(refused(GOOD + "7: x\nnull: y\n")) == 2


KEYS = st.sampled_from(
    "slices sources model layer_range merge_method models modules parameters "
    "weight t filter value base_model dtype out_dtype "
    "tokenizer tokenizer_source source tokens kind force pad_to_multiple_of "
    "chat_template embedding head seed name lora path x".split()
)
WORDS = st.sampled_from(
    [
        "passthrough",
        "linear",
        "slerp",
        "union",
        "base",
        "zero",
        "model_token",
        "float16",
        "a@b+c",
        "1e-3",
        ".nan",
        "*",
    ]
)
documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | WORDS
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=3) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)
SETTINGS = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({}, optional={"filter": inner, "value": inner, "x": inner})
    ),
    max_leaves=8,
)


def is_a_recipe_or_refused(text: str) -> None:
    try:
        recipes = parse_recipes(text, "r.yaml")
    except FrankenmergeError as error:
        assert error.faults and all(
            all(isinstance(part, str) and part.strip() for part in fault) for fault in error.faults
        )
    else:
        for recipe in recipes:
            assert recipe.donors and str(recipe)
            assert parse_recipe(recipe.dump(), "again") == recipe


@given(documents)
@settings(max_examples=300, deadline=None)
def test_any_document_is_a_recipe_or_refused(value):
    is_a_recipe_or_refused(yaml.safe_dump(value))


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_refused(text):
    is_a_recipe_or_refused(text)


@given(
    st.dictionaries(st.sampled_from(["weight", "t", "x"]), SETTINGS, max_size=2),
    st.lists(st.tuples(KEYS, documents), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_sound_recipe_is_a_recipe_or_refused(parameters, changes):
    data = yaml.safe_load(GOOD) | {"parameters": parameters}
    data["slices"][0]["sources"][0]["parameters"] = parameters
    is_a_recipe_or_refused(yaml.safe_dump(data | dict(changes)))
