"""Which row of which donor's embedding and head each token of the result has."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_stand_in
from lettered import EMBEDDING, HEAD, NORM, STACK, faults_of, whole

from frankenmerge.splicing.operations import Copy


@pytest.fixture
def speakers(tmp_path) -> dict[str, Path]:
    """Two donors: `few` has t0 to t9, `more` t5 to t9 under other ids and two tokens of its own."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    few = write_stand_in(tmp_path / "few", "llama", vocab_size=10, **shape)
    more = write_stand_in(tmp_path / "more", "llama", vocab_size=9, **shape)
    tokenizer = {
        "model": {
            "type": "BPE",
            "vocab": {f"t{index}": 9 - index for index in range(5, 10)},
            "merges": [],
        },
        "added_tokens": [
            {"id": index, "content": text, "special": True}
            for index, text in ((5, "<u>"), (6, "<v>"))
        ],
    }
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"few": few, "more": more}


BOTH = (
    "merge_method: linear\nbase_model: few\nmodels: [{model: few}, {model: more}]\n"
    "parameters: {weight: 1}\n"
)


def origins(entry, donors) -> list[tuple[str, int] | None]:
    rows = entry.rows
    letters = {str(path): name for name, path in donors.items()}
    return [
        None if number < 0 else (letters[rows.donors[number]], int(row))
        for number, row in zip(rows.origin, rows.row, strict=True)
    ]


def test_other_vocabularies_are_refused_where_no_tokenizer_is_named(speakers, tmp_path):
    faults = faults_of(BOTH, speakers, tmp_path)
    assert {fault.place for fault in faults} == {"recipe: embedding", "recipe: head"}
    assert all("tokenizer_source" in fault.remedy for fault in faults)


def test_a_union_has_every_token_and_the_donors_own_rows(speakers, tmp_path):
    stage = whole(BOTH + "tokenizer_source: union\n", speakers, tmp_path)
    made = {operation.name: operation for operation in stage.operations}
    # t0 .. t9 as in the base, then <u> and <v>; more's t5 to t9 are its rows 4 to 0.
    shared = [("more", 9 - index) for index in range(5, 10)]
    for name in (EMBEDDING, HEAD):
        assert made[name].shape == (12, 16)
        few, more = made[name].inputs
        assert origins(few, speakers) == [("few", index) for index in range(10)] + [
            ("more", 5),
            ("more", 6),
        ]
        assert origins(more, speakers) == [("few", index) for index in range(5)] + shared + [
            ("more", 5),
            ("more", 6),
        ]
    assert made[NORM].inputs[0].rows is None
    assert stage.config["vocab_size"] == 12


def test_a_token_beyond_the_donor_s_matrix_has_another_donor_s_row_or_zeros(speakers, tmp_path):
    path = speakers["few"] / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {"<u>": 10, "<w>": 11}
    path.write_text(json.dumps(data))
    stage = whole(BOTH + "tokenizer_source: base\n", speakers, tmp_path)
    assert origins(stage.operations[0].inputs[0], speakers)[9:] == [("few", 9), ("more", 5), None]


def test_a_named_tokenizer_has_its_donor_s_order(speakers, tmp_path):
    stage = whole(BOTH + "tokenizer_source: more\n", speakers, tmp_path)
    few, more = stage.operations[0].inputs
    # Two of the nine rows of `more` pad its matrix, and stay.
    padded = [("more", index) for index in range(5, 9)]
    assert origins(few, speakers) == [("few", 9 - index) for index in range(5)] + padded
    assert origins(more, speakers) == [("more", index) for index in range(9)]
    assert stage.config["vocab_size"] == 9


def test_single_tokens_rows_come_from_where_the_recipe_says(speakers, tmp_path):
    text = (
        BOTH
        + """\
tokenizer:
  source: union
  tokens:
    t0: {source: {kind: zero}, force: true}
    t1: {source: few, force: true}
    <u>: {source: {kind: model_token, model: few, token: t3}}
    <v>: {source: {kind: model_token, model: few, token_id: 4}, force: true}
    new: {source: {kind: model_token, model: more, token: t9}}
    empty: {}
  pad_to_multiple_of: 8
"""
    )
    stage = whole(text, speakers, tmp_path)
    few, more = (origins(entry, speakers) for entry in stage.operations[0].inputs)
    assert len(few) == len(more) == 16 == stage.config["vocab_size"]
    assert few[:2] == more[:2] == [None, ("few", 1)]
    assert few[10:] == [("few", 3), ("few", 4), ("more", 0), None, None, None]
    assert more[10:] == [("more", 5), ("few", 4), ("more", 0), None, None, None]


def test_a_token_s_source_that_has_no_such_token_is_refused(speakers, tmp_path):
    for source in (
        "few",
        "{kind: model_token, model: few, token: nowhere}",
        "{kind: model_token, model: few, token_id: 10}",
    ):
        (fault,) = faults_of(
            BOTH + f"tokenizer: {{tokens: {{<u>: {{source: {source}, force: true}}}}}}\n",
            speakers,
            tmp_path,
        )
        assert "<u>" in fault.place


def test_a_stack_of_other_vocabularies_needs_a_tokenizer(speakers, tmp_path):
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: few, layer_range: [0, 1]}]
  - sources: [{model: more, layer_range: [1, 2]}]
"""
    (fault,) = faults_of(text, speakers, tmp_path)
    assert "10 and 9" in fault.found
    stage = whole(text + "tokenizer_source: base\n", speakers, tmp_path)
    made = {operation.name: operation for operation in stage.operations}
    # The head's donor lacks t0 to t4: these rows are the other's.
    assert isinstance(made[EMBEDDING], Copy) or origins(made[EMBEDDING].inputs[0], speakers) == [
        ("few", index) for index in range(10)
    ]
    wanted = [("few", index) for index in range(5)] + [
        ("more", 9 - index) for index in range(5, 10)
    ]
    assert origins(made[HEAD].inputs[0], speakers) == wanted


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_donors_of_one_vocabulary_are_copied_whatever_tokenizer_is_named(donors, tmp_path, source):
    text = STACK.replace("PARAMETERS", "") + f"tokenizer_source: {source}\n"
    operations = whole(text, donors, tmp_path).operations
    assert operations and all(isinstance(operation, Copy) for operation in operations)


def test_donors_without_a_json_tokenizer_are_matched_only_where_they_must_be(donors, tmp_path):
    old = {}
    for name, content in (("old", b"one"), ("same", b"one"), ("other", b"two")):
        old[name] = Path(shutil.copytree(donors["a"], tmp_path / name))
        (old[name] / "tokenizer.json").unlink()
        (old[name] / "tokenizer.model").write_bytes(content)
    text = (
        "merge_method: linear\nmodels: [{model: old}, {model: same}]\n"
        "parameters: {weight: 1}\ntokenizer_source: base\n"
    )
    assert whole(text, old, tmp_path)
    faults = faults_of(text.replace("same", "other"), old, tmp_path)
    assert any(fault.place.endswith("tokenizer.json") for fault in faults)
