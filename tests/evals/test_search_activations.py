"""The script that measures how close gradient searches come to the top-activating token."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import block_outputs, forward
from frankenmerge.models.loading import load_model

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "evals" / "search_activations.py"))


@torch.no_grad()
def test_it_is_0_for_the_mean_and_1_for_the_best_token(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    found = SCRIPT["relative_activations"](model)
    with block_outputs(model) as states:
        forward(model, input_ids=torch.arange(48)[:, None])
    for block, state in enumerate(states):
        values = state[:, 0].T
        mean = values.mean(dim=1, keepdim=True)
        expected = (values - mean) / (values.amax(dim=1, keepdim=True) - mean)
        np.testing.assert_allclose(found[block], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_every_search_is_reported(donors):
    arguments = [
        "--donor",
        str(donors["a"]),
        "--first",
        "2",
        "--last",
        "4",
        "--block",
        "1",
        "--block",
        "3",
        "--json",
    ]
    result = CliRunner().invoke(SCRIPT["main"], arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["searches"]) == 2 + sum(map(len, SCRIPT["PRIORS"].values()))
    assert printed["made"]["blocks"] == [1, 3]
    for row in printed["searches"]:
        assert len(row["excitement"]) == 2 and max(row["excitement"]) <= 1 + 1e-6
        assert (row["gap"] is None) == ("gradient" in row["search"])
    assert max(row["excitement"][0] for row in printed["searches"]) > 0.5
    assert printed["searches"][2]["gap"][0] == pytest.approx(1 - 1 / 48, abs=0.02)
