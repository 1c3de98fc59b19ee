"""The script that measures splices of unrelated donors: its figures are recomputed here."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.evaluation.language import encode
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.splicing.assemble import assemble
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "evals" / "gauge.py"


@pytest.mark.slow
@pytest.mark.parametrize("effort", [("--refine", "0"), ("--refine", "2", "--maps", "linear")])
def test_every_splice_is_measured_raw_and_rotated(donors, text, effort):
    a, b = str(donors["a"]), str(donors["deep"])
    arguments = [
        "--donor-a",
        a,
        "--donor-b",
        b,
        "--text",
        str(text),
        "--json",
        "--splices",
        "24",
        *effort,
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert set(result) == {
        "donor_a_nats",
        "donor_b_nats",
        "splices",
        "median_excess_removed",
        "best_balanced",
    }
    rows = {(row["i"], row["j"]): row for row in result["splices"]}
    assert set(rows) == {(i, j) for i in range(1, 5) for j in range(6)} and len(rows) == len(
        result["splices"]
    )
    assert all(
        set(row) == {"i", "j", "raw", "text", "probes", "signed_permutation", "random_rotation"}
        for row in rows.values()
    )
    worse = max(result["donor_a_nats"], result["donor_b_nats"])
    for name in ("text", "probes"):
        removed = [(row["raw"] - row[name]) / (row["raw"] - worse) for row in rows.values()]
        assert result["median_excess_removed"][name] == pytest.approx(statistics.median(removed))
        balanced = [row[name] for (i, j), row in rows.items() if i >= 2 and j <= 4]
        assert result["best_balanced"][name] == pytest.approx(min(balanced))

    recipe = recipe_of(
        [Block(a, 0), Block(a, 1), Block(a, 2), *(Block(b, index) for index in range(4, 6))]
    )
    opened = open_donors(recipe)
    models = {name: load_model(donor) for name, donor in opened.items()}
    ids = torch.from_numpy(encode(load_tokenizer(opened[a]), text.read_text(), "text").ids[1:])
    windows = ids[: len(ids) // 63 * 63].view(-1, 63)
    windows = torch.cat([torch.zeros(len(windows), 1, dtype=torch.int64), windows], 1)[
        len(windows) // 2 :
    ]
    with torch.no_grad():
        for model, found in (
            (assemble(resolve(recipe, opened), models), rows[3, 4]["raw"]),
            (models[a], result["donor_a_nats"]),
        ):
            logits = model(input_ids=windows).logits[:, :-1]
            expected = -logits.log_softmax(-1).gather(2, windows[:, 1:, None]).mean()
            assert found == pytest.approx(float(expected), rel=1e-5)


def test_some_splices_are_taken_evenly(donors, text):
    arguments = [
        "--donor-a",
        str(donors["a"]),
        "--donor-b",
        str(donors["b"]),
        "--text",
        str(text),
        "--json",
        "--refine",
        "0",
        "--splices",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    assert [(row["i"], row["j"]) for row in json.loads(done.stdout)["splices"]] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
    ]
