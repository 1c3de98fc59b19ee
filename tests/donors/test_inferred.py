"""Families that are not in the table: inferred as they are, or refused with the reason."""

import re

import pytest
from conftest import resolved, write_donor

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.families import FAMILIES, USUAL
from frankenmerge.donors.inferred import architecture_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors

REFUSED = {
    "gpt2": "config.json has no num_hidden_layers",
    "qwen3_moe": "decoder_sparse_step may belong to single blocks",
}
"""The families of the table that cannot be inferred, and why."""


@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in FAMILIES), ("mistral", {"sliding_window": None})],
)
def test_a_family_taken_out_of_the_table_is_inferred_to_be_the_same_or_refused(
    tmp_path, monkeypatch, family, changes
):
    folders = [
        write_donor(tmp_path / str(seed), family, seed=seed, tie_word_embeddings=False, **changes)
        for seed in (1, 2)
    ]
    recipe = recipe_of(
        [
            Block(str(folders[donor]), index)
            for donor, index in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 3), (1, 3))
        ]
    )
    splice = resolved(recipe)
    listed = splice.base.architecture
    monkeypatch.delitem(FAMILIES, family)
    if family in REFUSED and not changes:
        with pytest.raises(FrankenmergeError, match=REFUSED[family]):
            open_donors(recipe)
        return
    again = resolved(recipe)
    inferred = again.base.architecture
    for name in (
        "root",
        "block",
        "embedding",
        "final",
        "head",
        "norm",
        "keys",
        "learned_positions",
    ):
        assert getattr(inferred, name) == getattr(listed, name)
    assert again.operations == splice.operations
    superseded = {number for part in USUAL.per_block for number in part.numbers}
    assert again.config == {
        key: value for key, value in splice.config.items() if key not in superseded
    }


CONFIG = {
    "model_type": "novel",
    "architectures": ["NovelForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
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
    found = architecture_of(CONFIG, SHAPES, "config.json")
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


def test_learned_positions_are_known_by_their_shape():
    found = architecture_of(CONFIG, SHAPES | {"novel.wpe.weight": (64, 8)}, "config.json")
    assert (found.embedding, found.learned_positions) == (("wte.", "wpe."), True)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "sliding_window_pattern": 2,
        },
        {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
        {"sliding_window": 8, "use_sliding_window": False},
        {
            "eos_token_id": [1, 2],
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "partial_rotary_factor": 0.5,
        },
        {
            "first_k_dense_replace": 0,
            "moe_layers": [],
            "attn_layer_period": None,
            "scale_depth": False,
        },
    ],
)
def test_fields_that_bind_no_block_are_no_reason(changes):
    assert architecture_of(CONFIG | changes, SHAPES, "config.json").root == "novel."


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
        ({"auto_map": {"AutoModel": "novel.Novel"}}, "code of its own"),
        ({"architectures": ["NovelForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["OtherForCausalLM"]}, "not a causal language model"),
        ({"architectures": None}, "not a causal language model"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace may belong"),
        ({"full_attn_idxs": [0]}, "full_attn_idxs may belong"),
        ({"scales": [0.5, 0.25]}, "scales may belong"),
        ({"hybrid_override_pattern": "M-"}, "hybrid_override_pattern may belong"),
        ({"scale_depth": 1.4}, "scale_depth may belong"),
        ({"sliding_window_pattern": 2}, "sliding_window_pattern may belong"),
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval may belong"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq may belong"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "of the kind linear_attention"),
        ({"sliding_window": 8}, "sliding_window but no layer_types"),
        ({"tie_word_embeddings": True}, "with a bias"),
        ({"tie_word_embeddings": None}, "does not say whether"),
        ({"text_config": {}}, "language model in text_config"),
    ],
)
def test_what_config_says_of_an_unknown_family_can_be_a_reason(changes, reason):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    with pytest.raises(FrankenmergeError, match=re.escape(reason)):
        architecture_of(config, SHAPES, "config.json")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"novel.h.0.extra.weight": (8,)}, "have different tensors, such as extra.weight"),
        (
            {f"novel.h.{index}.decay": (8,) for index in range(2)},
            "have decay, which plain layers do not have",
        ),
        (
            {"novel.other.weight": (20, 8)},
            "the embedding; candidates: novel.wte., novel.other.",
        ),
        ({"novel.wte.weight": (20, 4)}, "the embedding; candidates: none"),
        ({"novel.ln2.weight": (8,)}, "the final norm; candidates: novel.ln., novel.ln2."),
        (
            {"novel.a.weight": (64, 8), "novel.b.weight": (64, 8)},
            "the positions; candidates: novel.a., novel.b.",
        ),
        ({"out2.weight": (20, 8)}, "the head; candidates: out., out2."),
        ({"vision.weight": (8, 8)}, "the role of vision. is not known"),
    ],
)
def test_what_the_tensors_of_an_unknown_family_are_can_be_a_reason(changes, reason):
    with pytest.raises(FrankenmergeError, match=re.escape(reason)):
        architecture_of(CONFIG, SHAPES | changes, "config.json")


@pytest.mark.parametrize(
    "shapes", [{}, {name.removeprefix("novel."): shape for name, shape in SHAPES.items()}]
)
def test_names_that_are_no_model_s_are_a_reason(shapes):
    with pytest.raises(FrankenmergeError, match="not named MODEL.LAYERS.0."):
        architecture_of(CONFIG, shapes, "config.json")


def test_all_reasons_are_reported_at_once():
    with pytest.raises(FrankenmergeError) as raised:
        architecture_of(CONFIG | {"scale_depth": 1.4, "moe_layers": [1]}, SHAPES, "config.json")
    (fault,) = raised.value.faults
    assert "scale_depth" in fault.found and "moe_layers" in fault.found
    with pytest.raises(FrankenmergeError) as raised:
        architecture_of(
            CONFIG, SHAPES | {"vision.weight": (8, 8), "novel.ln2.weight": (8,)}, "config.json"
        )
    (fault,) = raised.value.faults
    assert "vision." in fault.found and "novel.ln2." in fault.found
