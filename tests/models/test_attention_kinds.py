"""Blocks one by one where they differ in attention, compared with transformers' own pass.

Each family's default pattern of blocks is run for at least one full period.
"""

import pytest
import torch
from block_passes import IDS, assert_close, outputs_of, whole
from conftest import SMALL, VOCABULARY, write_donor
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.artefacts.atlas import load_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.models.passes import leave
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.models.streaming import stream_model

BLOCKS = 8
STREAMED = {
    "gemma3_text": {"sliding_window": 3},
    "gemma2": {"sliding_window": 3},
    "olmo3": {"sliding_window": 3},
    "exaone4": {"sliding_window": 3},
    "cwm": {"sliding_window": 3, "max_position_embeddings": 16384, "head_dim": 8},
    "falcon": {},
}
OTHERS = {
    "bloom": {},
    "mpt": {},
    "minimax": {"num_local_experts": 4},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
LINEAR = ("minimax", "qwen3_next")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {
        family: open_checkpoint(
            str(write_donor(root / family, family, seed=7, num_hidden_layers=BLOCKS, **changes))
        )
        for family, changes in STREAMED.items()
    }


@pytest.fixture(scope="module")
def others():
    models = {}
    for family, changes in OTHERS.items():
        tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        shape = SMALL | {"num_hidden_layers": BLOCKS, "max_position_embeddings": 64}
        config = AutoConfig.for_model(family, **shape | tokens | changes)
        torch.manual_seed(0)
        models[family] = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in models[family].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return models


@pytest.mark.parametrize("prefix", [(), (3, 9, 1)])
@pytest.mark.parametrize("family", STREAMED)
def test_a_streamed_donor_gives_what_the_whole_model_gives(checkpoints, family, prefix):
    model, streamed = load_model(checkpoints[family]), stream_model(checkpoints[family])
    for ids in (IDS, IDS[:, :1]):
        expected = whole(model, ids, prefix)
        assert_close(outputs_of(streamed, ids, prefix=prefix), expected)


def test_the_default_patterns_have_both_kinds_of_attention(checkpoints):
    for family in ("gemma3_text", "gemma2", "olmo3", "exaone4", "cwm"):
        kinds = set(load_model(checkpoints[family]).config.layer_types)
        assert kinds == {"full_attention", "sliding_attention"}


@pytest.mark.parametrize("prefix", [(), (3, 9, 1)])
@pytest.mark.parametrize("family", OTHERS)
def test_other_forms_of_blocks_and_caches_give_what_the_whole_model_gives(others, family, prefix):
    for ids in (IDS, IDS[:, :1]):
        expected = whole(others[family], ids, prefix)
        assert_close(outputs_of(others[family], ids, prefix=prefix), expected)


@pytest.mark.parametrize("family", ["falcon", *OTHERS])
@torch.no_grad()
def test_the_last_block_is_followed_by_norm_and_head(checkpoints, others, family):
    model = others[family] if family in others else load_model(checkpoints[family])
    logits = leave(model, IDS, whole(model, IDS)[-1])
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LINEAR)
def test_greedy_search_with_linear_attention_finds_the_best_continuation(others, family):
    model, feature = others[family], Feature.of(BLOCKS, 5)
    found = greedy_search(model, [feature], n=2, start=(4,))
    first = torch.tensor([[4, token] for token in range(VOCABULARY)])
    best = int(whole(model, first)[-1][:, -1, 5].argmax())
    second = torch.tensor([[4, best, token] for token in range(VOCABULARY)])
    values = whole(model, second)[-1][:, -1, 5]
    assert found.tokens.tolist() == [[best, int(values.argmax())]]
    assert found.values[0, -1] == pytest.approx(float(values.max()), rel=1e-4)


@pytest.mark.parametrize("family", LINEAR)
@torch.no_grad()
def test_sampled_tokens_follow_the_whole_models_distribution(others, family):
    ids = sample_tokens(others[family], rows=2, length=5, start=0, seed=3)
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(2, 1, dtype=torch.long)
    while expected.shape[1] < 5:
        logits = others[family](input_ids=expected, use_cache=False).logits[:, -1]
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        expected = torch.cat([expected, sampled], dim=1)
    assert torch.equal(ids, expected)


def test_blocks_without_attention_are_refused_for_the_site_attention_alone(others):
    with pytest.raises(FrankenmergeError, match="omit --site attention"):
        outputs_of(others["qwen3_next"], IDS, site="attention")


def test_a_gemma_3_with_both_kinds_of_attention_is_analyzed(checkpoints, run, tmp_path):
    donor, output = checkpoints["gemma3_text"], tmp_path / "g.atlas.safetensors"
    code, _, errors = run("analyze", donor.path, "-o", output)
    assert code == 0, errors
    expected = whole(load_model(donor), torch.arange(VOCABULARY)[:, None])
    for block, states in enumerate(expected):
        best = load_atlas(output).top["plain"].tokens[block, :, 0]
        values = states[:, 0].gather(0, torch.tensor(best[None].astype("int64")))[0]
        torch.testing.assert_close(values, states[:, 0].max(0).values, rtol=1e-4, atol=1e-5)
