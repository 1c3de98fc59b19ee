"""The script that averages donors: aligning B does not change its outputs, and raw averages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_donor
from torch.nn import functional

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.language import encode
from frankenmerge.models.loading import load_model, load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "evals" / "averaging.py"
WAYS = ("raw", "gauge", "matched", "gauge_matched")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_averages_are_measured_raw_and_aligned(tied, text, tmp_path):
    a, b = (
        str(write_donor(tmp_path / str(seed), seed=seed, tie_word_embeddings=tied))
        for seed in (1, 2)
    )
    arguments = ["--donor-a", a, "--donor-b", b, "--text", str(text), "--windows", "2", "--json"]
    arguments += [word for t in (0.0, 0.5, 1.0) for word in ("--t", str(t))]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert set(result) == {"donor_a_nats", "donor_b_nats", "likeness", *WAYS}
    assert [len(values) for values in result["likeness"].values()] == [5, 4, 4]
    for way in WAYS:
        for nats in result[way].values():
            assert nats["0.0"] == pytest.approx(result["donor_a_nats"], abs=1e-3)
            assert nats["1.0"] == pytest.approx(result["donor_b_nats"], abs=1e-3)
    assert len({round(result[way]["linear"]["0.5"], 6) for way in WAYS}) == len(WAYS)

    models = [load_model(open_checkpoint(name)) for name in (a, b)]
    mean = {
        name: (value + models[1].state_dict()[name]) / 2
        for name, value in models[0].state_dict().items()
    }
    ids = torch.from_numpy(
        encode(load_tokenizer(open_checkpoint(a)), text.read_text(), "text").ids[1:]
    )
    windows = ids[: len(ids) // 63 * 63].view(-1, 63)[-2:]
    windows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), windows], 1)
    models[0].load_state_dict(mean)
    with torch.no_grad():
        logits = models[0](input_ids=windows).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert result["raw"]["linear"]["0.5"] == pytest.approx(float(expected), abs=1e-4)
