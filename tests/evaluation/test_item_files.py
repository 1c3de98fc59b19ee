"""Results by item of other tools, and `evaluate` on them."""

import json

import pytest

from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.item_files import read_item_results


def sample(doc: int, right: bool, kind: str = "none", **more: object) -> dict:
    """A line as lm-evaluation-harness 0.4.13 writes it."""
    return {
        "doc_id": doc,
        "doc": {"query": f"question {doc}"},
        "target": "0",
        "resps": [[["-1.5", "False"]], [["-2.5", "False"]]],
        "filter": kind,
        "metrics": ["acc", "acc_norm", "likelihood"],
        "doc_hash": f"hash {doc}",
        "acc": float(right),
        "acc_norm": float(not right),
        "likelihood": [0, [-1.5, -2.5]],
    } | more


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def folders(tmp_path):
    """Samples of two models on two tasks, as the harness names the files."""
    answers = {"ours": ("1110110010", "1111111111"), "theirs": ("1000110001", "0000001111")}
    for name, tasks in answers.items():
        for task, digits in zip(("piqa", "arc_easy"), tasks, strict=True):
            lines = [sample(doc, digit == "1") for doc, digit in enumerate(digits)]
            write(tmp_path / name / f"samples_{task}_2025-11-29T09-30-00.123456.jsonl", lines)
    return [tmp_path / name for name in answers]


def test_samples_of_the_harness_are_read_metric_by_metric(folders):
    found = {(each.task, each.metric): each for each in read_item_results(folders[0])}
    assert set(found) == {(t, m) for t in ("arc_easy", "piqa") for m in ("acc", "acc_norm")}
    assert "".join(str(int(v)) for v in found["piqa", "acc"].correct.values()) == "1110110010"
    assert found["piqa", "acc_norm"].accuracy == pytest.approx(0.4)


def test_filters_are_metrics_of_their_own(tmp_path):
    lines = [
        {"doc_id": doc, "filter": kind, "metrics": ["exact_match"], "exact_match": float(doc)}
        for doc in (0, 1)
        for kind in ("strict-match", "flexible-extract")
    ]
    found = read_item_results(write(tmp_path / "samples_gsm8k_2025-01-01T00-00-00.0.jsonl", lines))
    assert [(each.task, each.metric) for each in found] == [
        ("gsm8k", "exact_match,strict-match"),
        ("gsm8k", "exact_match,flexible-extract"),
    ]
    assert found[0].correct == {"0": False, "1": True}


def test_old_samples_do_not_name_their_metrics(tmp_path):
    (found,) = read_item_results(write(tmp_path / "old.jsonl", [{"doc_id": 7, "acc": 1.0}]))
    assert (found.task, found.metric, found.correct) == ("", "acc", {"7": True})


def test_two_models_are_compared_on_all_tasks(folders, run, tmp_path):
    output = tmp_path / "pair.evaluation.json"
    code, out, err = run("evaluate", *folders, "--json", "-o", output)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record == json.loads(output.read_text())
    assert [model["name"] for model in record["models"]] == [str(folder) for folder in folders]
    found = {(each["task"], each["metric"]): each for each in record["task_differences"]}
    piqa, arc = found["piqa", "acc"], found["arc_easy", "acc"]
    assert (piqa["only_model"], piqa["only_donor"], piqa["p"]) == (3, 1, pytest.approx(0.625))
    assert (arc["only_model"], arc["only_donor"]) == (6, 0)
    assert arc["p"] == pytest.approx(2 / 2**6) and arc["p_holm"] == pytest.approx(4 * 2 / 2**6)
    assert arc["difference"] == pytest.approx(0.6)


def test_the_comparison_is_printed_and_shown_in_the_report(folders, run, tmp_path):
    write_to = tmp_path / "run" / "pair.json"
    code, out, _ = run("evaluate", *folders, "-o", write_to)
    assert (
        code == 0
        and "ours and theirs on the same items" in out
        and "6 : 0" in out
        and "0.031" in out
    )
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = run("report", tmp_path / "run", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert code == 0, err
    assert "Compared on the same items" in page and "On text" not in page
    assert "piqa acc" in page and "no clear difference" in page


def test_plain_files_take_the_task_of_the_other(tmp_path, run):
    plain = write(tmp_path / "a.jsonl", [{"id": f"q{n}", "correct": n < 8} for n in range(10)])
    other = write(tmp_path / "b.jsonl", [{"id": f"q{n}", "correct": int(n < 2)} for n in range(10)])
    code, out, _ = run("evaluate", plain, other, "--json", "--quiet")
    (entry,) = json.loads(out)["task_differences"]
    assert code == 0 and (entry["task"], entry["metric"]) == ("items", "correct")
    assert (entry["only_model"], entry["only_donor"]) == (6, 0)
    results = json.loads(out)["item_results"]
    assert results[0]["correct"] == "1" * 8 + "00" and results[0]["items"][0] == "q0"


def test_other_items_are_refused_with_their_number(tmp_path, run):
    one = write(tmp_path / "a.jsonl", [{"id": n, "correct": True} for n in range(10)])
    other = write(tmp_path / "b.jsonl", [{"id": n, "correct": True} for n in range(3, 10)])
    code, out, err = run("evaluate", one, other)
    assert (code, out) == (2, "")
    assert "0 items missing from the first, 3 from the second" in " ".join(err.split())


def test_other_documents_of_equal_ids_are_refused(folders, tmp_path, run):
    name = "samples_piqa_2025-11-29T09-30-00.123456.jsonl"
    lines = [sample(doc, True, doc_hash=f"other {doc}") for doc in range(10)]
    code, _, err = run("evaluate", folders[0] / name, write(tmp_path / "x" / name, lines))
    assert code == 2 and "10 items of equal ids with other content" in err


def test_results_without_a_common_metric_are_refused(folders, tmp_path, run):
    plain = write(tmp_path / "a.jsonl", [{"id": 0, "correct": True}])
    code, _, err = run("evaluate", folders[0], plain)
    assert code == 2 and "a task and metric that both have" in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--text", "t.txt"], "--text"),
        (["--seed", "1"], "--seed"),
        (["gpt2"], "gpt2"),
        ([], "at least two models"),
    ],
)
def test_results_are_compared_by_themselves(tmp_path, run, arguments, part):
    plain = write(tmp_path / "a.jsonl", [{"id": 0, "correct": True}])
    code, out, err = run("evaluate", plain, *arguments)
    assert (code, out) == (2, "") and part in err and "Traceback" not in err


def test_every_faulty_line_is_reported_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    good = {"id": 0, "correct": True}
    faulty = [
        {"correct": True},
        {"id": 1},
        {"id": 2, "correct": 0.5},
        {"id": None, "correct": True},
        {"doc_id": 3, "filter": ["x"], "acc": 1},
        {"doc_id": 4, "metrics": "acc", "acc": 1},
        good,
        [1],
    ]
    write(path, [good, *faulty])
    with pytest.raises(FrankenmergeError) as error:
        read_item_results(path)
    assert [fault.place for fault in error.value.faults] == [f"{path}:{n}" for n in range(2, 10)]


@pytest.mark.parametrize("lines", [[], [{"doc_id": 0, "metrics": ["bleu"], "bleu": 0.3}]])
def test_files_without_right_and_wrong_are_refused(tmp_path, lines):
    with pytest.raises(FrankenmergeError, match="expected: samples of lm-evaluation-harness"):
        read_item_results(write(tmp_path / "a.jsonl", lines))


def test_two_files_of_one_task_are_refused(folders):
    file = next(folders[0].glob("samples_piqa*"))
    file.with_name("samples_piqa_2025-11-30T09-30-00.1.jsonl").write_bytes(file.read_bytes())
    with pytest.raises(FrankenmergeError, match="one file of samples for each task"):
        read_item_results(folders[0])
