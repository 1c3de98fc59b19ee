"""Models in memory, compared with transformers' own forward pass."""

import numpy as np
import pytest
import torch
from conftest import changed, resolved, write_donor
from safetensors.torch import load_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import block_outputs, blocks_of, embedding_of, forward
from frankenmerge.models.loading import Placement, load_model, load_tokenizer, untrained_model
from frankenmerge.splicing.assemble import assemble

FAMILIES = {
    "llama": "norm",
    "mistral": "norm",
    "qwen2": "norm",
    "qwen3": "norm",
    "phi3": "norm",
    "olmo2": "norm",
    "gpt2": "ln_f",
    "gpt_neox": "final_layer_norm",
}
"""What each family calls its final norm."""

IDS = torch.tensor([[0, 7, 30, 7, 12, 41], [5, 5, 2, 47, 19, 1]])


def loaded(path):
    return load_model(open_checkpoint(str(path)))


def splice(blocks):
    splice = resolved(recipe_of([Block(str(path), index) for path, index in blocks]))
    models = {name: load_model(donor) for name, donor in splice.donors.items()}
    return assemble(splice, models), models


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A donor of every family, with the name of its final norm."""
    return write_donor(tmp_path / "donor", request.param, seed=7), FAMILIES[request.param]


@torch.no_grad()
def test_block_outputs_are_the_hidden_states_of_transformers(family):
    model = loaded(family[0])
    with block_outputs(model) as states:
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 5
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        assert torch.equal(state, hidden)
    norm = model.base_model.get_submodule(family[1])
    assert torch.equal(norm(states[-1]), expected[-1])


@torch.no_grad()
def test_forward_collects_the_same_as_a_pass_with_the_head(family):
    model = loaded(family[0])
    with block_outputs(model) as states:
        model(input_ids=IDS)
        expected = list(states)
        forward(model, input_ids=IDS)
        assert all(torch.equal(state, other) for state, other in zip(states, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("last", [1, 3, 4])
def test_a_pass_ends_after_the_last_block_wanted(donors, last):
    model = loaded(donors["a"])
    ran = []
    for number, block in enumerate(blocks_of(model), 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with block_outputs(model, last=last) as states:
        forward(model, input_ids=IDS)
    assert ran == list(range(1, last + 1))
    expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == last + 1
    assert all(
        torch.equal(state, hidden) for state, hidden in zip(states, expected[:4], strict=False)
    )


@torch.no_grad()
@pytest.mark.parametrize("donor", ["a", "g"])
def test_an_isolated_block_gives_what_it_gives_as_the_only_block(donors, donor):
    model = loaded(donors[donor])
    with block_outputs(model, isolated=True) as isolated:
        forward(model, input_ids=IDS)
    for index in range(4):
        alone, _ = splice([(donors[donor], index)])
        with block_outputs(alone) as states:
            forward(alone, input_ids=IDS)
        assert torch.equal(isolated[index + 1], states[1])


@torch.no_grad()
@pytest.mark.parametrize("donor", ["a", "g"])
def test_attention_and_mlp_make_up_the_difference_between_blocks(donors, donor):
    model = loaded(donors[donor])
    mlps = []
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda _module, _args, output: mlps.append(output))
    with block_outputs(model) as blocks:
        forward(model, input_ids=IDS)
    with block_outputs(model, site="attention") as attentions:
        forward(model, input_ids=IDS)
    assert torch.equal(attentions[0], blocks[0])
    for before, after, attention, mlp in zip(
        blocks, blocks[1:], attentions[1:], mlps[:4], strict=False
    ):
        torch.testing.assert_close(before + attention + mlp, after)


def test_the_embedding_is_the_matrix_in_the_file(donors):
    weights = load_file(donors["g"] / "model.safetensors")
    assert torch.equal(embedding_of(loaded(donors["g"])), weights["transformer.wte.weight"])


@pytest.mark.parametrize("options", [{}, {"isolated": True}, {"site": "attention"}, {"last": 2}])
def test_hooks_are_removed_after_an_exception(donors, options):
    model = loaded(donors["a"])
    with pytest.raises(ZeroDivisionError), block_outputs(model, **options):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_after_a_pass_that_fails(donors):
    model = loaded(donors["a"])
    with pytest.raises(IndexError), block_outputs(model):
        forward(model, input_ids=torch.tensor([[48]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_an_unspliced_donor_gives_its_own_logits_exactly(family):
    path, _ = family
    model, _ = splice([(path, index) for index in range(4)])
    assert torch.equal(model(input_ids=IDS).logits, loaded(path)(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "first, last", [("a", "b"), ("b", "a"), ("a", "a"), ("b", "b"), ("g", "h"), ("g", "g")]
)
def test_a_splice_computes_its_blocks_one_after_the_other(donors, first, last):
    order = [(first, 0), (first, 1), (last, 1), (last, 3)]
    model, models = splice([(donors[name], index) for name, index in order])
    head, tail = models[str(donors[first])], models[str(donors[last])]
    states = head.get_input_embeddings()(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    extra = {}
    if first == "g":
        states = states + head.transformer.wpe(positions)
    else:
        extra = {"position_embeddings": head.model.rotary_emb(states, positions)}
    for name, index in order:
        output = blocks_of(models[str(donors[name])])[index](states, **extra)
        states = output if isinstance(output, torch.Tensor) else output[0]
    norm = tail.transformer.ln_f if first == "g" else tail.model.norm
    expected = tail.lm_head(norm(states))
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("first, last", [("a", "b"), ("b", "a"), ("g", "h")])
def test_a_splice_shares_its_donors_storage(donors, first, last):
    order = [
        (donors[first], 0),
        (donors[first], 1),
        (donors[last], 1),
        (donors[last], 3),
        (donors[last], 3),
    ]
    model, models = splice(order)
    for block, (path, index) in zip(blocks_of(model), order, strict=True):
        donor = dict(blocks_of(models[str(path)])[index].named_parameters())
        assert {name: value.data_ptr() for name, value in block.named_parameters()} == {
            name: value.data_ptr() for name, value in donor.items()
        }
    head, tail = models[str(donors[first])], models[str(donors[last])]
    assert embedding_of(model).data_ptr() == embedding_of(head).data_ptr()
    assert model.lm_head.weight.data_ptr() == tail.lm_head.weight.data_ptr()
    stored = {
        value.untyped_storage().data_ptr()
        for donor in models.values()
        for value in donor.parameters()
    }
    assert all(value.untyped_storage().data_ptr() in stored for value in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("first, last", [("a", "b"), ("b", "b"), ("g", "h")])
def test_a_splice_leaves_its_donors_as_they_were(donors, first, last):
    recipe = recipe_of(
        [Block(str(donors[first]), 0), Block(str(donors[last]), 1), Block(str(donors[last]), 0)]
    )
    spliced = resolved(recipe)
    models = {name: load_model(donor) for name, donor in spliced.donors.items()}
    before = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in models.items()
    }
    configs = {name: model.config.to_dict() for name, model in models.items()}
    logits = {name: model(input_ids=IDS).logits for name, model in models.items()}
    assemble(spliced, models)(input_ids=IDS)
    for name, model in models.items():
        now = model.state_dict()
        assert now.keys() == before[name].keys()
        assert all(torch.equal(now[key], value) for key, value in before[name].items())
        assert model.config.to_dict() == configs[name]
        assert torch.equal(model(input_ids=IDS).logits, logits[name])


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("gpt2", {}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 3,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
        ),
    ],
)
def test_generation_with_a_cache_equals_generation_without_where_blocks_repeat(
    tmp_path, family, changes
):
    path = write_donor(tmp_path / "donor", family, seed=3, **changes)
    model, _ = splice([(path, index) for index in (0, 1, 1, 2, 0, 1, 2, 3)])
    options = {
        "attention_mask": torch.ones_like(IDS),
        "min_new_tokens": 16,
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
    }
    details = {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (
        model.generate(IDS, use_cache=use_cache, **options, **details)
        for use_cache in (True, False)
    )
    assert cached.sequences.shape == (2, 22)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))


@torch.no_grad()
def test_a_block_keeps_its_own_kind_of_attention_when_it_moves(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    path = write_donor(
        tmp_path / "donor",
        "qwen2",
        seed=3,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=kinds,
    )
    model, _ = splice([(path, index) for index in (0, 3, 2, 1)])
    assert model.config.layer_types == [kinds[index] for index in (0, 3, 2, 1)]
    other = IDS.clone()
    other[:, 0] = 33  # out of reach of a window of two for every position but the next
    only_sliding, _ = splice([(path, 1)])
    before, after = only_sliding(input_ids=IDS).logits, only_sliding(input_ids=other).logits
    assert torch.equal(before[:, 2:], after[:, 2:]) and not torch.equal(before[:, 1], after[:, 1])


def test_a_splice_of_ranges_that_do_not_exist_is_refused(donors):
    with pytest.raises(FrankenmergeError, match=r"\[0, 4\]"):
        splice([(donors["a"], 0), (donors["b"], 4)])


def test_missing_weights_are_refused(donors, tmp_path):
    def without_outputs(tensors):
        return {name: value for name, value in tensors.items() if "o_proj" not in name}

    path = changed(donors["a"], tmp_path / "holes", without_outputs)
    with pytest.raises(FrankenmergeError, match=r"(?s)missing keys: .*o_proj"):
        loaded(path)


def test_a_family_that_the_library_lacks_can_be_opened_and_not_be_run(donors, tmp_path):
    path = changed(
        donors["a"],
        tmp_path / "novel",
        config=lambda all: all | {"model_type": "novel", "architectures": ["NovelForCausalLM"]},
    )
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.blocks == 4
    for run in (load_model, lambda donor: untrained_model(donor, 0)):
        with pytest.raises(FrankenmergeError, match="a model_type that transformers can run"):
            run(checkpoint)


def test_weights_that_belong_nowhere_are_refused(donors, tmp_path):
    def with_more(tensors):
        return tensors | {
            f"model.layers.{index}.self_attn.other.weight": np.ones(2, dtype=np.float32)
            for index in range(4)
        }

    path = changed(donors["a"], tmp_path / "more", with_more)
    with pytest.raises(FrankenmergeError, match=r"(?s)unexpected keys: .*other"):
        loaded(path)


def test_weights_of_other_shapes_than_the_config_are_refused(donors, tmp_path):
    def narrowed(tensors):
        return {
            name: value[:20].copy() if "gate_proj" in name or "up_proj" in name else value
            for name, value in tensors.items()
        }

    path = changed(donors["a"], tmp_path / "narrow", narrowed)
    with pytest.raises(FrankenmergeError, match="_proj"):
        loaded(path)


def test_a_donor_without_a_tokenizer_is_refused_when_one_is_needed(donors, tmp_path):
    path = changed(donors["a"], tmp_path / "mute")
    (path / "tokenizer.json").unlink()
    with pytest.raises(FrankenmergeError, match="tokenizer"):
        load_tokenizer(open_checkpoint(str(path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_computes_in_the_type_asked_for(donors, dtype):
    model = load_model(open_checkpoint(str(donors["a"])), Placement(dtype))
    assert {value.dtype for value in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


@torch.no_grad()
def test_a_model_spread_over_memory_and_disk_gives_the_same(donors, tmp_path):
    checkpoint = open_checkpoint(str(donors["deep"]))
    whole, spread = (
        load_model(checkpoint),
        load_model(
            checkpoint,
            Placement(device="auto", max_memory={"cpu": "25KB"}, offload=tmp_path / "offload"),
        ),
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(spread(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    with block_outputs(spread) as states:
        forward(spread, input_ids=IDS)
        ours = list(states)
    with block_outputs(whole) as states:
        forward(whole, input_ids=IDS)
    for state, other in zip(ours, states, strict=True):
        torch.testing.assert_close(state, other)


@pytest.mark.parametrize("options", [{"max_memory": {"cpu": "1MB"}}, {"offload": "somewhere"}])
def test_memory_is_shared_out_over_devices_chosen_automatically_alone(donors, options):
    with pytest.raises(FrankenmergeError, match="auto"):
        load_model(open_checkpoint(str(donors["a"])), Placement(**options))


def test_memory_that_is_no_size_is_refused(donors):
    with pytest.raises(FrankenmergeError, match="parrots"):
        load_model(
            open_checkpoint(str(donors["a"])),
            Placement(device="auto", max_memory={"cpu": "2 parrots"}),
        )


def test_an_index_that_transformers_cannot_read_is_refused(donors, tmp_path):
    import json
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(donors["deep"], folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"]})
    )
    with pytest.raises(FrankenmergeError, match="metadata"):
        load_model(open_checkpoint(str(folder)))
