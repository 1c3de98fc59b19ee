"""Multiple-choice items: reading, tokens, log-probabilities, and the choices of a model."""

import json

import numpy as np
import pytest
import torch
from conftest import DATA, DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation import language
from frankenmerge.evaluation.items import (
    Item,
    choice_log_likelihoods,
    correct,
    encoded_items,
    read_items,
)

ITEMS = [
    Item("def add(a, b):\n    return", (" a + b", " the cat, and 東京", " b"), 0),
    Item("It ends in a space ", ("after", " beyond"), 1),
    Item("", ("import os", "tropmi so"), 0),
    Item("The name of it:", (" é", " a much longer one, of several words in a row"), 1),
]


@pytest.fixture(scope="module", params=["code", "prose"])
def demo(request):
    folder = DEMO / "donors" / request.param
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32"
    ), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def alone(model, before: list[int], after: list[int]) -> float:
    """The log-probability of `after`, in a pass of its own."""
    ids = torch.tensor([before + after])
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logs[len(before) + n - 1, token]) for n, token in enumerate(after))


def expected(model, tokenizer, items) -> list[list[float]]:
    """By the definition of lm-evaluation-harness, choice by choice."""
    rows = []
    for item in items:
        sums = []
        for choice in item.choices:
            context = item.context
            while context.endswith(" "):
                context, choice = context[:-1], f" {choice}"
            before = tokenizer(context)["input_ids"]
            after = tokenizer(context + choice)["input_ids"][len(before) :]
            if not context:
                before = [tokenizer.bos_token_id]
                after = tokenizer(choice, add_special_tokens=False)["input_ids"]
            sums.append(alone(model, before, after))
        rows.append(sums)
    return rows


def scored(model, tokenizer, items, context=512):
    rows = encoded_items(tokenizer, items, context=context)
    return rows, choice_log_likelihoods(model, rows)


def test_choices_have_the_log_probabilities_of_a_pass_of_their_own(demo):
    rows, sums = scored(*demo, ITEMS)
    wanted = expected(*demo, ITEMS)
    assert sums == pytest.approx([value for row in wanted for value in row], abs=1e-4)
    assert rows.items.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3] and rows.cut == 0
    assert rows.answers.tolist() == [0, 1, 0, 1]


def test_the_best_choice_is_taken_by_sum_and_by_sum_per_character(demo):
    rows, sums = scored(*demo, ITEMS)
    wanted = expected(*demo, ITEMS)
    lengths = [[len(choice.strip(" ")) for choice in item.choices] for item in ITEMS]
    found = correct(rows, sums)
    for number, item in enumerate(ITEMS):
        norm = np.array(wanted[number]) / lengths[number]
        assert found["acc"][number] == (np.argmax(wanted[number]) == item.answer)
        assert found["acc_norm"][number] == (np.argmax(norm) == item.answer)


def test_metrics_by_hand(demo):
    _, tokenizer = demo
    items = [Item("x", (" ab", " abcdefgh"), 1), Item("x", (" a", " b", " c"), 2)]
    rows = encoded_items(tokenizer, items, context=64)
    found = correct(rows, np.array([-3.0, -4.0, -2.0, -1.0, -1.0]))
    assert found["acc"].tolist() == [False, False]  # of equal ones the first
    assert found["acc_norm"].tolist() == [True, False]


@pytest.mark.parametrize("positions", [1, 40, 100_000])
def test_how_rows_are_batched_changes_nothing(demo, monkeypatch, positions):
    _, wanted = scored(*demo, ITEMS)
    monkeypatch.setattr(language, "POSITIONS", positions)
    rows = encoded_items(demo[1], ITEMS, context=512)
    done = []
    assert choice_log_likelihoods(demo[0], rows, advance=done.append) == pytest.approx(
        wanted, abs=1e-4
    )
    assert sum(done) == len(wanted)


def test_padding_is_on_the_right_and_counts_for_nothing(demo):
    rows = encoded_items(demo[1], ITEMS, context=512)
    ids = rows.ids.copy()
    for row, mask in enumerate(rows.counted):
        assert mask.any() and not rows.ids[row, mask.nonzero()[0][-1] + 2 :].any()
        ids[row, mask.nonzero()[0][-1] + 2 :] = 1
    assert choice_log_likelihoods(demo[0], rows._replace(ids=ids)) == pytest.approx(
        choice_log_likelihoods(demo[0], rows), abs=1e-5
    )


def test_rows_that_are_too_long_lose_the_beginning_of_their_context(demo):
    model, tokenizer = demo
    item = Item("one two three four five six seven eight nine ten", (" eleven", " of it"), 0)
    rows, sums = scored(model, tokenizer, [item], context=8)
    assert rows.ids.shape[1] == 9 and rows.cut == 2
    for choice, value in zip(item.choices, sums, strict=True):
        before = tokenizer(item.context)["input_ids"]
        after = tokenizer(item.context + choice)["input_ids"][len(before) :]
        assert value == pytest.approx(alone(model, (before + after)[-9 : -len(after)], after))


def test_a_tokenizer_s_bos_begins_every_row_once(real):
    """These tokenizers begin texts with BOS; a text that begins with it gets no second one."""
    for folder in real:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bos, items = tokenizer.bos_token, [Item("Once upon a", (" time", " tame"), 0)]
        begun = [Item(f"{bos}Once upon a", (" time", " tame"), 0)]
        rows, sums = scored(model, tokenizer, items)
        assert (rows.ids[:, 0] == tokenizer.bos_token_id).all()
        assert sums == pytest.approx(expected(model, tokenizer, items)[0], abs=1e-4)
        again = encoded_items(tokenizer, begun, context=64)
        assert (again.ids == tokenizer.bos_token_id).sum() == 2


def test_every_choice_that_cannot_be_scored_is_reported(donors):
    tokenizer = AutoTokenizer.from_pretrained(donors["a"])
    items = [Item("x", ("y" * 40, "y"), 0), Item("x", ("y", "z"), 0), Item("x", ("y" * 9, "y"), 0)]
    with pytest.raises(FrankenmergeError) as error:
        encoded_items(tokenizer, items, context=8, place="items.jsonl")
    assert [fault.found for fault in error.value.faults] == ["40 tokens", "9 tokens"]
    assert error.value.faults[1].place == "items.jsonl: item 3 of 3, choice 'yyyyyyyyy'"


def test_a_choice_needs_a_token_before_it(donors):
    tokenizer = AutoTokenizer.from_pretrained(donors["a"])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(FrankenmergeError, match="neither a context nor a BOS"):
        encoded_items(tokenizer, [Item("", ("b", "c"), 0)], context=8)


def test_items_are_read_line_by_line(tmp_path):
    lines = [json.dumps(item._asdict() | {"id": 3}, ensure_ascii=False) for item in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_items(tmp_path / "items.jsonl") == ITEMS


def test_every_faulty_line_is_reported_at_once(tmp_path):
    good = {"context": "a", "choices": ["b", "c"], "answer": 1}
    faulty = [
        "no json",
        "[1]",
        json.dumps({"context": "a", "answer": 0}),
        json.dumps(good | {"context": None}),
        json.dumps(good | {"choices": ["b"]}),
        json.dumps(good | {"choices": ["b", ""]}),
        json.dumps(good | {"answer": 2}),
        json.dumps(good | {"answer": True}),
        json.dumps(good | {"choices": ["b", "\ud800"]}),
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join([json.dumps(good), *faulty]))
    with pytest.raises(FrankenmergeError) as error:
        read_items(path)
    assert [fault.place for fault in error.value.faults] == [f"{path}:{n}" for n in range(2, 11)]
    for number, part in ((2, "no choices"), (6, "0 to 1"), (7, "true")):
        assert part in str(error.value.faults[number])


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"])
def test_files_without_items_are_refused(tmp_path, content):
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FrankenmergeError, match=r"items\.jsonl"):
        read_items(path)


def piqa() -> list[Item]:
    folder = DATA / "tasks"
    if not folder.is_dir():
        pytest.skip(f"the questions are not in {folder}")
    labels = (folder / "piqa-valid-400-labels.lst").read_text().split()
    rows = map(json.loads, (folder / "piqa-valid-400.jsonl").read_text().splitlines())
    return [
        Item(
            f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(label)
        )
        for row, label in zip(rows, labels, strict=True)
    ]


def test_real_items_have_the_log_probabilities_of_passes_of_their_own(demo):
    items = piqa()[:20]
    rows, sums = scored(*demo, items)
    wanted = [value for row in expected(*demo, items) for value in row]
    assert sums == pytest.approx(wanted, abs=1e-3) and rows.cut == 0
