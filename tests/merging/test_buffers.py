"""Buffers that old checkpoints store next to their weights: they are no donor type."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, in_memory, write_donor
from transformers import AutoModelForCausalLM

from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint

Arrays = dict[str, np.ndarray]


def masks(dtype: type, part: str) -> Callable[[Arrays], Arrays]:
    """Add the causal masks that old versions of transformers stored in every block."""

    def add(arrays: Arrays) -> Arrays:
        mask = np.tril(np.ones((1, 1, 64, 64), dtype))
        masked = {"masked_bias": np.array(-1e9, np.float32), "bias": mask}
        return arrays | {
            part.format(index) + name: array for index in range(4) for name, array in masked.items()
        }

    return add


def frequencies(arrays: Arrays) -> Arrays:
    """Add the float32 frequencies of every block, as Llama 2 has them."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return arrays | {name.format(index): np.ones(2, np.float32) for index in range(4)}


NEOX, GPT2 = "gpt_neox.layers.{}.attention.", "transformer.h.{}.attn."
CASES = {
    "Pythia, U8": ("gpt_neox", "float16", masks(np.uint8, NEOX)),
    "Pythia, BOOL": ("gpt_neox", "float16", masks(np.bool_, NEOX)),
    "GPT-2, U8": ("gpt2", "float32", masks(np.uint8, GPT2)),
    "GPT-2, BOOL": ("gpt2", "float32", masks(np.bool_, GPT2)),
    "Llama 2, inv_freq": ("llama", "float16", frequencies),
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path) -> list[Path]:
    """Two donors of a case, with their buffers."""
    family, dtype, add = CASES[request.param]
    folders = []
    for seed, name in enumerate(("first", "second")):
        plain = write_donor(tmp_path / f"plain-{name}", family, seed=seed, dtype=dtype)
        folders.append(changed(plain, tmp_path / name, add))
    return folders


def loaded(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_buffers_do_not_count_as_types_or_parameters(pair):
    plain = [open_checkpoint(str(folder.parent / f"plain-{folder.name}")) for folder in pair]
    for donor, bare in zip((open_checkpoint(str(folder)) for folder in pair), plain, strict=True):
        assert donor.dtypes == bare.dtypes and donor.parameters == bare.parameters
        assert len(donor.tensors) > len(bare.tensors)


@torch.no_grad()
def test_a_plan_of_donors_with_buffers_is_merged_and_evaluated(pair, run, text, tmp_path):
    alignment, recipe = tmp_path / "x.alignment.safetensors", tmp_path / "recipe.yaml"
    assert run("align", *pair, "-o", alignment)[0] == 0
    assert run("plan", alignment, "-o", recipe, "--depth", 6)[0] == 0
    assert "dtype" not in recipe.read_text()
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    assert run("check", tmp_path / "merged")[0] == 0
    code, out, _ = run("evaluate", tmp_path / "merged", "--text", text, "--json")
    assert code == 0 and json.loads(out)
    ids = torch.arange(1, 20)[None]
    expected = in_memory(load_recipe(recipe)).float()(ids).logits
    assert torch.equal(loaded(tmp_path / "merged")(ids).logits, expected)


@torch.no_grad()
def test_an_average_of_donors_with_buffers_is_the_average_of_their_weights(pair, run, tmp_path):
    recipe = tmp_path / "linear.yaml"
    names = "".join(f"\n  - model: {folder}" for folder in pair)
    recipe.write_text(f"models:{names}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n")
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    models = [loaded(folder.parent / f"plain-{folder.name}") for folder in pair]
    states = [model.state_dict() for model in models]
    merged = loaded(tmp_path / "merged")
    stored = open_checkpoint(str(pair[0])).dtypes
    dtype = torch.float16 if "F16" in stored else torch.float32
    for name, tensor in merged.state_dict().items():
        mean = (states[0][name] * 0.5 + states[1][name] * 0.5).to(dtype).float()
        assert torch.equal(tensor, mean), name
