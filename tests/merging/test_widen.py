"""Widened donors: the same logits by transformers, and blocks that fit the wide donor's."""

import json

import pytest
import torch
from conftest import DEMO, changed, write_donor
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.widen import widen
from frankenmerge.splicing.compatibility import compatibility

IDS = torch.tensor([[0, 7, 30, 7, 12, 41], [5, 5, 2, 47, 19, 1]])
WIDE = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
}
WIDENED = ("llama", "mistral", "qwen2", "smollm3")


@torch.no_grad()
def logits(path):
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model(input_ids=IDS).logits


def widened(narrow, wide, output):
    return widen(open_checkpoint(str(narrow)), open_checkpoint(str(wide)), output)


def message(tmp_path, family="llama", wide=WIDE, **narrow) -> str:
    donors = (
        write_donor(tmp_path / "narrow", family, seed=3, **narrow),
        write_donor(tmp_path / "wide", family, seed=4, **wide),
    )
    with pytest.raises(FrankenmergeError) as refused:
        widened(*donors, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(refused.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", WIDENED)
def test_a_widened_donor_gives_the_same_logits(family, tied, tmp_path):
    narrow = write_donor(tmp_path / "narrow", family, seed=3, tie_word_embeddings=tied)
    wide = write_donor(tmp_path / "wide", family, seed=4, **WIDE)
    path = widened(narrow, wide, tmp_path / "out")
    torch.testing.assert_close(logits(path), logits(narrow), atol=1e-4, rtol=1e-4)
    assert not compatibility([open_checkpoint(str(donor)) for donor in (path, wide)]).reasons


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({"attention_bias": True, "mlp_bias": True}, WIDE),
        ({"rms_norm_eps": 0.1}, WIDE | {"hidden_size": 66, "head_dim": 4}),
        ({"shard": "10KB"}, WIDE),
        (
            {"head_dim": 6, "num_key_value_heads": 4},
            WIDE | {"head_dim": 6, "num_key_value_heads": 6},
        ),
        ({}, {"intermediate_size": 40}),
    ],
)
def test_biases_constants_shards_and_single_sizes_are_widened_too(changes, sizes, tmp_path):
    narrow = write_donor(tmp_path / "narrow", seed=3, **changes)
    shared = {key: value for key, value in changes.items() if key.endswith("bias")}
    path = widened(
        narrow, write_donor(tmp_path / "wide", seed=4, **shared, **sizes), tmp_path / "out"
    )
    torch.testing.assert_close(logits(path), logits(narrow), atol=1e-4, rtol=1e-4)
    assert {file.name for file in path.glob("*.safetensors*")} == {
        file.name for file in narrow.glob("*.safetensors*")
    }


def test_without_what_the_norms_need_the_logits_are_others(tmp_path):
    narrow, wide = (
        write_donor(tmp_path / "narrow", seed=3),
        write_donor(tmp_path / "wide", seed=4, **WIDE),
    )
    path = widened(narrow, wide, tmp_path / "out")
    gains = {
        name: value
        for name, value in load_file(narrow / "model.safetensors").items()
        if value.dim() == 1
    }

    def undone(tensors):
        return tensors | {
            name: torch.nn.functional.pad(value, (0, 8)).numpy() for name, value in gains.items()
        }

    assert (logits(changed(path, tmp_path / "undone", undone)) - logits(narrow)).abs().max() > 0.05


def test_a_config_that_leaves_out_how_many_key_heads_it_has(tmp_path):
    every = {"num_key_value_heads": 4}, WIDE | {"num_key_value_heads": 6}
    narrow, wide = (
        write_donor(tmp_path / str(seed), seed=seed, **sizes) for seed, sizes in enumerate(every)
    )
    silent = changed(
        wide,
        tmp_path / "silent",
        config=lambda config: {k: v for k, v in config.items() if k != "num_key_value_heads"},
    )
    torch.testing.assert_close(
        logits(widened(narrow, silent, tmp_path / "out")), logits(narrow), atol=1e-4, rtol=1e-4
    )


def test_narrow_types_keep_their_bytes_but_for_the_gains(tmp_path):
    narrow = write_donor(tmp_path / "narrow", seed=3, dtype="bfloat16")
    path = widened(narrow, write_donor(tmp_path / "wide", seed=4, **WIDE), tmp_path / "out")
    before, after = load_file(narrow / "model.safetensors"), load_file(path / "model.safetensors")
    for name, tensor in before.items():
        corner = after[name][tuple(map(slice, tensor.shape))]
        expected = tensor if tensor.dim() == 2 else (tensor.double() * (16 / 24) ** 0.5).bfloat16()
        assert corner.dtype == torch.bfloat16 and torch.equal(corner, expected)
        assert after[name].abs().double().sum() == corner.abs().double().sum()


@pytest.mark.parametrize(
    "family, reason",
    [
        ("qwen3", "norms of single heads"),
        ("gemma2", "norms after its maps"),
        ("olmo2", "norms after its maps"),
        ("cohere2", "norms that centre"),
        ("phi3", "several maps in one tensor"),
        ("mixtral", "experts"),
    ],
)
def test_families_that_zeros_would_change_are_refused(family, reason, tmp_path):
    assert reason in message(tmp_path, family)


def test_every_other_family_of_the_table_is_refused():
    from frankenmerge.merging.widen import _inexact

    exact = [family for family, architecture in FAMILIES.items() if not _inexact(architecture)]
    assert sorted(exact) == sorted(WIDENED)


@pytest.mark.parametrize(
    "wide, narrow, expected",
    [
        ({"hidden_size": 12, "head_dim": 4}, {}, "12 or less"),
        (WIDE | {"num_key_value_heads": 2}, {}, "3 query heads for each key head"),
        (WIDE | {"head_dim": 8}, {}, "rotary positions rotate heads"),
        (
            WIDE,
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            "rope_parameters",
        ),
        (WIDE, {"hidden_act": "gelu"}, "hidden_act"),
        (WIDE, {"attention_bias": True}, "self_attn.q_proj.bias"),
    ],
)
def test_donors_that_do_not_go_together_are_refused(wide, narrow, expected, tmp_path):
    assert expected in message(tmp_path, wide=wide, **narrow)


def test_the_command_line(run, tmp_path):
    narrow, wide = (
        write_donor(tmp_path / "narrow", seed=3),
        write_donor(tmp_path / "wide", seed=4, **WIDE),
    )
    (tmp_path / "out").mkdir()
    code, out, _ = run("widen", narrow, wide, tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["parameters"] == open_checkpoint(str(wide)).parameters
    code, _, err = run("widen", narrow, wide, tmp_path / "out")
    assert code == 2 and "something is there" in err
    code, _, err = run(
        "widen", DEMO / "donors" / "base", DEMO / "donors" / "wide", tmp_path / "other"
    )
    assert code == 2 and "head_dim" in err and "Traceback" not in err


def test_a_widened_donor_and_the_wide_one_are_spliced_with_a_gauge(run, tmp_path):
    narrow, wide = (
        write_donor(tmp_path / "narrow", seed=3),
        write_donor(tmp_path / "wide", seed=4, **WIDE),
    )
    path, recipe = widened(narrow, wide, tmp_path / "out"), tmp_path / "recipe.yaml"
    slices = [
        {"sources": [{"model": str(donor), "layer_range": layers}]}
        for donor, layers in ((path, [0, 2]), (wide, [2, 4]))
    ]
    slices[1]["gauge"] = {"to": "previous"}
    recipe.write_text(json.dumps({"slices": slices, "merge_method": "passthrough"}))
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    assert logits(tmp_path / "merged").isfinite().all()


def test_a_constant_that_is_no_number_is_reported(tmp_path):
    narrow = changed(
        write_donor(tmp_path / "narrow", seed=3),
        tmp_path / "odd",
        config=lambda config: config | {"rms_norm_eps": "small"},
    )
    wide = write_donor(tmp_path / "wide", seed=4, **WIDE)
    with pytest.raises(FrankenmergeError, match="rms_norm_eps"):
        widened(narrow, wide, tmp_path / "out")
