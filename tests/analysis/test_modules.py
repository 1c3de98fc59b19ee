"""Scores of single modules, beside models in which the module was really replaced."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import write_donor

from frankenmerge.analysis.modules import module_scores, modules_of_block
from frankenmerge.analysis.probes import random_probes
from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import block_outputs, blocks_of, forward
from frankenmerge.models.loading import load_model


@pytest.fixture(scope="module")
def models(donors):
    return [load_model(open_checkpoint(str(donors[name]))) for name in "ab"]


def after(model, block: int) -> torch.Tensor:
    """The stream after a block on the probes, by transformers, without first positions."""
    with torch.no_grad(), block_outputs(model) as states:
        forward(model, input_ids=torch.from_numpy(random_probes(48)))
    return states[block + 1][:, 1:]


def test_a_score_is_the_change_of_the_stream_of_a_changed_model(models):
    a, b = models
    found = module_scores(a, b)
    assert found.names[:2] == ["self_attn", "mlp"] and "mlp.down_proj" in found.names
    own = after(a, 2)
    for name in ("self_attn", "self_attn.v_proj", "mlp.up_proj"):
        changed_model = copy.deepcopy(a)
        changed_model.model.layers[2].get_submodule(name).load_state_dict(
            b.model.layers[1].get_submodule(name).state_dict()
        )
        changed = after(changed_model, 2)
        size = (own.norm(dim=-1) * changed.norm(dim=-1)).sqrt()
        expected = 1 - ((own - changed).norm(dim=-1) / size).mean().item()
        row = found.names.index(name)
        assert found.replacement[0][row, 2, 1] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(found.replacement[0][:, 0, 2]).all()
    np.testing.assert_array_equal(module_scores(b, a).replacement[1], found.replacement[0])


def test_a_donor_with_itself_does_not_change(models):
    own = module_scores(models[0], models[0]).replacement[0]
    assert own[:, range(4), range(4)] == pytest.approx(1, abs=1e-6)


def test_gpt2_has_maps_too(donors):
    model = load_model(open_checkpoint(str(donors["g"])))
    assert {"attn.c_attn", "mlp.c_proj"} < set(modules_of_block(blocks_of(model)[0]))
    assert np.isfinite(module_scores(model, model).replacement[0][:, 0, :2]).all()


def test_blocks_of_other_shapes_are_refused(models, tmp_path):
    wide = write_donor(tmp_path / "wide", intermediate_size=32)
    with pytest.raises(FrankenmergeError, match="mlp"):
        module_scores(models[0], load_model(open_checkpoint(str(wide))))


def test_align_writes_them(donors, run, tmp_path):
    path = tmp_path / "ab.alignment.safetensors"
    code, out, err = run("align", donors["a"], donors["b"], "--modules", "-o", path, "--json")
    assert code == 0, err
    printed, found = json.loads(out)["modules"], load_alignment(path).modules
    assert printed["mlp.up_proj"][1][0][3] is None
    row = found.names.index("mlp.up_proj")
    assert printed["mlp.up_proj"][0][1][2] == pytest.approx(found.replacement[0][row, 1, 2])
    swapped = load_alignment(path).transposed.modules.replacement[0]
    np.testing.assert_array_equal(swapped, found.replacement[1])
