"""The source document's questions of a model: shares as two complete searches give them."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from frankenmerge.analysis.complete import complete_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model, untrained_model

EVALS = Path(__file__).resolve().parents[2] / "evals"
BLOCKS = (1, 2, 4)


def test_shares_and_inputs_are_those_of_the_searches(donors, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EVALS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import real_features

    arguments = [str(donors["a"]), "--blocks", "1,2,4", "--sample", "20", "--json"]
    done = CliRunner().invoke(real_features.main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    checkpoint = open_checkpoint(str(donors["a"]))
    models = {"trained": load_model(checkpoint), "untrained": untrained_model(checkpoint, 0)}
    best = {
        name: complete_search(model, k=1).tokens[list(BLOCKS), :, 0]
        for name, model in models.items()
    }
    pairs = [(0, 1), (1, 2), (0, 2)]
    for row, (i, j) in zip(found["layers"], pairs, strict=True):
        assert row["blocks"] == [BLOCKS[i], BLOCKS[j]]
        for name, column in (("trained", "same token"), ("untrained", "untrained")):
            share = np.mean(best[name][i] == best[name][j])
            assert row[column] == pytest.approx(share, abs=1e-6)
    everywhere = (best["trained"] == best["trained"][0]).all(axis=0).mean()
    assert found["first"][0]["all"]["share"] == pytest.approx(everywhere)
    # Greedy inputs begin with the best tokens of all the vocabulary.
    for block, cells in enumerate(found["greedy"]["trained"]["inputs"]):
        assert [cell[0] for cell in cells] == found["complete"]["trained"][block]
