"""lm-evaluation-harness on models in memory, offline, compared with figures computed here."""

import importlib.util
import json

import pytest
import torch
from conftest import DATA, DEMO

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.items import Item
from frankenmerge.models.loading import load_model, load_tokenizer

QUESTIONS = 24
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


def piqa() -> list[dict]:
    file = DATA / "tasks" / "piqa-valid-400.jsonl"
    if not file.is_file():
        pytest.skip(f"the questions are not in {file.parent}")
    labels = (DATA / "tasks" / "piqa-valid-400-labels.lst").read_text().split()
    rows = zip(file.read_text().splitlines(), labels, strict=True)
    found = [json.loads(line) | {"label": int(label)} for line, label in rows]
    return [
        row for row in found if len(row["goal"]) + max(len(row["sol1"]), len(row["sol2"])) < 150
    ][:QUESTIONS]


def own() -> list[dict]:
    """Which of two words goes on: one as it is, and one read backwards."""
    words = [
        "return",
        "import",
        "module",
        "function",
        "string",
        "object",
        "default",
        "argument",
        "method",
        "exception",
    ]
    rotated = [
        (word, word[::-1]) if number % 2 else (word[::-1], word)
        for number, word in enumerate(words)
    ]
    return [
        {"goal": "the name of it", "sol1": one, "sol2": other, "label": number % 2 ^ 1}
        for number, (one, other) in enumerate(rotated)
    ]


@pytest.fixture(params=[own, piqa])
def task(request, tmp_path, monkeypatch):
    """A task's YAML, its questions, and two donors to be asked."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'frankenmerge[harness]'")
    rows = request.param()
    donors = (
        request.getfixturevalue("real")
        if request.param is piqa
        else tuple(DEMO / "donors" / name for name in ("code", "prose"))
    )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "task.yaml", rows, tuple(map(str, donors))


@torch.no_grad()
def accuracy(path, rows) -> float:
    """How often the right answer is the likelier one, each answer in a pass of its own."""
    checkpoint = open_checkpoint(str(path))
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)

    def likelihood(row: dict, answer: str) -> float:
        asked = f"Question: {row['goal']}\nAnswer:"
        before, whole = tokenizer(asked)["input_ids"], tokenizer(f"{asked} {answer}")["input_ids"]
        logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        return sum(
            float(logits[place - 1, whole[place]]) for place in range(len(before), len(whole))
        )

    right = [
        (likelihood(row, row["sol2"]) > likelihood(row, row["sol1"])) == bool(row["label"])
        for row in rows
    ]
    return sum(right) / len(right)


@pytest.mark.filterwarnings("ignore")  # its own, and its dependencies'
def test_a_local_task_lands_beside_the_other_figures(task, run, text, tmp_path):
    path, rows, (one, other) = task
    blocks = open_checkpoint(one).blocks
    (tmp_path / "recipe.yaml").write_text(
        recipe_of([Block(one, index) for index in range(blocks)]).dump()
    )
    code, out, err = run(
        "evaluate", tmp_path / "recipe.yaml", other, "--text", text, "--tasks", path, "--json"
    )
    assert code == 0, err
    results = json.loads(out)["tasks"]
    assert [(entry["model"], entry["task"], entry["metric"]) for entry in results] == [
        (name, "local_questions", "acc") for name in (str(tmp_path / "recipe.yaml"), other, one)
    ]
    virtual, second, first = results
    assert virtual["value"] == first["value"] == pytest.approx(accuracy(one, rows))
    assert second["value"] == pytest.approx(accuracy(other, rows))
    share = first["value"]
    assert first["stderr"] == pytest.approx((share * (1 - share) / (len(rows) - 1)) ** 0.5)


@pytest.mark.filterwarnings("ignore")
def test_items_of_a_file_are_scored_as_the_harness_scores_them(task, run, tmp_path):
    """The same questions as a task and as a file of items, on both donors."""
    path, rows, models = task
    path.write_text(path.read_text().replace("{metric: acc}", "{metric: acc}, {metric: acc_norm}"))
    items = [
        {
            "context": f"Question: {row['goal']}\nAnswer:",
            "choices": [f" {row['sol1']}", f" {row['sol2']}"],
            "answer": row["label"],
        }
        for row in rows
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ["--tasks", path, "--tasks", file, "--against", models[1], "--json"]
    code, out, err = run("evaluate", *models, *options)
    assert code == 0, err
    record, found = json.loads(out), {}
    for each in record["item_results"]:
        found.setdefault((each["model"], each["metric"]), []).append(each["correct"])
    assert set(found) == {(model, metric) for model in models for metric in ("acc", "acc_norm")}
    assert all(one == other for one, other in found.values())
    compared = {(each["task"], each["metric"]) for each in record["task_differences"]}
    assert compared == {
        (name, metric) for name in ("local_questions", str(file)) for metric in ("acc", "acc_norm")
    }


@pytest.mark.parametrize("task", [own], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_reported_before_a_model_is_loaded(
    task, donors, run, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "frankenmerge.evaluation.bench.load_model",
        lambda *_, **__: pytest.fail("a model was loaded"),
    )
    for name in ("no_such_task", str(tmp_path / "no-such.yaml")):
        code, out, err = run("evaluate", donors["a"], "--text", text, "--tasks", name)
        assert (code, out) == (2, "") and name in err and "Traceback" not in err


def test_without_the_harness_its_extra_is_named(donors, run, text, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, err = run("evaluate", donors["a"], "--text", text, "--tasks", "piqa")
    assert code == 2 and "frankenmerge[harness]" in err and "Traceback" not in err


@pytest.mark.filterwarnings("ignore")  # its own, and its dependencies'
def test_the_items_that_gains_are_measured_on_are_the_harness_s(task):
    path, rows, _ = task
    from frankenmerge.evaluation.harness import harness_items

    assert harness_items(str(path)) == [
        Item(
            f"Question: {row['goal']}\nAnswer:",
            (f" {row['sol1']}", f" {row['sol2']}"),
            row["label"],
        )
        for row in rows
    ]
