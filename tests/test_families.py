"""Every family end to end, held against the donors' own forward passes.

The tests run over `FAMILIES`, so that a new entry is tested at once.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import changed, write_donor
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.specs import FeatureSpec
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.families import FAMILIES
from frankenmerge.merging.schedule import schedule
from frankenmerge.merging.writer import merge
from frankenmerge.models import load_model, virtual_splice
from frankenmerge.recipe import Block, open_donors, recipe_of
from frankenmerge.splice import compatibility, result_config

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
"""Where a family keeps its blocks, if not in `model.layers`."""

KINDS = {
    "mistral": {"sliding_window": 3},
    "mixtral": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "sliding_window_pattern": 3},
    "smollm3": {"use_sliding_window": True, "sliding_window": 3, "no_rope_layer_interval": 2},
    "cohere2": {"sliding_window": 3, "sliding_window_pattern": 3},
}
"""What gives a family's donors blocks of several kinds, and windows shorter than the input."""

CASES = {family: (family, KINDS.get(family, {})) for family in FAMILIES} | {
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2 without window": ("qwen2", {}),
    "qwen3_moe of chosen dense blocks": ("qwen3_moe", {"mlp_only_layers": [0, 3], "use_sliding_window": True, "sliding_window": 3}),
    "qwen3_moe without dense blocks": ("qwen3_moe", {}),
    "stablelm with options": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm in parallel": ("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
}

SPLICES = {
    "deeper": [("tied", 0), ("tied", 1), ("tied", 2), ("tied", 1), ("tied", 2), ("tied", 2), ("tied", 3)],
    "shallower": [("untied", 0), ("untied", 2), ("untied", 3)],
    "interleaved": [("tied", 0), ("untied", 0), ("tied", 1), ("tied", 2), ("untied", 1), ("untied", 3)],
    "the other way round": [("untied", 1), ("tied", 0), ("untied", 2), ("untied", 3), ("tied", 3)],
}
IDS = torch.tensor([[0, 7, 30, 7, 12, 41, 3, 3], [5, 5, 2, 47, 19, 1, 8, 0]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make two donors of a case once, one whose head is its embedding and one whose head is not."""
    made = {}

    def make(family: str, settings: dict) -> dict[str, Path]:
        key = json.dumps([family, settings], sort_keys=True)
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            made[key] = {
                name: write_donor(root / name, family, seed=seed, **settings | {"tie_word_embeddings": name == "tied"})
                for seed, name in enumerate(("tied", "untied"))
            }
        return made[key]

    return make


def family_of(model) -> str:
    return model.config.model_type


def blocks_in(model) -> torch.nn.ModuleList:
    return model.get_submodule(BLOCKS.get(family_of(model), "model.layers"))


@torch.no_grad()
def run(model, *, entering: dict[int, torch.Tensor] | None = None, leaving: dict[int, torch.Tensor] | None = None):
    """The library's own forward pass: what enters and leaves every block, and the logits; some of them replaced on the way."""
    seen, handles = {"in": {}, "out": {}}, []
    for index, block in enumerate(blocks_in(model)):

        def before(_module, args, kwargs, index=index):
            state = (entering or {}).get(index, args[0] if args else kwargs["hidden_states"])
            seen["in"][index] = state
            return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

        def after(_module, _args, output, index=index):
            seen["out"][index] = output if isinstance(output, torch.Tensor) else output[0]
            if replaced := {index} & set(leaving or {}):
                state = leaving[replaced.pop()]
                return state if isinstance(output, torch.Tensor) else (state, *output[1:])

        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        logits = model(input_ids=IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def by_the_donors(order, models) -> torch.Tensor:
    """The splice's logits, every block computed inside its own donor: it cannot know that it was moved."""
    state = run(models[order[0][0]])[0]["in"][0]
    for name, index in order:
        state = run(models[name], entering={index: state})[0]["out"][index]
    last = models[order[-1][0]]
    return run(last, leaving={len(blocks_in(last)) - 1: state})[1]


def spliced(order, folders, output):
    """Merge, and splice in memory: the checkpoint as the library loads it, and the logits of both."""
    recipe = recipe_of([Block(str(folders[name]), index) for name, index in order])
    donors = open_donors(recipe)
    merge(recipe, donors, output)
    loaded, told = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    models = {name: load_model(donor) for name, donor in donors.items()}
    virtual = virtual_splice(recipe, donors, models)
    wanted = by_the_donors(order, {name: models[str(folders[name])] for name in {name for name, _ in order}})
    return loaded.eval(), run(loaded.eval())[1], run(virtual)[1], wanted


@pytest.mark.parametrize("order", SPLICES.values(), ids=SPLICES)
@pytest.mark.parametrize("case", CASES)
def test_a_splice_computes_what_its_blocks_compute_in_their_donors(pair, tmp_path, case, order):
    loaded, on_disk, in_memory, wanted = spliced(order, pair(*CASES[case]), tmp_path / "out")
    assert loaded.config.num_hidden_layers == len(blocks_in(loaded)) == len(order)
    assert torch.equal(on_disk, in_memory)
    torch.testing.assert_close(in_memory, wanted)
