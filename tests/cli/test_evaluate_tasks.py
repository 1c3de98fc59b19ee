"""`frankenmerge evaluate --tasks FILE.jsonl`: items on models and recipes, compared in pairs."""

import json

import pytest
import torch
from conftest import DEMO
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from frankenmerge.artefacts.recipe import Block, recipe_of

CODE, PROSE = (DEMO / "donors" / name for name in ("code", "prose"))


def words(count: int) -> list[dict]:
    """Which of two continuations of a real text is the real one; the other one comes later."""
    found = []
    for name in ("code", "prose"):
        text = (DEMO / "text" / f"{name}.txt").read_text()
        for start in range(500, 500 + 400 * count, 400):
            real, other = (text[start + skip : start + skip + 12] for skip in (120, 160))
            answer = len(found) % 2
            choices = (real, other) if answer == 0 else (other, real)
            found.append(
                {"context": text[start : start + 120], "choices": [*choices], "answer": answer}
            )
    return found


@pytest.fixture
def task(tmp_path):
    """Two files of items, and a recipe of both donors."""
    rows = words(12)
    files = [tmp_path / "words.jsonl", tmp_path / "more.jsonl"]
    for file, part in zip(files, (rows, rows[::2]), strict=True):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    recipe = tmp_path / "splice.yaml"
    blocks = [*(Block(str(CODE), n) for n in range(5)), *(Block(str(PROSE), n) for n in (5, 6, 7))]
    recipe.write_text(recipe_of(blocks).dump())
    return recipe, files, rows


@torch.no_grad()
def right(folder, rows) -> list[bool]:
    """By transformers, each choice in a pass of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        context = row["context"].rstrip()
        before, sums = tokenizer(context)["input_ids"], []
        for choice in row["choices"]:
            whole = tokenizer(row["context"] + choice)["input_ids"]
            ids = before + whole[len(before) :]
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[n - 1, ids[n]]) for n in range(len(before), len(ids))))
        found.append(sums.index(max(sums)) == row["answer"])
    return found


def test_recipes_and_donors_answer_items_and_are_compared(task, run, tmp_path):
    recipe, files, rows = task
    output = tmp_path / "run" / "items.evaluation.json"
    options = [part for file in files for part in ("--tasks", file)]
    code, out, err = run("evaluate", recipe, *options, "--json", "-o", output)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record == json.loads(output.read_text())
    assert [model["role"] for model in record["models"]] == ["recipe", "donor", "donor"]
    assert "bits_per_byte" not in record["models"][0] and record["models"][0]["key"]
    assert set(record["provenance"]["items"]) == set(map(str, files))

    correct = {
        (each["model"], each["task"], each["metric"]): each["correct"]
        for each in record["item_results"]
    }
    for donor in (CODE, PROSE):
        for file, part in zip(files, (rows, rows[::2]), strict=True):
            wanted = "".join(str(int(each)) for each in right(donor, part))
            assert correct[str(donor), str(file), "acc"] == wanted

    assert len(record["task_differences"]) == 2 * 2 * 2  # donors, tasks, metrics
    for entry in record["task_differences"]:
        ours, theirs = (
            correct[entry[name], entry["task"], entry["metric"]] for name in ("model", "donor")
        )
        pairs = list(zip(ours, theirs, strict=True))
        b, c = pairs.count(("1", "0")), pairs.count(("0", "1"))
        assert (entry["only_model"], entry["only_donor"]) == (b, c)
        assert entry["difference"] == pytest.approx((b - c) / len(pairs))
        assert entry["p"] == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1)
        assert entry["p"] <= entry["p_holm"] <= 1
    figures = {(each["model"], each["task"], each["metric"]): each for each in record["tasks"]}
    for key, digits in correct.items():
        share = digits.count("1") / len(digits)
        assert figures[key]["value"] == pytest.approx(share)
        assert figures[key]["stderr"] == pytest.approx(
            (share * (1 - share) / (len(digits) - 1)) ** 0.5
        )


def test_a_recipe_answers_as_the_checkpoint_that_merge_writes(task, run, tmp_path):
    recipe, (file, _), _ = task
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    code, out, _ = run("evaluate", recipe, tmp_path / "merged", "--tasks", file, "--json")
    record = json.loads(out)
    correct = {(each["model"], each["metric"]): each["correct"] for each in record["item_results"]}
    for metric in ("acc", "acc_norm"):
        assert correct[str(recipe), metric] == correct[str(tmp_path / "merged"), metric]
    compared = {(each["model"], each["donor"]) for each in record["task_differences"]}
    assert code == 0 and (str(tmp_path / "merged"), str(CODE)) in compared


def test_items_with_a_text_are_printed_and_reported_together(task, run, text, tmp_path):
    recipe, (file, _), _ = task
    output = tmp_path / "run" / "both.json"
    code, out, err = run("evaluate", recipe, "--text", text, "--tasks", file, "-o", output)
    assert (code, err) == (0, "")
    for part in ("On text", "words acc", "splice.yaml and code on the same items", "Holm"):
        assert part in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = run("report", tmp_path / "run", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert code == 0, err
    assert "On text" in page and "Compared on the same items" in page


def test_items_alone_print_no_table_of_text(task, run):
    recipe, (file, _), _ = task
    code, out, err = run("evaluate", recipe, "--tasks", file)
    assert (code, err) == (0, "") and "bits" not in out and "on the same items" in out


def test_long_items_are_cut_with_a_note(task, run, tmp_path):
    _, (file, _), _ = task
    code, _, err = run("evaluate", CODE, "--tasks", file, "--context", 24)
    assert code == 0 and "Note: " in err and "lose the first ones" in err


def test_faulty_items_are_reported_before_a_model_is_loaded(task, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "frankenmerge.evaluation.bench.load_model",
        lambda *_, **__: pytest.fail("a model was loaded"),
    )
    faulty = tmp_path / "faulty.jsonl"
    faulty.write_text('{"context": "a", "choices": ["b"], "answer": 0}\n{"context": 1}\n')
    code, out, err = run("evaluate", CODE, "--tasks", faulty)
    assert (code, out) == (2, "") and f"{faulty}:1" in err and f"{faulty}:2" in err
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "a", "choices": ["b " * 90, "c"], "answer": 0}))
    code, out, err = run("evaluate", CODE, "--tasks", long, "--context", 8)
    assert (code, out) == (2, "") and "a choice of at most 8 tokens" in err
    code, out, err = run("evaluate", CODE, "--tasks", tmp_path / "none.jsonl")
    assert (code, out) == (2, "") and "none.jsonl" in err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "a text or a task"),
        (["--tasks", "x.jsonl", "--seams"], "a text for --seams"),
        (["--tasks", "x.jsonl", "--compare", "1"], "a text for --compare"),
        (["--tasks", "x.jsonl", "--samples", "1"], "a text for --samples"),
    ],
)
def test_what_needs_a_text_says_so(run, options, part):
    code, out, err = run("evaluate", CODE, *options)
    assert (code, out) == (2, "") and part in err
