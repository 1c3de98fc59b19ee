"""Kinds of modules by the table, compared with the classes of transformers' own models."""

import pytest
from conftest import write_donor
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.models.modules import modules_of

BIASED = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "cohere2": {"attention_bias": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_those_of_transformers_modules(family, tmp_path):
    donor = open_checkpoint(str(write_donor(tmp_path / "donor", family, **BIASED.get(family, {}))))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    shapes = {name: tensor.shape for name, tensor in donor.tensors.items()}
    kinds, head = modules_of(donor, shapes)
    assert model.get_submodule(head) is model.get_output_embeddings()
    blocks = donor.architecture.root + donor.architecture.block.partition("{}")[0]
    checked = 0
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full not in kinds or not full.startswith(blocks):
                continue
            expected = "linear" if isinstance(module, nn.Linear) else "leaf"
            expected = "transposed" if isinstance(module, Conv1D) else expected
            found = "leaf" if kinds[full] == "inner" else kinds[full]
            assert found == expected, full
            checked += 1
    assert checked >= 16
