"""Texts of documents: what is read, and that nothing crosses documents."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Chat, Text, read_text, text_of
from frankenmerge.evaluation.domains import text_domain
from frankenmerge.evaluation.intervals import segment_sums
from frankenmerge.evaluation.language import encode_text, limited, measure
from frankenmerge.evaluation.seams import windows_of
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.splicing.resolve import resolve


def written(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content.encode())
    return folder


def test_a_file_is_one_document_as_it_is(tmp_path):
    text = read_text(written(tmp_path, a_txt="one\r\n\r\ntwo\n") / "a.txt")
    assert text.documents == (text.content,) == ("one\r\n\r\ntwo\n",)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n<|endoftext|>\n"])
def test_documents_lie_between_separators(tmp_path, separator):
    file = written(tmp_path, a_txt="one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree\n") / "a.txt"
    text = read_text(file, separator)
    assert text.documents == ("one\ntwo", "three") and text.name == str(file)


def test_rows_are_documents(tmp_path):
    rows = [{"text": "one\u2028", "other": "x"}, {"text": " "}, {"text": "two"}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_text(written(tmp_path, a_jsonl=content) / "a.jsonl").documents == (
        "one\u2028",
        "two",
    )


def test_a_field_can_be_named(tmp_path):
    file = written(tmp_path, a_jsonl='{"text": "x", "body": "one"}\n{"body": "two"}') / "a.jsonl"
    text = read_text(file.with_name("a.jsonl:body"))
    assert text.documents == ("one", "two") and text.name.endswith("a.jsonl:body")


def test_conversations_are_read_from_messages(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    content = json.dumps({"messages": messages})
    text = read_text(written(tmp_path, a_jsonl=content) / "a.jsonl")
    assert text.documents == (Chat(tuple(messages)),) and text.content == "Hi\nHello"


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("deeper", ".hidden", "folder.txt"):
        (tmp_path / name).mkdir()
    written(tmp_path / ".hidden", d_txt="hidden")
    written(tmp_path, b_jsonl='{"text": "two"}', a_txt="one", c_md="ignored")
    written(tmp_path / "deeper", c_txt="three")
    assert read_text(tmp_path).documents == ("one", "two", "three")


FAULTS = {
    "broken JSON": ('{"text": "a"}\n{"text": \n', ":2", "no JSON"),
    "no object": ('{"text": "a"}\n\n[1]', ":3", "a JSON list"),
    "no field": ('{"text": "a"}\n{"body": "b"}', ":2", "'body'"),
    "not text": ('{"text": 3}', ":1", "3"),
    "lone surrogate": ('{"text": "\\ud800"}', ":1", "surrogate"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}', ":1", "no turn"),
    "no messages": ('{"messages": [{"role": "user"}]}', ":1", "role"),
    "blank": ('{"text": " "}', "", "not blank"),
    "empty": ("", "", "an empty file"),
}


@pytest.mark.parametrize("content, place, found", FAULTS.values(), ids=FAULTS)
def test_faults_name_file_and_line(tmp_path, content, place, found):
    file = written(tmp_path, a_jsonl=content) / "a.jsonl"
    with pytest.raises(FrankenmergeError) as refused:
        read_text(file)
    (fault,) = refused.value.faults
    assert fault.place == f"{file}{place}" and found in fault.found


def test_every_faulty_line_of_a_folder_is_reported(tmp_path):
    written(tmp_path, a_jsonl="1\n2", b_txt="", c_txt="fine")
    (tmp_path / "d.txt").write_bytes(b"fine\n\xe9")
    with pytest.raises(FrankenmergeError) as refused:
        read_text(tmp_path)
    places = [fault.place.removeprefix(f"{tmp_path}/") for fault in refused.value.faults]
    assert places == ["a.jsonl:1", "a.jsonl:2", "b.txt", "d.txt:2"]


@pytest.mark.parametrize("name", ["hub:org/set", "absent.jsonl:field", "absent.txt"])
def test_what_cannot_be_read_is_refused(name):
    with pytest.raises(FrankenmergeError):
        read_text(Path(name))


DOCUMENTS = ("the quick brown fox jumps over " * 5, "the lazy dog", "a", "every good boy " * 3)


@torch.no_grad()
def plain_losses(model, tokenizer, document, context):
    """The loss of every token, by transformers, with half a window before those of later ones."""
    ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
    found, width = [], min(context, len(ids) - 1)
    while len(found) < len(ids) - 1:
        start = min(max(0, len(found) - width + width // 2) if found else 0, len(ids) - 1 - width)
        row = torch.tensor([ids[start : start + width + 1]])
        logits = model(input_ids=row[:, :-1]).logits[0].log_softmax(-1)
        losses = -logits.gather(1, row[0, 1:, None])[:, 0]
        found += losses[len(found) - start :].tolist()
    return found


@pytest.mark.parametrize("context", [7, 16, 64])
def test_documents_are_measured_each_by_itself(donors, context):
    checkpoint = open_checkpoint(str(donors["a"]))
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    encoded = encode_text(tokenizer, Text("t", "", DOCUMENTS))
    loss = measure(model, encoded, context=context)
    expected = [each for one in DOCUMENTS for each in plain_losses(model, tokenizer, one, context)]
    np.testing.assert_allclose(loss.nats, expected, atol=1e-4)
    assert loss.bytes == sum(map(len, DOCUMENTS)) and loss.documents == 4
    assert loss.ends.tolist() == list(range(1, loss.bytes + 1))  # tokens are letters


@pytest.mark.parametrize("context", [7, 64])
def test_recipes_measured_together_read_the_same_documents(donors, context):
    checkpoints = {str(donors[name]): open_checkpoint(str(donors[name])) for name in "ab"}
    one, two = checkpoints
    recipes = [
        recipe_of([Block(one, 0), Block(one, 1), Block(two, 2)]),
        recipe_of([Block(one, 0), Block(one, 1), Block(one, 1), Block(one, 3)]),
    ]
    splices = [resolve(recipe, checkpoints) for recipe in recipes]
    bench = Bench([Text("t", "", DOCUMENTS)], checkpoints, context=context)
    for splice, found in zip(splices, bench.splices(splices), strict=True):
        alone = bench.splice("x", splice).losses["t"]
        np.testing.assert_allclose(found.losses["t"].nats, alone.nats, atol=1e-4)
        assert found.losses["t"].documents == alone.documents == 4


def test_segments_do_not_cross_documents(donors):
    checkpoint = open_checkpoint(str(donors["a"]))
    documents = ("a" * 5000, "b" * 40, "c" * 30_000, "d" * 10_001)
    text = Text("t", "", documents)
    loss = measure(
        load_model(checkpoint), encode_text(load_tokenizer(checkpoint), text), context=64
    )
    sums = segment_sums(loss)
    edges = set(np.cumsum(sums[3]).tolist())
    assert set(np.cumsum([len(each) for each in documents]).tolist()) <= edges
    np.testing.assert_array_equal(sums[2], sums[3])  # tokens and bytes: tokens are letters
    np.testing.assert_allclose(sums[0].sum(), loss.nats.sum())


def test_windows_of_seams_lie_in_documents(donors):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    documents = ("a" * 30, "b" * 9, "c" * 50)
    rows = windows_of({"t": encode_text(tokenizer, Text("t", "", documents))}, 16)
    for row in rows:
        assert len(set(row[0].tolist()) - {0}) == 1 and 0 not in row[0, 1:].tolist()


def test_rows_and_units_of_a_domain_do_not_cross_documents():
    documents = [np.full(length, number) for number, length in enumerate([300, 20, 700, 5], 1)]
    domain = text_domain("t", documents, 0, 8)
    own = domain.ids[:, 1]
    assert all(
        set(row.tolist()) <= {0, int(first)} for row, first in zip(domain.ids, own, strict=True)
    )
    units = [set(own[domain.units == unit].tolist()) for unit in range(domain.size)]
    assert all(len(unit) == 1 for unit in units)
    assert int(domain.counted.sum()) == 1025


MODEL, STORIES = DATA / "models" / "stories260K", DATA / "text" / "tinystories.txt"


@pytest.mark.skipif(not STORIES.exists(), reason="no stories beside the repository")
def test_a_real_model_predicts_stories_better_than_one_stream(tmp_path):
    """The model has read stories, each after BOS, and none for longer than a story is."""
    file = tmp_path / "stories.txt"
    file.write_text(STORIES.read_text()[:60_000])
    bench = Bench([read_text(file)], {"m": open_checkpoint(str(MODEL))})
    stream = bench.checkpoint("m").total
    stories = bench.on([read_text(file, "<|endoftext|>")]).checkpoint("m").total
    assert stream.bits_per_byte == pytest.approx(1.609, abs=0.001)
    assert stories.bits_per_byte == pytest.approx(0.969, abs=0.001)
    model, tokenizer = bench.load("m").model, bench.load("m").tokenizer
    pieces = [piece.strip("\n") for piece in file.read_text().split("<|endoftext|>")]
    nats = [
        each for piece in pieces for each in plain_losses(model, tokenizer, piece, bench.context)
    ]
    np.testing.assert_allclose(stories.nats, nats, atol=1e-4)


MESSAGES = (
    {"role": "user", "content": "tell me a story"},
    {"role": "assistant", "content": "the fox jumps"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "and runs"},
)
APPENDING = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}T {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role[0] + ' ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + 'T' }}{% endgeneration %}{% else %}{{ m.content + 'T' }}"
    "{% endif %}{{ ' ' }}{% endfor %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
CONVERSATION = "u tell me a storyT a the fox jumpsT u moreT a and runsT "


@torch.no_grad()
@pytest.mark.parametrize("template", [APPENDING, MARKED])
def test_only_the_turns_of_the_assistant_count(donors, template):
    checkpoint = open_checkpoint(str(donors["a"]))
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    tokenizer.chat_template = template
    ids = torch.tensor([tokenizer(CONVERSATION, add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
    nats = -logits.gather(1, ids[0, 1:, None])[:, 0]
    expected = []
    for turn in ("the fox jumpsT", "and runsT"):
        first = CONVERSATION.index(turn)
        expected += nats[first - 1 : first - 1 + len(turn)].tolist()
    chat = Chat(MESSAGES)
    loss = measure(model, encode_text(tokenizer, text_of("t", [chat])), context=64)
    np.testing.assert_allclose(loss.nats, expected, atol=1e-4)
    assert loss.bytes == len("the fox jumps" + "and runs")
    mixed = measure(model, encode_text(tokenizer, text_of("t", ["abc", chat])), context=64)
    np.testing.assert_allclose(mixed.nats[3:], expected, atol=1e-4)
    assert mixed.documents == 2 and segment_sums(mixed)[2].sum() == mixed.tokens == 3 + 23


@pytest.mark.parametrize("template", [None, REWRITING, "{{ raise_exception('no') }}", "x"])
def test_conversations_that_cannot_be_told_apart_are_refused(donors, template):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    tokenizer.chat_template = template
    with pytest.raises(FrankenmergeError, match="t, document 1") as refused:
        encode_text(tokenizer, text_of("t", [Chat(MESSAGES)]))
    assert "template" in str(refused.value)


@pytest.mark.parametrize("tokens", [1, 150, 155, 165, 168, 10_000])
def test_a_text_is_limited_to_its_beginning(donors, tokens):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    text = limited(tokenizer, text_of("t", DOCUMENTS), tokens)
    whole = "".join(DOCUMENTS)
    assert "".join(text.documents) == whole[:tokens]  # tokens are letters
    assert all(map(str.startswith, DOCUMENTS, text.documents))


def test_a_conversation_is_not_cut(donors):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    tokenizer.chat_template = APPENDING
    text = text_of("t", ["abc", Chat(MESSAGES)])
    assert limited(tokenizer, text, 20).documents == ("abc",)
    assert limited(tokenizer, text, 26) == text
    with pytest.raises(FrankenmergeError, match="at most 2 tokens"):
        limited(tokenizer, text_of("t", [Chat(MESSAGES)]), 2)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(FrankenmergeError, match=r"frankenmerge\[parquet\]"):
        read_text(tmp_path / "a.parquet")


def test_rows_of_parquet_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "body": ["three", None]}), file)
    assert read_text(file).documents == ("one", "two")
    with pytest.raises(FrankenmergeError, match="row 2"):
        read_text(tmp_path / "a.parquet:body")
    rows = pyarrow.table({"messages": [list(MESSAGES)]})
    parquet.write_table(rows, file)
    assert read_text(file).documents == (Chat(MESSAGES),)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(FrankenmergeError, match="a Parquet file"):
        read_text(file)
