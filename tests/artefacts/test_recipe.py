"""Recipes: read, written, refused with everything that is wrong at once."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmerge.artefacts.recipe import Block, Recipe, Seam, recipe_of
from frankenmerge.artefacts.recipe_file import (
    load_recipe,
    load_recipes,
    parse_recipe,
    parse_recipes,
)
from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors

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


# What is refused


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
    assert "stands twice" in fault.found and "line" in fault.found


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
    "slices sources model layer_range merge_method models modules parameters weight t filter value base_model dtype out_dtype "
    "tokenizer tokenizer_source source tokens kind force pad_to_multiple_of chat_template embedding head seed name lora path x".split()
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


# The rest of the schema


def sound(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml")


@pytest.mark.parametrize(
    "body",
    [
        "models: [{model: a, parameters: {weight: 1}}, {model: b}]",
        "modules: {default: {models: [{model: a}, {model: b}], parameters: {weight: 1}}}",
        "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}], base_model: b, parameters: {t: 0}}]",
        "modules: {default: {slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]}]}}",
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
        "modules: {x: {models: [{model: a}], slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}}",
        "modules: {x: {models: [{model: a}]}, y: {models: [{model: a}]}}",
        "models: [{model: a, layer_range: [0, 2]}]",
        "models: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: union}",
        "models: [{model: a}]\nseed: -1",
        "models: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}",
        "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: one, model: a}}}}",
        "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
        "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: b, token_id: 3}}}}",
    ],
)
def test_what_contradicts_itself_is_refused(body):
    refused(f"merge_method: linear\n{body}\n")


def test_sources_of_other_lengths_are_refused():
    text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n"
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
        f"merge_method: linear\nmodels: [{{model: {written}}}]\nbase_model: {{model: {{path: d}}}}\n"
    ).donors == [
        "a/b@v1+c/l",
        "d",
    ]


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
tokenizer: {source: first, tokens: {first: {source: first}, b: {source: {kind: model_token, model: first, token: first}}}}
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
    """A recipe in a folder of its own with donors folders it, while the working directory is another."""
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
