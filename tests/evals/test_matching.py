"""Matching: a permuted and rotated copy of a donor is recovered, with the same outputs."""

import pytest
import torch
from conftest import write_donor
from matching import Match, activations, joint_rotation, match, matched_model, rotated_model

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.rotation import Rotation, random_rotation

IDS = torch.randint(48, (48, 16), generator=torch.Generator().manual_seed(5))
FAMILIES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 8}),
]


def shuffle(seed, neurons, heads, groups, width):
    """A random match: any order of everything, signs, and bases of the values."""
    generator, each = torch.Generator().manual_seed(seed), heads // groups
    order = torch.randperm(groups, generator=generator)
    within = [group * each + torch.randperm(each, generator=generator) for group in order.tolist()]
    signs = torch.randint(2, (neurons,), generator=generator) * 2 - 1
    values = torch.stack([random_rotation(width, seed + group).matrix for group in range(groups)])
    return Match(
        torch.randperm(neurons, generator=generator), signs, order, torch.cat(within), values
    )


def opened(folder, family, changes):
    donor = open_checkpoint(
        str(write_donor(folder, family, seed=3, tie_word_embeddings=False, **changes))
    )
    return load_model(donor).requires_grad_(False), donor.architecture


def shuffles(model):
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, width
    return [shuffle(10 * index, *shape) for index in range(config.num_hidden_layers)]


def filled(model, state):
    other = type(model)(model.config).eval()
    other.load_state_dict({name: value.float() for name, value in state.items()})
    return other.requires_grad_(False)


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_a_donor_with_its_parts_moved_gives_the_same_logits(family, changes, tmp_path):
    model, architecture = opened(tmp_path / "donor", family, changes)
    moved = matched_model(model.state_dict(), architecture, shuffles(model))
    changed = {
        name.split(".")[-2]
        for name, value in moved.items()
        if not torch.allclose(value.float(), model.state_dict()[name])
    }
    assert changed >= {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        expected, found = (one(input_ids=IDS).logits for one in (model, filled(model, moved)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_a_permuted_and_rotated_copy_of_a_donor_is_recovered(family, changes, tmp_path):
    model, architecture = opened(tmp_path / "donor", family, changes)
    moved = matched_model(model.state_dict(), architecture, shuffles(model))
    copy = filled(model, rotated_model(moved, architecture, random_rotation(16, 1)))
    of_a, of_b = activations(model, IDS), activations(copy, IDS)
    groups = model.config.num_key_value_heads
    found = [
        match(left, right, groups) for left, right in zip(of_a.inside, of_b.inside, strict=True)
    ]
    back = joint_rotation(of_b.stream, of_a.stream)
    recovered = rotated_model(
        matched_model(copy.state_dict(), architecture, found), architecture, back
    )
    plain = rotated_model(
        model.state_dict(), architecture, Rotation(torch.eye(16, dtype=torch.float64))
    )
    for name, value in plain.items():
        torch.testing.assert_close(
            recovered[name],
            value,
            atol=1e-3,
            rtol=1e-3,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def test_the_turn_has_the_ratio_of_the_streams_sizes():
    states = [
        torch.randn(200, 8, generator=torch.Generator().manual_seed(depth)) for depth in range(3)
    ]
    rotation = random_rotation(8, 2)
    back = joint_rotation([3 * state.double() @ rotation.matrix for state in states], states)
    torch.testing.assert_close(back.matrix, rotation.matrix.T)
    assert back.scale == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi3"])
def test_blocks_of_another_build_are_refused(family, tmp_path):
    model = load_model(open_checkpoint(str(write_donor(tmp_path / "donor", family))))
    with pytest.raises(FrankenmergeError, match="Llama's blocks have"):
        activations(model, IDS)
