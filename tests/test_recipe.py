"""Recipes: read, written, refused with everything that is wrong at once."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmerge.errors import FrankenmergeError
from frankenmerge.recipe import Block, Seam, load_recipe, open_donors, parse_recipe, recipe_of

GOOD = """\
slices:
  - sources:
      - model: first
        layer_range: [0, 3]
  - sources:
      - model: org/second
        layer_range: [1, 4]
merge_method: passthrough
base_model: org/second
dtype: bfloat16
tokenizer_source: base
"""


def refused(text: str) -> tuple:
    with pytest.raises(FrankenmergeError) as caught:
        parse_recipe(text, "r.yaml")
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
        assert fault.place.startswith("r.yaml")
    return caught.value.faults


def places(text: str) -> set[str]:
    return {fault.place for fault in refused(text)}


def one_slice(layer_range: str, model: str = "a") -> str:
    return f"merge_method: passthrough\nslices:\n  - sources:\n      - model: {model}\n        layer_range: {layer_range}\n"


# What a recipe says


def test_a_recipe_says_its_blocks_in_order():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert recipe.blocks == [Block("first", 0), Block("first", 1), Block("first", 2), *(Block("org/second", index) for index in (1, 2, 3))]


def test_a_recipe_says_its_seam():
    assert parse_recipe(GOOD, "r.yaml").seams == [Seam(Block("first", 2), Block("org/second", 1))]


def test_slices_that_continue_each_other_have_no_seam():
    assert recipe_of([Block("a", 0), Block("a", 1)]).seams == []
    text = one_slice("[0, 2]") + "  - sources:\n      - model: a\n        layer_range: [2, 4]\n"
    assert parse_recipe(text, "r.yaml").seams == []


@pytest.mark.parametrize("blocks, seams", [([0, 0], 1), ([0, 2], 1), ([1, 0], 1), ([0, 1, 0, 1], 1), ([0, 1, 1, 1, 2], 2)])
def test_a_repeat_a_jump_and_a_step_back_are_seams(blocks, seams):
    assert len(recipe_of([Block("a", index) for index in blocks]).seams) == seams


def test_a_recipe_is_told_in_one_line():
    assert str(parse_recipe(GOOD, "r.yaml")) == "first[0:3] second[1:4]"


def test_base_and_tokenizer_are_the_first_donors_when_not_named():
    recipe = parse_recipe(one_slice("[0, 1]", "x/a"), "r.yaml")
    assert (recipe.base, recipe.tokenizer, recipe.donors) == ("x/a", "x/a", ["x/a"])


def test_base_and_tokenizer_are_those_named():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert (recipe.base, recipe.tokenizer) == ("org/second", "org/second")
    other = parse_recipe(GOOD.replace("tokenizer_source: base", "tokenizer_source: third"), "r.yaml")
    assert (other.base, other.tokenizer, other.donors) == ("org/second", "third", ["first", "org/second", "third"])


@pytest.mark.parametrize("text", [GOOD, one_slice("[0, 1]"), one_slice("[5, 40]", '"öß: #x"'), one_slice("[0, 1]", '"123"')])
def test_a_recipe_survives_writing_and_reading(text):
    recipe = parse_recipe(text, "r.yaml")
    assert parse_recipe(recipe.dump(), "again") == recipe


def test_a_recipe_is_written_in_its_own_order_without_what_was_not_said():
    dumped = parse_recipe(one_slice("[0, 2]"), "r.yaml").dump()
    assert dumped.startswith("slices:\n- sources:\n  - model: a\n    layer_range:\n") and dumped.endswith("merge_method: passthrough\n")
    assert "null" not in dumped


def test_anchors_and_merged_mappings_are_read():
    text = """\
merge_method: passthrough
slices:
  - sources: [&part {model: a, layer_range: [0, 2]}]
  - sources: [{<<: *part, layer_range: [1, 3]}]
"""
    assert str(parse_recipe(text, "r.yaml")) == "a[0:2] a[1:3]"


block_lists = st.lists(st.builds(Block, st.sampled_from(["a", "b", "org/c"]), st.integers(0, 5)), min_size=1, max_size=24)


@given(block_lists)
@settings(max_examples=200, deadline=None)
def test_the_recipe_of_blocks_yields_these_blocks(blocks):
    assert recipe_of(blocks).blocks == blocks


@given(block_lists)
@settings(max_examples=100, deadline=None)
def test_the_recipe_of_blocks_has_no_more_slices_than_seams_need(blocks):
    recipe = recipe_of(blocks)
    assert len(recipe.slices) == 1 + len(recipe.seams)
    assert sum(after != (before[0], before[1] + 1) for before, after in itertools.pairwise(blocks)) == len(recipe.seams)


@given(block_lists)
@settings(max_examples=50, deadline=None)
def test_the_recipe_of_blocks_survives_writing_and_reading(blocks):
    recipe = recipe_of(blocks, base_model="b", dtype="float16")
    assert parse_recipe(recipe.dump(), "again") == recipe


# What is refused


def test_unknown_keys_of_every_level_are_told_together_with_their_paths():
    text = """\
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
        weight: 1
    name: first
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters: {scale: 2}
merge_method: passthrough
merge_methods: linear
speed: 3
"""
    found = refused(text)
    assert {fault.place for fault in found} == {
        "r.yaml: slices[0].sources[0].weight",
        "r.yaml: slices[0].name",
        "r.yaml: slices[1].sources[0].parameters",
        "r.yaml: merge_methods",
        "r.yaml: speed",
    }
    expected = {fault.place.rpartition(".")[2].rpartition(" ")[2]: fault.expected for fault in found}
    assert expected["weight"] == expected["parameters"] == "one of: model, layer_range"
    assert expected["name"] == "one of: sources, gauge"
    assert expected["speed"].startswith("one of: slices, merge_method")


def test_a_misplaced_key_is_told_the_keys_of_its_own_level():
    (fault,) = refused(one_slice("[0, 1]") + "sources: []\n")
    assert fault.place == "r.yaml: sources" and "slices" in fault.expected


def test_unknown_keys_and_wrong_values_are_told_together():
    text = GOOD.replace("[0, 3]", "[3, 0]").replace("passthrough", "slerp").replace("dtype:", "dtyp:")
    assert places(text) == {"r.yaml: slices[0].sources[0].layer_range", "r.yaml: merge_method", "r.yaml: dtyp"}


@pytest.mark.parametrize("layer_range", ["[3, 0]", "[2, 2]", "[-1, 2]", "[-3, -1]", "[0]", "[0, 1, 2]", "[]", "3", "'[0, 1]'", "[0.0, 2.0]",
                                         "[0, 1.5]", "['0', '1']", "[true, 2]", "[null, 2]", "null", "{a: 1}"])  # fmt: skip
def test_a_range_that_is_none_is_refused(layer_range):
    assert all(place.startswith("r.yaml: slices[0].sources[0].layer_range") for place in places(one_slice(layer_range)))


def test_a_missing_range_is_told():
    (fault,) = refused("merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n")
    assert (fault.place, fault.found) == ("r.yaml: slices[0].sources[0].layer_range", "nothing")


@pytest.mark.parametrize("missing", ["slices", "merge_method"])
def test_a_missing_part_is_told(missing):
    text = {"slices": "merge_method: passthrough\n", "merge_method": one_slice("[0, 1]").partition("\n")[2]}[missing]
    (fault,) = refused(text)
    assert (fault.place, fault.found) == (f"r.yaml: {missing}", "nothing")


@pytest.mark.parametrize("slices", ["[]", "null", "3", "{}", "[null]", "[{}]", "[{sources: []}]", "[{sources: null}]", "[3]"])
def test_slices_that_hold_no_block_are_refused(slices):
    assert all(place.startswith("r.yaml: slices") for place in places(f"merge_method: passthrough\nslices: {slices}\n"))


def test_two_sources_in_a_slice_are_refused():
    part = "{model: a, layer_range: [0, 1]}"
    assert places(f"merge_method: passthrough\nslices: [{{sources: [{part}, {part}]}}]") == {"r.yaml: slices[0].sources"}


@pytest.mark.parametrize("model", ["''", "3", "null", "[a]", "true"])
def test_a_model_that_is_no_name_is_refused(model):
    assert places(one_slice("[0, 1]", model)) == {"r.yaml: slices[0].sources[0].model"}


@pytest.mark.parametrize("method", ["linear", "slerp", "Passthrough", "''", "null", "[passthrough]"])
def test_a_merge_method_that_is_not_passthrough_is_refused(method):
    (fault,) = refused(GOOD.replace("passthrough", method))
    assert fault.place == "r.yaml: merge_method" and "passthrough" in fault.expected


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
def test_a_key_that_stands_twice_is_refused(text):
    (fault,) = refused(text)
    assert "stands twice" in fault.found and "line" in fault.found


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!mine x", "!!python/tuple [1]"])
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


KEYS = st.sampled_from(["slices", "sources", "model", "layer_range", "merge_method", "x"])
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(documents)
@settings(max_examples=200, deadline=None)
def test_any_document_is_a_recipe_or_refused(value):
    try:
        recipe = parse_recipe(yaml.safe_dump(value), "r.yaml")
    except FrankenmergeError as error:
        assert error.faults
    else:
        assert recipe.blocks


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
def beside(tmp_path, monkeypatch):
    """A recipe in a folder of its own with donors beside it, while the working directory is another."""
    (tmp_path / "recipes" / "first").mkdir(parents=True)
    (tmp_path / "recipes" / "org" / "second").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_relative_donors_are_found_beside_the_recipe(beside):
    recipe = load_recipe(beside / "recipes" / "r.yaml")
    second = str(beside / "recipes" / "org" / "second")
    assert recipe.donors == [str(beside / "recipes" / "first"), second]
    assert (recipe.base, recipe.tokenizer) == (second, second)


def test_relative_donors_are_looked_for_in_the_working_directory_first(beside):
    (beside / "work" / "first").mkdir()
    assert load_recipe(beside / "recipes" / "r.yaml").donors == ["first", str(beside / "recipes" / "org" / "second")]


def test_donors_that_lie_nowhere_keep_their_names(beside):
    (beside / "recipes" / "org" / "second").rmdir()
    recipe = load_recipe(beside / "recipes" / "r.yaml")
    assert (recipe.donors[1], recipe.tokenizer_source) == ("org/second", "base")


def test_donors_that_cannot_be_opened_are_told_together(donors, tmp_path):
    recipe = recipe_of([Block(str(tmp_path / "x"), 0), Block(str(donors["a"]), 0), Block(str(tmp_path / "y"), 0)])
    with pytest.raises(FrankenmergeError) as caught:
        open_donors(recipe)
    assert [fault.place for fault in caught.value.faults] == [str(tmp_path / "x"), str(tmp_path / "y")]


def test_donors_are_opened_under_the_names_the_recipe_gives_them(donors):
    recipe = recipe_of([Block(str(donors["a"]), 0), Block(str(donors["b"]), 0)])
    assert {name: donor.path for name, donor in open_donors(recipe).items()} == {str(donors[name]): donors[name] for name in "ab"}
