"""Families that are not in the table: their names are inferred from config and tensors."""

import pytest
from conftest import resolved, write_donor

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.families import FAMILIES, USUAL
from frankenmerge.donors.inferred import architecture_of, family_faults


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_taken_out_of_the_table_is_spliced_alike(tmp_path, monkeypatch, family):
    """The table, which needs no torch, and the comparison of blocks give the same result."""
    folders = [
        write_donor(tmp_path / str(seed), family, seed=seed, tie_word_embeddings=False)
        for seed in (1, 2)
    ]
    stack = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 3), (1, 3))
    recipe = recipe_of([Block(str(folders[donor]), index) for donor, index in stack])
    splice = resolved(recipe)
    listed = splice.base.architecture
    monkeypatch.delitem(FAMILIES, family)
    again = resolved(recipe)
    inferred = again.base.architecture
    for name in ("root", "block", "final", "head", "norm", "learned_positions"):
        assert getattr(inferred, name) == getattr(listed, name)
    assert set(inferred.embedding) == set(listed.embedding)
    assert again.operations == splice.operations
    for key in ("num_hidden_layers", "n_layer", "layer_types", "no_rope_layers"):
        if key in splice.config and key in again.config:
            assert again.config[key] == splice.config[key]


CONFIG = {
    "model_type": "novel",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
}
BLOCK = {
    "attention.query_key_value.weight": (24, 8),
    "attention.dense.bias": (8,),
    "norm.weight": (8,),
}
SHAPES = {
    "novel.wte.weight": (20, 8),
    "novel.ln.weight": (8,),
    "novel.ln.bias": (8,),
    "out.weight": (20, 8),
    "out.bias": (20,),
} | {f"novel.h.{index}.{name}": shape for index in range(2) for name, shape in BLOCK.items()}


def test_a_layout_is_read_off_names_and_shapes():
    found = architecture_of(CONFIG, SHAPES)
    assert (found.root, found.block, found.embedding, found.final, found.head) == (
        "novel.",
        "h.{}.",
        ("wte.",),
        "ln.",
        "out.",
    )
    assert (found.norm, found.learned_positions, found.listed) == ("layer", False, False)
    assert found.role("novel.h.1.norm.weight") == ("block", 1, "novel.h.{}.norm.weight")
    assert [found.role(name)[0] for name in list(SHAPES)[:5]] == [
        "embedding",
        "final",
        "final",
        "head",
        "head",
    ]


def test_learned_positions_are_known_by_their_name():
    found = architecture_of(CONFIG, SHAPES | {"novel.wpe.weight": (64, 8)})
    assert (found.embedding, found.learned_positions) == (("wte.", "wpe."), True)


@pytest.mark.parametrize(
    "name", ["vision.weight", "novel.shared.weight", "vision_tower.layers.0.norm.weight"]
)
def test_a_tensor_of_no_other_role_is_of_the_rest(name):
    found = architecture_of(CONFIG, SHAPES | {name: (8, 8)})
    assert found.role(name) == ("rest", None, name)
    assert found.role("novel.h.0.norm.weight")[0] == "block"


def test_a_tower_is_not_taken_for_the_language_model():
    tower = {f"vision.layers.{index}.{part}": (8,) for index in range(2) for part in "abcdef"}
    found = architecture_of(CONFIG, SHAPES | tower)
    assert found.root + found.block == "novel.h.{}."


def test_without_blocks_everything_is_of_the_rest():
    found = architecture_of({"model_type": "novel"}, {"stem.weight": (3, 3)})
    assert found.role("stem.weight") == ("rest", None, "stem.weight")


@pytest.mark.parametrize("name", [None, "", 3, ["llama"], {}])
def test_a_config_must_name_its_family(name):
    (fault,) = family_faults({"model_type": name}, "config.json")
    assert fault.place == "config.json: model_type" and fault.found == repr(name)
    assert not family_faults({"model_type": "novel"}, "config.json")


def test_what_is_inferred_begins_with_the_usual_names():
    assert (USUAL.root, USUAL.block, USUAL.listed) == ("model.", "layers.{}.", False)
