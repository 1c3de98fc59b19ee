"""When a comparison fails: the whole interval lies above what is allowed."""

import json
import shutil

import numpy as np
import pytest

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.bench import Result
from frankenmerge.evaluation.language import Loss
from frankenmerge.evaluation.lineage import Lineage
from frankenmerge.evaluation.non_inferiority import RULE, judge, merges

DONOR = np.random.default_rng(0).gamma(2, 1.5, 20_000)
BITS = 1 / np.log(2) / 4
LINEAGE = Lineage((Block("one", 0), Block("two", 1)), ("one", "two"))


def result(
    name: str, added: float, noise: float = 0, role: str = "model", lineage: Lineage | None = None
) -> Result:
    nats = DONOR + added / BITS + noise * np.random.default_rng(1).standard_normal(len(DONOR))
    return Result(name, role, {"text": Loss(nats, 4 * len(DONOR))}, lineage)


def results(added: float, noise: float = 0) -> list[Result]:
    """A merge `added` bits per byte worse than its better donor, `one`."""
    return [
        result("merge", added, noise, lineage=LINEAGE),
        result("one", 0, role="donor"),
        result("two", 0.5, role="donor"),
    ]


@pytest.mark.parametrize(
    ("added", "noise", "verdict"),
    [
        (0.2, 0, "worse"),
        (0.101, 0, "worse"),
        (0.099, 0, "not worse"),
        (-1, 0, "not worse"),
        (0.1, 2, "undecided"),
        (0.2, 2, "worse"),
        (0, 2, "not worse"),
    ],
)
def test_the_rule(added, noise, verdict):
    comparison = judge(results(added, noise), 0.1, seed=0)
    (entry,) = comparison.verdicts
    assert (entry.model, entry.donor, entry.verdict) == ("merge", "one", verdict)
    assert entry.bits_per_byte == pytest.approx(added, abs=0.02)
    assert comparison.passed == (verdict != "worse")
    low, high = entry.interval
    assert {"worse": low > 0.1, "not worse": high <= 0.1, "undecided": low <= 0.1 < high}[verdict]


def test_the_best_donor_is_the_measure_unless_another_is_named():
    assert judge(results(0.2), 0.1, 0).verdicts[0].verdict == "worse"
    (entry,) = judge(results(0.2), 0.1, 0, against="two").verdicts
    assert (entry.donor, entry.verdict) == (
        "two",
        "not worse",
    ) and entry.bits_per_byte == pytest.approx(-0.3)


def test_one_merge_that_is_worse_is_enough():
    both = [*results(0), result("bad", 1, lineage=LINEAGE)]
    comparison = judge(both, 0.1, 0)
    assert [(entry.model, entry.verdict) for entry in comparison.verdicts] == [
        ("merge", "not worse"),
        ("bad", "worse"),
    ]
    record = comparison.record()
    assert not comparison.passed and record.passed is False
    assert record.rule == RULE and record.threshold == 0.1


def test_where_no_origin_is_known_a_donor_has_to_be_named():
    plain = [result("merge", 0.3), result("one", 0)]
    with pytest.raises(FrankenmergeError, match="--against"):
        judge(plain, 0.1, 0)
    assert [entry.verdict for entry in judge(plain, 0.1, 0, against="one").verdicts] == ["worse"]
    assert merges(plain) == {} and merges(plain, "one") == {"merge": ["one"]}


@pytest.fixture
def recipe(donors, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of([Block(str(donors["a"]), index) for index in (0, 1, 2, 3, 3)]).dump())
    return path


def test_the_exit_status_is_three_when_a_merge_is_worse(run, recipe, donors, text, tmp_path):
    code, out, _ = run("evaluate", recipe, "--text", text, "--compare", 10, "--json")
    comparison = json.loads(out)["comparison"]
    assert (
        code == 0
        and comparison["passed"]
        and [entry["verdict"] for entry in comparison["models"]] == ["not worse"]
    )
    (entry,) = comparison["models"]
    output = tmp_path / "x.evaluation.json"
    code, shown, _ = run(
        "evaluate", recipe, "--text", text, "--compare", entry["interval"][0] - 0.01, "-o", output
    )
    assert code == 3 and "worse" in shown
    assert json.loads(output.read_text())["comparison"]["passed"] is False
    code, shown, _ = run("evaluate", recipe, "--text", text, "--compare", entry["bits_per_byte"])
    assert code == 0 and "undecided; more text would decide" in " ".join(shown.split())


def test_a_merged_checkpoint_is_compared_with_the_donors_that_it_names(
    run, recipe, donors, text, tmp_path
):
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    code, out, _ = run("evaluate", tmp_path / "merged", "--text", text, "--compare", 10, "--json")
    record = json.loads(out)
    assert code == 0 and [model["role"] for model in record["models"]] == ["model", "donor"]
    assert (
        record["comparison"]["models"][0]["donor"]
        == record["differences"][0]["donor"]
        == str(donors["a"])
    )
    unknown = shutil.copytree(tmp_path / "merged", tmp_path / "unknown")
    (unknown / "frankenmerge.json").unlink()
    code, _, err = run("evaluate", unknown, "--text", text, "--compare", 10)
    assert code == 2 and "frankenmerge.json" in err and "Traceback" not in err
    code, out, _ = run(
        "evaluate", unknown, "--text", text, "--compare", 10, "--against", donors["b"], "--json"
    )
    assert code == 0 and json.loads(out)["comparison"]["models"][0]["donor"] == str(donors["b"])
