"""The script that measures the main claim: its figures are recomputed from its measurements."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "evals" / "splice_prediction.py"


@pytest.mark.slow
def test_every_single_seam_splice_is_measured_and_ranked(donors, text):
    a, b = str(donors["a"]), str(donors["deep"])
    arguments = ["--donor-a", a, "--donor-b", b, "--text", str(text), "--several", "20", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["splices"] == 4 * 6 == len(result["measured"])
    pairs = [(row["i"], row["j"]) for row in result["measured"]]
    assert set(pairs) == {(i, j) for i in range(1, 5) for j in range(6)}
    nats = [row["nats_per_token"] for row in result["measured"]]
    rho = result["spearman"]["-abs(i-j)"]
    assert rho["all"] == pytest.approx(
        spearmanr([-abs(i - j) for i, j in pairs], [-n for n in nats]).statistic
    )
    kept = [index for index, (i, j) in enumerate(pairs) if i >= j]
    expected = spearmanr(
        [-abs(pairs[index][0] - pairs[index][1]) for index in kept],
        [-nats[index] for index in kept],
    ).statistic
    assert rho["non_skipping"] == pytest.approx(expected)
    assert {"argmax", "jaccard", "correlation"} <= set(result["spearman"])
    recipe = recipe_of(
        [Block(a, 0), Block(a, 1), Block(a, 2), *(Block(b, index) for index in range(1, 6))]
    )
    opened = open_donors(recipe)
    bench = Bench([read_text(text)], opened)
    alone = bench.splice("3,1", resolve(recipe, opened)).total.nats_per_token
    assert nats[pairs.index((3, 1))] == pytest.approx(alone)
    assert result["several"] == 20 and set(result["predicted"]) >= {
        "non_skipping",
        "all",
        "multi_seam",
        "ci",
    }
    low, high = result["spearman"]["jaccard"]["ci"]
    assert -1 <= low <= result["spearman"]["jaccard"]["non_skipping"] <= high <= 1
