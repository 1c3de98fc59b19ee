"""Decoder families of transformers: spliced and averaged right, or refused with the reason."""

import json

import pytest
from families import RECIPES, outcomes, tiny_config, write_donor

REFUSED = {
    "diffllama": "lambda_init",
    "minicpm3": "residual_scale",
    "deepseek_v3": "MoE",
}
"""Families of which some splices are refused, and what the reason names."""


def verdicts(family):
    found = list(outcomes([family]))
    assert {each.recipe for each in found} == {*RECIPES, "average"}
    assert {each.verdict for each in found} <= {"right", "refused"}, found
    return found


SLOW = ("gptj", "gpt_oss", "lfm2", "bert")


@pytest.mark.parametrize(
    "family", ["opt", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_family_beyond_the_table_is_right(family):
    assert {each.verdict for each in verdicts(family)} == {"right"}


@pytest.mark.parametrize("family", ["diffllama", "deepseek_v3"])
def test_a_block_that_would_compute_something_else_is_refused(family):
    found = verdicts(family)
    refused = [each for each in found if each.verdict == "refused"]
    assert refused and all(REFUSED[family] in each.reason for each in refused)
    assert {each.verdict for each in found if each.recipe == "average"} == {"right"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        *("bloom", "codegen", "cohere", "dots1", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1"),
        *("gemma", "gemma4_text", "glm4_moe", "gpt_bigcode", "granite"),
        *("granitemoehybrid", "hunyuan_v1_dense", "jamba", "llama4_text", "mamba", "seed_oss"),
        *("minicpm3", "minimax_m2", "mpt", "nemotron", "olmo3", "qwen2_moe", "qwen3_5_text"),
        *("qwen3_next", "starcoder2", "xlm"),
    ],
)
def test_nothing_is_silently_wrong(family):
    for each in verdicts(family):
        assert each.verdict == "right" or each.reason
        assert family not in REFUSED or each.verdict == "right" or REFUSED[family] in each.reason


@pytest.mark.parametrize("family, right", [("opt", True), ("diffllama", False)])
def test_inspect_says_whether_blocks_can_move(family, right, tmp_path, run):
    config = tiny_config(family)
    for seed, name in enumerate("ab"):
        write_donor(tmp_path / name, config, seed)
    code, out, _ = run("inspect", tmp_path / "a", tmp_path / "b", "--json")
    told = json.loads(out)
    assert code == 0 and told["spliceable"] is right
    assert right or REFUSED[family] in told["reasons"][0]
