"""Texts of documents on the command line: every command reads the same ones."""

import json

import pytest
import torch
from conftest import write_donor
from relatives import aligned, noisy, text_from

from frankenmerge.artefacts.alignment import save_alignment
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model

ROW = 63
"""Letters of a document; with the token before them they fill a window of the donors."""
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two damaged copies of a model, and what it generates as documents in several formats."""
    root = tmp_path_factory.mktemp("documents")
    parent = write_donor(root / "parent", seed=1)
    first = noisy(parent, root / "first", 1.0, range(2, 4), seed=1)
    second = noisy(parent, root / "second", 1.0, range(2), seed=2)
    alignment, recipe = root / "pair.alignment.safetensors", root / "splice.yaml"
    save_alignment(aligned(first, second), alignment)
    blocks = [Block(str(first), 0), Block(str(first), 1), Block(str(second), 2)]
    recipe.write_text(recipe_of([*blocks, Block(str(second), 3)]).dump())
    content = text_from(parent, 120)
    rows = [content[at : at + ROW] for at in range(0, len(content), ROW)]
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (root / "named.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows))
    (root / "rows.txt").write_text("\n~~\n".join(rows))
    (root / "folder").mkdir()
    for number, row in enumerate(rows):
        (root / "folder" / f"{number:03}.txt").write_text(row)
    texts = {
        "jsonl": (root / "rows.jsonl",),
        "named": (f"{root / 'named.jsonl'}:body",),
        "separated": (root / "rows.txt", "--separator", "\\n~~\\n"),
        "folder": (root / "folder",),
    }
    return {
        "parent": parent,
        "first": first,
        "alignment": alignment,
        "recipe": recipe,
        "rows": rows,
        "texts": texts,
    }


def answered(run, *arguments):
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def mean_loss(model, rows) -> float:
    """The mean loss of all letters, as transformers has it."""
    ids = torch.tensor([[0, *(LETTERS.index(letter) + 1 for letter in row)] for row in rows])
    with torch.no_grad():
        return float(load_model(open_checkpoint(str(model)))(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("kind", ["jsonl", "named", "separated", "folder"])
def test_evaluate_measures_document_by_document(planted, run, kind):
    first, text = planted["first"], planted["texts"][kind]
    found = answered(run, "evaluate", first, "--text", *text)
    (model,), (record,) = found["models"], found["texts"]
    assert model["nats_per_token"] == pytest.approx(mean_loss(first, planted["rows"]), abs=1e-4)
    assert record["documents"] == 120 and record["bytes"] == model["bytes"] == 120 * ROW
    assert model["domains"] == [
        {
            "name": str(text[0]),
            "documents": 120,
            "tokens": 120 * ROW,
            "bits_per_byte": pytest.approx(model["bits_per_byte"]),
            "nats_per_token": pytest.approx(model["nats_per_token"]),
        }
    ]


def test_a_limit_of_tokens_ends_in_a_document(planted, run):
    first, (text,) = planted["first"], planted["texts"]["jsonl"]
    options = ("--tokens", 3 * ROW + 20, "--samples", 4)
    found = answered(run, "evaluate", planted["recipe"], "--text", text, *options)
    rows = planted["rows"]
    losses = [mean_loss(first, [row]) * ROW for row in rows[:3]]
    losses.append(mean_loss(first, [rows[3][:20]]) * 20)
    by_name = {model["name"]: model for model in found["models"]}
    model = by_name[str(first)]
    assert model["nats_per_token"] == pytest.approx(sum(losses) / (3 * ROW + 20), abs=1e-4)
    assert {each["domains"][0]["documents"] for each in by_name.values()} == {4}
    prompts = [sample["prompt"] for sample in model["samples"]]
    assert all(any(prompt in row for row in rows[:4]) for prompt in prompts)
    code, out, _ = run("evaluate", first, "--text", text, *options[:2])
    assert code == 0 and "in 4 documents" in " ".join(out.split())


def test_plans_are_verified_on_the_same_documents(planted, run, tmp_path):
    names = planted["alignment"], "-o", tmp_path / "recipe.yaml", "--depth", 4
    found = [
        answered(run, "plan", *names, "--verify", *planted["texts"][kind])["plans"]
        for kind in ("jsonl", "separated")
    ]
    assert found[0][0]["measured_damage"] == pytest.approx(found[1][0]["measured_damage"])


def test_gains_are_measured_on_documents(planted, run, tmp_path):
    """Windows of the donors have as many letters as a document: rows are the documents."""
    names = planted["alignment"], "--objective", "gain", "--depth", 4, "-o", tmp_path / "r.yaml"
    found = answered(run, "plan", *names, "--on", *planted["texts"]["jsonl"])
    confirming = planted["rows"][1::2]  # every document is a unit
    best = min(mean_loss(planted["first"].with_name(n), confirming) for n in ("first", "second"))
    assert found["controls"]["best_donor"]["nats"] == pytest.approx(best, abs=1e-4)
    assert found["confirmed"] and found["tokens"] == 60 * ROW


def test_tune_and_heal_read_documents(planted, run, tmp_path):
    text, recipe = planted["texts"]["separated"], tmp_path / "linear.yaml"
    second = planted["first"].with_name("second")
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- model: {planted['first']}\n  parameters: {{weight: 1}}\n"
        f"- model: {second}\n  parameters: {{weight: 1}}\n"
    )
    tuned = answered(run, "tune", recipe, "--on", *text, "--steps", 2, "-o", tmp_path / "t.yaml")
    assert tuned["before"]["nats"] > 0
    options = ("--on", *text, "--steps", 2, "--scope", "norms")
    healed = answered(run, "heal", planted["recipe"], tmp_path / "healed", *options)
    assert healed["before"]["nats"] > 0
    (judged, *_) = planted["texts"]["separated"]
    code, _, err = run("heal", planted["recipe"], tmp_path / "b", *options, "--text", judged)
    assert code == 2 and "not trained on" in err


def test_conversations_go_through_the_template(planted, run, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
    text, model = tmp_path / "chats.jsonl", write_donor(tmp_path / "chatty", seed=4)
    text.write_text(f"{json.dumps({'messages': turns})}\n" * 3)
    code, _, err = run("evaluate", model, "--text", text)
    assert code == 2 and f"{text}, document 1" in err and "chat template" in err
    (model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}T{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    found = answered(run, "evaluate", model, "--text", text)["models"][0]
    row = torch.tensor([[0, *(LETTERS.index(letter) + 1 for letter in "u hiTa good dayT")]])
    labels = torch.where(torch.arange(row.shape[1]) < 8, -100, row)
    with torch.no_grad():
        loss = load_model(open_checkpoint(str(model)))(input_ids=row, labels=labels).loss
    assert found["nats_per_token"] == pytest.approx(float(loss), abs=1e-4)
    assert (found["tokens"], found["bytes"]) == (3 * 9, 3 * 8)


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}T{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def chats(planted):
    """Conversations whose answers are what the model generates; the models have a template."""
    text = planted["first"].with_name("chats.jsonl")
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": row[:40]}]
        for row in planted["rows"]
    ]
    text.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    for name in ("first", "second"):
        (planted["first"].with_name(name) / "chat_template.jinja").write_text(CHAT)
    rendered = [f"u hiTa {messages[1]['content']}T" for messages in turns]
    yield text, rendered
    for name in ("first", "second"):
        (planted["first"].with_name(name) / "chat_template.jinja").unlink()


def answer_loss(model, rows) -> float:
    """The mean loss of the answers, with their end markers, as transformers has it."""
    ids = torch.tensor([[0, *(LETTERS.index(letter) + 1 for letter in row)] for row in rows])
    labels = torch.where(torch.arange(ids.shape[1]) < 1 + len("u hiTa "), -100, ids)
    with torch.no_grad():
        return float(load_model(open_checkpoint(str(model)))(input_ids=ids, labels=labels).loss)


def test_plans_are_verified_on_conversations(planted, chats, run, tmp_path):
    text, rows = chats
    arguments = planted["alignment"], "--depth", 4, "--verify", text, "-o", tmp_path / "r.yaml"
    (plan, *_) = answered(run, "plan", *arguments)["plans"]
    measured = answered(run, "evaluate", tmp_path / "r.yaml", "--text", text)["models"]
    losses = {each["name"]: each["nats_per_token"] for each in measured}
    donors = {
        str(path): answer_loss(path, rows)
        for path in (planted["first"], planted["first"].with_name("second"))
    }
    assert {name: losses[name] for name in donors} == pytest.approx(donors, abs=1e-4)
    own = sum(donors[block.model] / 4 for block in load_recipe(tmp_path / "r.yaml").blocks)
    found = losses[str(tmp_path / "r.yaml")] - own
    assert plan["measured_damage"] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
def test_gains_and_healing_count_the_answers_alone(planted, chats, run, tmp_path):
    text, rows = chats
    first = planted["first"]
    # A template that one of them has is enough: their tokens are the same.
    (first / "chat_template.jinja").unlink()
    gain = ("--objective", "gain", "--depth", 4, "--on", text, "-o", tmp_path / "r.yaml")
    found = answered(run, "plan", planted["alignment"], *gain)
    (first / "chat_template.jinja").write_text(CHAT)
    best = min(answer_loss(first.with_name(name), rows[1::2]) for name in ("first", "second"))
    assert found["controls"]["best_donor"]["nats"] == pytest.approx(best, abs=1e-4)
    assert found["tokens"] == 60 * 41
    options = ("--on", text, "--steps", 2, "--scope", "norms", "--teacher", "none")
    healed = answered(run, "heal", planted["recipe"], tmp_path / "healed", *options)
    assert healed["tokens"] == 2 * 16 * 41


def test_a_separator_that_does_not_occur_is_mentioned(planted, run, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one story\n~~\n")
    for separator, notes in (("~~", 0), ("||", 1)):
        arguments = ("--text", text, "--separator", separator)
        code, _, err = run("evaluate", planted["first"], *arguments)
        assert code == 0 and err.count("does not occur") == notes


@pytest.mark.parametrize("command", ["evaluate", "plan", "tune"])
def test_faulty_documents_are_reported_with_their_line(planted, run, tmp_path, command):
    text = tmp_path / "rows.jsonl"
    text.write_text('{"text": "fine"}\n{"text": \n')
    arguments = {
        "evaluate": (planted["first"], "--text", text),
        "plan": (planted["alignment"], "--verify", text, "-o", tmp_path / "r.yaml"),
        "tune": (planted["recipe"], "--on", text, "-o", tmp_path / "r.yaml"),
    }[command]
    code, out, err = run(command, *arguments)
    assert (code, out) == (2, "") and f"{text}:2" in err and "Traceback" not in err
    assert all(word in err for word in ("expected:", "found:", "remedy:"))
    code, _, err = run("evaluate", planted["first"], "--text", "hub:some/set")
    assert code == 2 and "remedy:" in err
