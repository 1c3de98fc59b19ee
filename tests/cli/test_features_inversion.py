"""`features --method inversion`: texts recovered from block outputs."""

import json

import pytest
import torch

from frankenmerge.analysis.inversion import invert, outputs_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model, untrained_model

LETTERS = "\0abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def loaded(path):
    return load_model(open_checkpoint(str(path)))


def record_of(run, *arguments) -> dict:
    code, out, err = run("features", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(run, *arguments) -> str:
    code, out, err = run("features", *arguments)
    assert code == 2 and not out and "Traceback" not in err
    return err


@pytest.mark.parametrize("distance", ["l1", "cosine"])
@pytest.mark.parametrize("name", ["a", "g"])
def test_inversion_reports_what_it_recovers_and_chance(donors, run, name, distance):
    text = "the quick fox"
    found = record_of(
        run,
        donors[name],
        "--method",
        "inversion",
        "--input",
        text,
        "--layers",
        "0,2",
        "--distance",
        distance,
        "--steps",
        150,
    )
    true = [LETTERS.index(letter) for letter in text]
    assert found["input"] == {"tokens": true, "texts": list(text)}
    assert found["chance"] == 1 / 48
    model = loaded(donors[name])
    for row, block in zip(found["recovered"], (0, 2), strict=True):
        outputs = outputs_of(model, torch.tensor([true]), block)
        assert row["block"] == block
        assert [row["tokens"]] == invert(
            model, outputs, block, loss=distance, steps=150
        ).tokens.tolist()
        same = [[x == y for y in true] for x in row["tokens"]]
        count = len(true)
        assert row["recall"] == pytest.approx(sum(same[i][i] for i in range(count)) / count)
        others = [same[i][j] for i in range(count) for j in range(count) if i != j]
        assert row["permuted"] == pytest.approx(sum(others) / len(others), abs=1e-7)
    assert found["recovered"][0]["recall"] > 0.9 > 0.3 > found["recovered"][0]["permuted"]


def test_inversion_of_random_weights_is_its_control(donors, run):
    found = record_of(
        run,
        donors["a"],
        "--method",
        "inversion",
        "--input",
        "lazy fox",
        "--layers",
        "4",
        "--steps",
        3,
        "--untrained",
        7,
    )
    true = torch.tensor([[LETTERS.index(letter) for letter in "lazy fox"]])
    model = untrained_model(open_checkpoint(str(donors["a"])), 7)
    assert [found["recovered"][0]["tokens"]] == invert(
        model, outputs_of(model, true, 4), 4, steps=3
    ).tokens.tolist()
    trained = loaded(donors["a"])
    assert [found["recovered"][0]["tokens"]] != invert(
        trained, outputs_of(trained, true, 4), 4, steps=3
    ).tokens.tolist()


def test_inversion_prints_a_table(donors, run):
    code, out, _ = run(
        "features",
        donors["a"],
        "--method",
        "inversion",
        "--input",
        "fox",
        "--layers",
        "0,1",
        "--steps",
        50,
    )
    assert code == 0 and "recall" in out and "permuted" in out and "1 in 48" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--input", "fox", "--layers", "9"), "0 to 4"),
        (("--input", ""), "a text to recover"),
        (("--input", "a" * 65), "1 to 64"),
    ],
)
def test_an_inversion_that_is_impossible_is_reported(donors, run, options, words):
    assert words in refused(run, donors["g"], "--method", "inversion", *options)
