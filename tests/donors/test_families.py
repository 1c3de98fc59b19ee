"""Every family end to end, compared with the donors' own forward passes.

The tests run over `FAMILIES`, so that a new entry is tested at once.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import changed, resolved, write_donor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.merging.writer import merge
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.assemble import assemble

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

OPTIONS = {
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2 without window": ("qwen2", {}),
    "qwen3_moe of chosen dense blocks": (
        "qwen3_moe",
        {"mlp_only_layers": [0, 3], "use_sliding_window": True, "sliding_window": 3},
    ),
    "qwen3_moe without dense blocks": ("qwen3_moe", {}),
    "stablelm with options": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm in parallel": (
        "stablelm",
        {"use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
}
UNLISTED = {
    "gemma": ("gemma", {"head_dim": 8}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"residual_multiplier": 0.7, "embedding_multiplier": 3.0}),
    "olmo3": ("olmo3", {"sliding_window": 3}),
}
"""Families that are not in the table."""
CASES = {family: (family, KINDS.get(family, {})) for family in FAMILIES} | OPTIONS | UNLISTED

SPLICES = {
    "deeper": [
        ("tied", 0),
        ("tied", 1),
        ("tied", 2),
        ("tied", 1),
        ("tied", 2),
        ("tied", 2),
        ("tied", 3),
    ],
    "shallower": [("untied", 0), ("untied", 2), ("untied", 3)],
    "interleaved": [
        ("tied", 0),
        ("untied", 0),
        ("tied", 1),
        ("tied", 2),
        ("untied", 1),
        ("untied", 3),
    ],
    "the other way round": [("untied", 1), ("tied", 0), ("untied", 2), ("untied", 3), ("tied", 3)],
}
IDS = torch.tensor([[0, 7, 30, 7, 12, 41, 3, 3], [5, 5, 2, 47, 19, 1, 8, 0]])


class Pair(NamedTuple):
    """Two donors: one whose head is its embedding, and one whose head is not."""

    folders: dict[str, Path]
    models: dict[str, PreTrainedModel]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make the donors of a case once, and load them."""

    @functools.cache
    def make(case: str) -> Pair:
        family, settings = CASES[case]
        root = tmp_path_factory.mktemp("pair")
        folders = {
            name: write_donor(
                root / name, family, seed=seed, **settings | {"tie_word_embeddings": name == "tied"}
            )
            for seed, name in enumerate(("tied", "untied"))
        }
        return Pair(
            folders,
            {name: load_model(open_checkpoint(str(folder))) for name, folder in folders.items()},
        )

    return make


def family_of(model) -> str:
    return model.config.model_type


def blocks_in(model) -> torch.nn.ModuleList:
    return model.get_submodule(BLOCKS.get(family_of(model), "model.layers"))


@torch.no_grad()
def passed(
    model,
    input_ids=IDS,
    *,
    entering: dict[int, torch.Tensor] | None = None,
    leaving: dict[int, torch.Tensor] | None = None,
):
    """The library's own forward pass: inputs and outputs of every block, and the logits.

    Some inputs and outputs are replaced.
    """
    seen, handles = {"in": {}, "out": {}}, []
    for index, block in enumerate(blocks_in(model)):

        def before(_module, args, kwargs, index=index):
            state = (entering or {}).get(index, args[0] if args else kwargs["hidden_states"])
            seen["in"][index] = state
            return (
                ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})
            )

        def after(_module, _args, output, index=index):
            seen["out"][index] = output if isinstance(output, torch.Tensor) else output[0]
            if replaced := {index} & set(leaving or {}):
                state = leaving[replaced.pop()]
                return state if isinstance(output, torch.Tensor) else (state, *output[1:])

        handles += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after),
        ]
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def by_the_donors(order, models) -> torch.Tensor:
    """The splice's logits, with every block computed inside its own donor."""
    state = passed(models[order[0][0]])[0]["in"][0]
    for name, index in order:
        state = passed(models[name], entering={index: state})[0]["out"][index]
    last = models[order[-1][0]]
    return passed(last, leaving={len(blocks_in(last)) - 1: state})[1]


def spliced(order, pair, output):
    """Merge, and splice in memory: the loaded checkpoint, and the logits of both."""
    splice = resolved(recipe_of([Block(str(pair.folders[name]), index) for name, index in order]))
    merge(splice, output)
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    models = {str(pair.folders[name]): pair.models[name] for name, _ in order}
    virtual = assemble(splice, models)
    return loaded.eval(), passed(loaded)[1], passed(virtual)[1]


@pytest.mark.parametrize(
    "case, splice",
    [*itertools.product(FAMILIES, SPLICES), *itertools.product(OPTIONS, ["interleaved"])],
)
def test_a_splice_computes_what_its_blocks_compute_in_their_donors(pair, tmp_path, case, splice):
    order = SPLICES[splice]
    loaded, on_disk, in_memory = spliced(order, pair(case), tmp_path / "out")
    assert loaded.config.num_hidden_layers == len(blocks_in(loaded)) == len(order)
    assert torch.equal(on_disk, in_memory)
    torch.testing.assert_close(in_memory, by_the_donors(order, pair(case).models))


def test_donors_whose_dense_blocks_lie_elsewhere_are_spliced(pair, tmp_path):
    first, other = pair("qwen3_moe"), pair("qwen3_moe without dense blocks")
    both = Pair(
        *(
            {"tied": one["tied"], "untied": two["untied"]}
            for one, two in zip(first, other, strict=True)
        )
    )
    for splice in ("interleaved", "the other way round"):
        loaded, on_disk, in_memory = spliced(SPLICES[splice], both, tmp_path / splice)
        assert loaded.config.mlp_only_layers == [
            at
            for at, (name, index) in enumerate(SPLICES[splice])
            if name == "tied" and index in (0, 2)
        ]
        assert torch.equal(on_disk, in_memory)
        torch.testing.assert_close(in_memory, by_the_donors(SPLICES[splice], both.models))


# Checkpoints from before the lists


OLD = [
    family
    for family, entry in FAMILIES.items()
    if any(part.rule and not part.marker for part in entry.per_block)
]
"""The families that take a block to be what a rule says of its index, where config.json has no
list.
"""


def without_lists(family: str):
    """Put a config into the form it had before its lists."""
    lists = {part.key for part in FAMILIES[family].per_block}
    return lambda config: (
        {key: value for key, value in config.items() if key not in lists} | KINDS[family]
    )


@pytest.mark.parametrize("family", OLD)
def test_blocks_of_old_checkpoints_stay_what_their_rule_made_them(pair, tmp_path, family):
    newer = pair(family)
    old = {
        name: changed(folder, tmp_path / name, config=without_lists(family))
        for name, folder in newer.folders.items()
    }
    for number, folders in enumerate(
        (old, old | {"tied": newer.folders["tied"]}, newer.folders | {"tied": old["tied"]})
    ):
        _, on_disk, in_memory = spliced(
            SPLICES["interleaved"], Pair(folders, newer.models), tmp_path / f"out{number}"
        )
        assert torch.equal(on_disk, in_memory)
        torch.testing.assert_close(in_memory, by_the_donors(SPLICES["interleaved"], newer.models))


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("blocks", [1, 6, 13])
@pytest.mark.parametrize("family", OLD)
def test_a_family_s_rule_is_the_library_s(family, blocks, number):
    config = {
        "model_type": family,
        "num_hidden_layers": blocks,
        "use_sliding_window": True,
        "sliding_window": 5,
    }
    config |= {name: number for part in FAMILIES[family].per_block for name in part.numbers}
    library = AutoConfig.for_model(**config)
    for part in FAMILIES[family].per_block:
        assert [part.of(config, index) for index in range(blocks)] == getattr(library, part.key)


# Searches


@pytest.mark.parametrize("family", FAMILIES)
def test_complete_search_finds_what_a_forward_pass_shows(pair, family):
    model = pair(family).models["untied"]
    top = complete_search(model, k=2)
    seen, _ = passed(model, input_ids=torch.arange(48)[:, None])
    for block, state in enumerate([seen["in"][0], *seen["out"].values()]):
        best = state[:, -1].topk(2, dim=0)
        assert top.tokens[block].tolist() == best.indices.T.tolist()
        torch.testing.assert_close(torch.from_numpy(top.values[block]), best.values.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_search_takes_the_best_token_at_every_step(pair, family):
    model = pair(family).models["untied"]
    features = [Feature.of(block, neuron) for block, neuron in ((1, 0), (2, 5), (4, 9))]
    result = greedy_search(model, features, n=5)
    for feature, tokens, values in zip(
        features, result.tokens.tolist(), result.values, strict=True
    ):
        for step, value in enumerate(values):
            inputs = torch.tensor([[*tokens[:step], token] for token in range(48)])
            found = passed(model, input_ids=inputs)[0]["out"][feature.block - 1][
                :, -1, feature.neuron
            ]
            torch.testing.assert_close(found[tokens[step]], found.max())
            torch.testing.assert_close(torch.tensor(value), found.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_search_descends_on_the_loss_of_a_forward_pass(pair, family):
    model = pair(family).models["untied"]
    features = [Feature.of(block, neuron) for block, neuron in ((1, 0), (2, 5), (4, 9))]
    start = (7, 30, 12, 41, 3)
    result = gradient_search(model, features, start=start, steps=20, target=100.0)
    seen, _ = passed(model, input_ids=torch.tensor([start]))
    for row, feature in enumerate(features):
        activations = seen["out"][feature.block - 1][0, :, feature.neuron]
        torch.testing.assert_close(result.losses[0, row], 0.1 * (100 - activations).abs().sum())
    assert (result.losses[-1] < result.losses[0] - 0.01).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_says_that_two_donors_of_a_family_can_be_spliced(pair, run, family):
    result = json.loads(run("inspect", *pair(family).folders.values(), "--json")[1])
    assert result["spliceable"] and result["reasons"] == []
    parameters = {
        name: sum(value.numel() for value in model.parameters())
        for name, model in pair(family).models.items()
    }
    for row, name in zip(result["donors"], ("tied", "untied"), strict=True):
        assert (row["family"], row["blocks"], row["tied"], row["parameters"]) == (
            family,
            4,
            name == "tied",
            parameters[name],
        )
