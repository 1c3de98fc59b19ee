"""Gauges: rotated donors have transformers' own logits, and fits find known rotations."""

import pytest
import torch
from conftest import rotated_donor, write_donor
from safetensors.torch import load_file

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES, USUAL
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.rotation import (
    Rotation,
    gauge_faults,
    procrustes,
    random_rotation,
    residual,
    rotated,
    stream_use,
)

IDS = torch.tensor([[0, 7, 30, 7, 12, 41], [5, 5, 2, 47, 19, 1]])
ROTATED = [
    name
    for name, architecture in FAMILIES.items()
    if architecture.stream and not architecture.stream.output_norms
]
NORMS_AFTER = [
    name
    for name, architecture in FAMILIES.items()
    if architecture.stream and architecture.stream.output_norms
]


@torch.no_grad()
def logits(path):
    return load_model(open_checkpoint(str(path)))(input_ids=IDS).logits


def faults_of(donor):
    checkpoint = open_checkpoint(str(donor))
    return gauge_faults(
        checkpoint.architecture,
        {name for names in checkpoint.by_role.values() for name in names},
        "here",
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ROTATED)
def test_a_donor_rotated_as_a_whole_gives_the_same_logits(family, tied, tmp_path):
    source = write_donor(tmp_path / "donor", family, seed=3, tie_word_embeddings=tied)
    centred = FAMILIES[family].norm == "layer"
    rotation = Rotation(random_rotation(16, 1, centred=centred).matrix, 1.7)
    path = rotated_donor(source, tmp_path / "rotated", rotation)
    before, after = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    assert not any(
        torch.allclose(before[name], after[name], atol=1e-2)
        for name in before
        if before[name].dim() == 2
    )
    torch.testing.assert_close(logits(path), logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in ROTATED if FAMILIES[name].norm == "layer"])
def test_a_rotation_that_moves_the_all_ones_direction_changes_a_layer_norm_donor(family, tmp_path):
    source = write_donor(tmp_path / "donor", family, seed=3)
    path = rotated_donor(source, tmp_path / "rotated", random_rotation(16, 1))
    assert (logits(path) - logits(source)).abs().max() > 0.1


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
        ("qwen3_moe", {"mlp_only_layers": [1, 2]}),
        ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    ],
)
def test_biases_and_blocks_of_other_kinds_are_rotated_too(family, changes, tmp_path):
    source = write_donor(tmp_path / "donor", family, seed=3, **changes)
    rotation = random_rotation(16, 1, centred=FAMILIES[family].norm == "layer")
    path = rotated_donor(source, tmp_path / "rotated", rotation)
    torch.testing.assert_close(logits(path), logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", NORMS_AFTER)
def test_norms_after_maps_are_refused_with_the_reason(family, tmp_path):
    source = write_donor(tmp_path / "donor", family, seed=3)
    assert any("post_feedforward_layernorm" in fault.found for fault in faults_of(source))
    with pytest.raises(FrankenmergeError, match="post_feedforward_layernorm"):
        rotated_donor(source, tmp_path / "rotated", random_rotation(16, 1))


def test_every_family_of_the_table_is_decided_on():
    assert set(FAMILIES) == set(ROTATED) | set(NORMS_AFTER)


def test_families_that_are_not_described_are_refused():
    with pytest.raises(FrankenmergeError, match="a family that is not described"):
        stream_use(USUAL, "model.layers.{}.mlp.up_proj.weight")


def test_a_family_whose_donor_lacks_a_norm_is_refused(tmp_path):
    sequential, parallel = (
        write_donor(tmp_path / str(flag), "stablelm", seed=3, use_parallel_residual=flag)
        for flag in (False, True)
    )
    assert not faults_of(sequential)
    assert [fault.place for fault in faults_of(parallel)] == [
        "here: model.layers.{}.post_attention_layernorm.weight"
    ]


def test_an_unknown_tensor_is_refused():
    with pytest.raises(FrankenmergeError, match=r"self_attn\.other"):
        stream_use(FAMILIES["llama"], "model.layers.{}.self_attn.other.weight")


def test_a_shift_with_a_gain_of_zero_is_refused():
    use = stream_use(FAMILIES["gpt2"], "transformer.h.{}.ln_1.bias")
    with pytest.raises(FrankenmergeError, match="ln_1"):
        rotated(
            torch.ones(4),
            use,
            random_rotation(4, 0, centred=True),
            torch.tensor([1.0, 0.0, 1.0, 1.0]),
        )


@pytest.mark.parametrize("centred", [False, True])
def test_a_known_turn_is_found_again(centred):
    known = Rotation(random_rotation(24, 5, centred=centred).matrix, 0.4)
    source = torch.randn(200, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if centred:
        source -= source.mean(1, keepdim=True)
    found = procrustes(source, known.scale * source @ known.matrix, centred=centred)
    torch.testing.assert_close(found.matrix, known.matrix)
    assert found.scale == pytest.approx(known.scale)
    assert residual(found, source, known.scale * source @ known.matrix) < 1e-20


def test_no_rotation_or_scale_next_to_the_fit_comes_closer():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 60, 8, dtype=torch.float64, generator=generator)
    found = procrustes(source, target)
    best = residual(found, source, target)
    for seed in range(20):
        skew = torch.randn(8, 8, dtype=torch.float64, generator=generator) * 0.05
        near = Rotation(found.matrix @ torch.linalg.matrix_exp(skew - skew.T), found.scale)
        assert residual(near, source, target) > best
        assert residual(random_rotation(8, seed)._replace(scale=found.scale), source, target) > best
    for factor in (0.9, 1.1):
        assert residual(found._replace(scale=factor * found.scale), source, target) > best


@pytest.mark.parametrize("centred", [False, True])
def test_a_random_turn_is_orthogonal_and_keeps_what_it_should(centred):
    matrix = random_rotation(12, 3, centred=centred).matrix
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12, dtype=torch.float64))
    ones = torch.ones(12, dtype=torch.float64)
    assert torch.allclose(ones @ matrix, ones) == centred
    assert random_rotation(12, 3).hash == random_rotation(12, 3).hash != random_rotation(12, 4).hash
