"""Tensors compared with the config: blocks, kinds of blocks, shapes and roles."""

import numpy as np
import pytest
from conftest import changed, write_donor
from damage import places, refused

from frankenmerge.donors.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A donor whose block 1 has a plain MLP, the others experts."""
    return write_donor(
        tmp_path_factory.mktemp("mixture") / "donor", "qwen3_moe", mlp_only_layers=[1]
    )


def test_a_tensor_that_only_blocks_of_its_kind_have_is_missed(mixture, tmp_path):
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    folder = changed(
        mixture,
        tmp_path / "holes",
        lambda all: {key: value for key, value in all.items() if key != name},
    )
    assert places(refused(folder)) == [f"{folder}: {name}"]
    assert open_checkpoint(str(mixture)).blocks == 4


def test_kinds_of_blocks_are_compared_with_config(mixture, tmp_path):
    folder = changed(
        mixture, tmp_path / "odd", config=lambda config: config | {"mlp_only_layers": [2]}
    )
    found = [fault for fault in refused(folder) if fault.place == f"{folder}: mlp_only_layers"]
    assert [(fault.expected, fault.found) for fault in found] == [
        ("no mlp.gate_proj. in block 1", "mlp.gate_proj. in block 1"),
        ("mlp.gate_proj. in block 2", "no mlp.gate_proj. in block 2"),
    ]


def without(*parts):
    return lambda tensors: {
        name: value for name, value in tensors.items() if not any(part in name for part in parts)
    }


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_tensor_that_one_block_lacks_is_named(donors, tmp_path, name):
    folder = changed(donors["a"], tmp_path / "holes", without(name))
    assert places(refused(folder)) == [f"{folder}: {name}"]


def test_a_tensor_that_one_of_two_blocks_lacks_is_named(donors, tmp_path):
    gone = "model.layers.1.mlp.up_proj.weight"
    folder = changed(
        donors["a"],
        tmp_path / "two",
        without("layers.2.", "layers.3.", gone),
        lambda config: config | {"num_hidden_layers": 2},
    )
    assert any(gone in place for place in places(refused(folder)))


def test_a_tensor_that_one_block_alone_has_is_named(donors, tmp_path):
    more = "model.layers.1.mlp.up_proj.bias"
    folder = changed(
        donors["a"], tmp_path / "more", lambda tensors: tensors | {more: np.zeros(24, np.float32)}
    )
    assert any(more in place for place in places(refused(folder)))


@pytest.mark.parametrize(
    "count, found",
    [(5, "none of block 4"), (9, "none of block 4, 5, 6, 7, 8"), (3, "some of block 3")],
)
def test_a_count_of_blocks_that_the_weights_contradict_is_refused(donors, tmp_path, count, found):
    folder = changed(
        donors["a"], tmp_path / "count", config=lambda config: config | {"num_hidden_layers": count}
    )
    (fault,) = refused(folder)
    assert (fault.place, fault.expected, fault.found) == (
        str(folder),
        f"tensors of {count} blocks",
        found,
    )


def test_a_block_tensor_of_another_shape_is_named(donors, tmp_path):
    name = "model.layers.3.mlp.down_proj.weight"
    folder = changed(
        donors["a"],
        tmp_path / "shape",
        lambda tensors: tensors | {name: np.ascontiguousarray(tensors[name].T)},
    )
    (fault,) = refused(folder)
    assert (
        fault.place == f"{folder}: {name}"
        and "(16, 24)" in fault.expected
        and "(24, 16)" in fault.found
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.embed_tokens.weight", (48, 15)),
        ("model.embed_tokens.weight", (16, 48)),
        ("model.embed_tokens.weight", (50, 16)),
        ("model.embed_tokens.weight", (64, 16)),
        ("model.norm.weight", (17,)),
        ("lm_head.weight", (48, 17)),
        ("lm_head.weight", (47, 16)),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_named(donors, tmp_path, name, shape):
    folder = changed(
        donors["a"],
        tmp_path / "shape",
        lambda tensors: tensors | {name: np.zeros(shape, np.float32)},
    )
    assert set(places(refused(folder))) == {f"{folder}: {name}"}


@pytest.mark.parametrize(
    "part, role", [("embed_tokens", "embedding"), ("model.norm", "final"), ("lm_head", "head")]
)
def test_a_checkpoint_without_one_of_its_parts_is_refused(donors, tmp_path, part, role):
    folder = changed(donors["a"], tmp_path / "parts", without(part))
    (fault,) = refused(folder)
    assert (fault.place, fault.expected) == (str(folder), f"tensors of the {role}")


def test_a_tied_checkpoint_needs_no_head(donors):
    assert ("head", None) not in open_checkpoint(str(donors["b"])).by_role


def test_a_tensor_of_no_known_part_is_refused(donors, tmp_path):
    folder = changed(
        donors["a"],
        tmp_path / "tower",
        lambda tensors: tensors | {"vision.patch.weight": np.zeros(3, np.float32)},
    )
    (fault,) = refused(folder)
    assert "vision.patch.weight" in fault.place


def test_a_tensor_under_its_old_and_its_new_name_is_refused(donors, tmp_path):
    folder = changed(
        donors["g"],
        tmp_path / "both",
        lambda tensors: tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1},
    )
    assert "wte.weight" in str(refused(folder))


def test_buffers_that_old_checkpoints_carry_are_no_part_of_a_block(donors, tmp_path):
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "transformer.h.0.attn.masked_bias": np.ones((), np.uint8),
    }
    folder = changed(donors["g"], tmp_path / "old", lambda tensors: tensors | buffers)
    old, new = open_checkpoint(str(folder)), open_checkpoint(str(donors["g"]))
    assert old.by_role["block", 0] == new.by_role["block", 0]
    assert set(old.by_role["ignored", None]) == set(buffers)
