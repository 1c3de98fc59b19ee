"""Which parts of a model read what is around its blocks."""

import pytest
from transformers import CONFIG_MAPPING

from frankenmerge.models.blank import blank_model
from frankenmerge.splicing.surroundings import surroundings

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}


def found(family, **changes):
    known = CONFIG_MAPPING[family]().to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    around = surroundings(CONFIG_MAPPING[family](**(small | changes)).to_dict())
    assert around is not None
    return around


def test_embedding_norm_and_head_of_a_decoder():
    around = found("llama", tie_word_embeddings=False)
    assert around.read == {
        "model.embed_tokens.weight": {"before"},
        "model.norm.weight": {"after"},
        "lm_head.weight": {"after"},
    }
    assert not around.shared


def test_embedding_and_head_of_an_encoder():
    read = found("bert", tie_word_embeddings=False).read
    for name, parts in read.items():
        if name.startswith("bert.embeddings."):
            assert parts == {"before"}
        else:  # a bias that only a tied model reads has no part
            assert name.startswith("cls.") and parts <= {"after"}


@pytest.mark.parametrize(("family", "where"), [("bart", "before"), ("bigbird_pegasus", "after")])
def test_a_norm_of_one_name_is_found_where_it_is_read(family, where):
    sizes = {
        "d_model": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 24,
    }
    read = found(family, is_decoder=True, is_encoder_decoder=False, **sizes).read
    assert read["model.decoder.layernorm_embedding.weight"] == {where}


def test_positions_outside_the_graph_are_the_blocks():
    assert found("roformer").read["roformer.encoder.embed_positions.weight"] == {"blocks"}


def test_a_bias_that_all_blocks_get_is_theirs():
    read = found("cpmant", dim_head=4, dim_ff=24).read
    assert read["cpmant.position_bias.relative_attention_bias"] == {"blocks"}


def test_experts_larger_than_the_memory_are_not_made():
    config = CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=5, moe_intermediate_size=2**24)
    shapes = blank_model(config.to_dict()).state_dict()
    assert shapes["model.layers.4.mlp.experts.gate_up_proj"].shape[1] == 2 * 2**24
