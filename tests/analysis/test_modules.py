"""The predicted damage of exchanging modules, against the divergence after exchanging them."""

import json

import numpy as np
import pytest
import torch
from conftest import write_donor
from relatives import noisy
from transformers import AutoModelForCausalLM

from frankenmerge.analysis.modules import module_damage, modules_in
from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import blocks_of


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    root = tmp_path_factory.mktemp("relatives")
    one = write_donor(root / "one", seed=1)
    return one, noisy(one, root / "other", 0.02, seed=2)


def divergence(model, changed_logits, ids) -> float:
    with torch.no_grad():
        own = model(input_ids=ids).logits.log_softmax(-1)
    return float((own.exp() * (own - changed_logits.log_softmax(-1))).sum(-1).mean())


def test_a_small_change_costs_what_is_predicted(relatives):
    host, guest = (AutoModelForCausalLM.from_pretrained(path).eval() for path in relatives)
    size = host.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, size, (64, 24)))
    found = module_damage(host, guest, ids)
    assert set(found) == set(modules_in(blocks_of(host)[0])) >= {"", "mlp", "self_attn.q_proj"}
    for path in ("self_attn", "mlp", "mlp.down_proj", "self_attn.v_proj"):
        own, other = (blocks_of(model)[1].get_submodule(path) for model in (host, guest))
        kept = {name: value.clone() for name, value in own.state_dict().items()}
        own.load_state_dict(other.state_dict())
        with torch.no_grad():
            changed = host(input_ids=ids).logits
        own.load_state_dict(kept)
        measured = divergence(host, changed, ids)
        assert found[path][1, 1] == pytest.approx(measured, rel=0.25), path
    assert np.isnan(found["mlp"][0, 2]) and found["mlp"][0, 1] > found["mlp"][0, 0] > 0


def test_a_module_costs_nothing_in_its_own_place(relatives):
    host = AutoModelForCausalLM.from_pretrained(relatives[0]).eval()
    found = module_damage(host, host, torch.zeros(2, 4, dtype=torch.long))
    assert all((table.diagonal() == 0).all() for table in found.values())


def test_align_writes_and_prints_it(run, relatives, tmp_path):
    path = tmp_path / "ab.alignment.safetensors"
    arguments = ("align", *relatives, "-o", path, "--modules")
    status, printed, error = run(*arguments)
    assert status == 0, error
    assert "whole block" in printed and "mlp.gate_proj" in printed
    kept = load_alignment(path).modules
    status, printed, _ = run(*arguments, "--json")
    found = json.loads(printed)["modules"]
    assert found["b"]["mlp"][0][0] == pytest.approx(float(kept.b["mlp"][0, 0]))
    assert found["a"]["mlp"][0][2] is None


def test_other_shapes_are_refused(run, relatives, donors, tmp_path):
    host = AutoModelForCausalLM.from_pretrained(relatives[0])
    guest = AutoModelForCausalLM.from_pretrained(donors["g"])
    with pytest.raises(FrankenmergeError, match="leave --modules out"):
        module_damage(host, guest, torch.zeros(1, 4, dtype=torch.long))
