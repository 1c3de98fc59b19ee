"""Roles of tensor names in every family."""

import pytest

from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError


@pytest.mark.parametrize(
    "family, name, role, index, canonical",
    [
        (
            "llama",
            "model.layers.0.self_attn.q_proj.weight",
            "block",
            0,
            "model.layers.{}.self_attn.q_proj.weight",
        ),
        (
            "llama",
            "model.layers.31.input_layernorm.weight",
            "block",
            31,
            "model.layers.{}.input_layernorm.weight",
        ),
        ("llama", "layers.7.mlp.up_proj.weight", "block", 7, "model.layers.{}.mlp.up_proj.weight"),
        ("llama", "model.embed_tokens.weight", "embedding", None, "model.embed_tokens.weight"),
        ("llama", "model.norm.weight", "final", None, "model.norm.weight"),
        ("llama", "lm_head.weight", "head", None, "lm_head.weight"),
        (
            "llama",
            "model.layers.3.self_attn.rotary_emb.inv_freq",
            "ignored",
            None,
            "model.layers.3.self_attn.rotary_emb.inv_freq",
        ),
        ("llama", "model.rotary_emb.inv_freq", "ignored", None, "model.rotary_emb.inv_freq"),
        (
            "gpt2",
            "transformer.h.11.attn.c_attn.weight",
            "block",
            11,
            "transformer.h.{}.attn.c_attn.weight",
        ),
        ("gpt2", "h.11.attn.c_attn.weight", "block", 11, "transformer.h.{}.attn.c_attn.weight"),
        ("gpt2", "h.11.attn.c_attn.bias", "block", 11, "transformer.h.{}.attn.c_attn.bias"),
        ("gpt2", "transformer.wte.weight", "embedding", None, "transformer.wte.weight"),
        ("gpt2", "wpe.weight", "embedding", None, "transformer.wpe.weight"),
        ("gpt2", "transformer.ln_f.bias", "final", None, "transformer.ln_f.bias"),
        ("gpt2", "ln_f.bias", "final", None, "transformer.ln_f.bias"),
        ("gpt2", "lm_head.weight", "head", None, "lm_head.weight"),
        ("gpt2", "h.0.attn.bias", "ignored", None, "h.0.attn.bias"),
        (
            "gpt2",
            "transformer.h.0.attn.masked_bias",
            "ignored",
            None,
            "transformer.h.0.attn.masked_bias",
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.dense.bias",
            "block",
            5,
            "gpt_neox.layers.{}.attention.dense.bias",
        ),
        ("gpt_neox", "gpt_neox.embed_in.weight", "embedding", None, "gpt_neox.embed_in.weight"),
        (
            "gpt_neox",
            "gpt_neox.final_layer_norm.bias",
            "final",
            None,
            "gpt_neox.final_layer_norm.bias",
        ),
        ("gpt_neox", "embed_out.weight", "head", None, "embed_out.weight"),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.bias",
            "ignored",
            None,
            "gpt_neox.layers.5.attention.bias",
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.5.attention.masked_bias",
            "ignored",
            None,
            "gpt_neox.layers.5.attention.masked_bias",
        ),
    ],
)
def test_a_name_has_its_role(family, name, role, index, canonical):
    assert FAMILIES[family].role(name) == (role, index, canonical)


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "vision.weight"),
        ("llama", "model.layers.x.weight"),
        ("llama", "score.weight"),
        ("gpt2", "model.layers.0.x"),
    ],
)
def test_a_name_of_no_role_is_refused(family, name):
    with pytest.raises(FrankenmergeError, match=name):
        FAMILIES[family].role(name)
