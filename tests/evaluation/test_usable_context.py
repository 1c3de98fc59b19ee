"""Windows that are longer than a model can use are found by the loss at their positions."""

import json

import numpy as np
import pytest
import torch
from conftest import write_donor

from frankenmerge.evaluation.language import PARTS, Loss
from frankenmerge.evaluation.usable_context import rise_of


def losses(rise: float, part: int, windows: int = 40, noise: float = 0.3) -> Loss:
    """Losses that fall at the beginning of windows and rise at a part of them."""
    levels = np.where(np.arange(PARTS) < part, 2.0, 2.0 + rise)
    levels[0] += 0.5
    generator = np.random.default_rng(0)
    by_position = levels + noise * generator.standard_normal((windows, PARTS))
    return Loss(by_position.ravel(), by_position.size, by_position=by_position)


@pytest.mark.parametrize("part", [4, 8, 12])
def test_a_planted_rise_is_found_where_it_is(part):
    found = rise_of(losses(2.0, part), 512)
    assert found and found.position == 512 * part // PARTS
    assert found.nats == pytest.approx(2 - 0.5 / part, abs=0.15)


@pytest.mark.parametrize(
    "loss",
    [losses(0.0, 8), losses(0.4, 8), losses(2.0, 8, windows=3), losses(0.7, 8, noise=9.0)],
    ids=["none", "small", "few windows", "noise"],
)
def test_no_rise_is_claimed(loss):
    assert rise_of(loss, 512) is None
    assert rise_of(loss._replace(by_position=None), 512) is None


@pytest.fixture
def forgetful(tmp_path):
    """A GPT-2 whose later positions disturb what it predicts, and a text that it likes before."""
    from transformers import AutoModelForCausalLM

    folder = write_donor(tmp_path / "forgetful", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.0)
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight[1, 0] = 3.0  # the token "a", which is always likely ...
        model.transformer.wpe.weight[:, 0] = 10.0
        model.transformer.wpe.weight[32:, 0] = -10.0  # ... but behind 32 tokens
    model.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a" * 2000)
    return folder, text


def test_evaluate_uses_the_shorter_windows_and_says_so(forgetful, run):
    folder, text = forgetful
    code, out, err = run("evaluate", folder, "--text", text, "--json")
    found = json.loads(out)
    assert code == 0 and found["context"] == 32
    assert "behind 32 tokens" in err and "all windows have 32 tokens" in err
    code, out, err = run("evaluate", folder, "--text", text, "--context", 64, "--json")
    longer = json.loads(out)
    assert code == 0 and longer["context"] == 64 and "behind" not in err
    assert longer["models"][0]["nats_per_token"] > found["models"][0]["nats_per_token"] + 0.5
