import pytest
import torch
from conftest import write_donor
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.analysis.decode import artefact_share, decode_hidden, decoder_of, embedding_table
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model


def table(v=48, d=16, seed=0):
    return torch.randn(v, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("v", "d"), [(1024, 128), (48, 16), (16, 16), (10, 16)])
def test_every_token_decodes_to_itself(v, d):
    rows = table(v, d)
    assert decoder_of(rows)(rows).tolist() == list(range(v))


def test_a_dead_neuron_does_no_harm():
    rows = torch.cat([table(), torch.zeros(48, 3)], dim=1)
    assert decoder_of(rows)(rows).tolist() == list(range(48))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_scores_are_those_of_the_pseudo_inverse(family, tmp_path):
    rows = embedding_table(load_model(open_checkpoint(str(write_donor(tmp_path / family, family)))))
    decoder = decoder_of(rows, excluded=None)
    embeddings = table(7 * 3).view(7, 3, 16)
    scores = embeddings.double() @ torch.linalg.pinv(rows.double())
    scores[..., list(decoder.left_out)] = -torch.inf
    assert torch.equal(decoder(embeddings), scores.argmax(dim=-1))


def test_identical_rows_decode_to_the_lowest_id():
    rows = table()
    rows[[20, 30]] = rows[7].clone()
    rows[40] = rows[3]
    expected = list(range(48))
    expected[20], expected[30], expected[40] = 7, 7, 3
    assert decoder_of(rows)(rows).tolist() == expected


def test_an_excluded_token_is_never_found_and_passes_its_role_on():
    rows = table()
    rows[20] = rows[7]
    decoder = decoder_of(rows, excluded=[7, 9])
    kept = [token for token in range(48) if token not in (7, 9)]
    assert decoder(rows[kept]).tolist() == kept
    assert decoder(rows[7]).item() == 20
    assert decoder.left_out == (7, 9)


def test_a_token_in_the_shadow_of_another_is_named_or_excluded():
    rows = table()
    rows[11] = rows[5] / 100
    rows[12] = 0
    with pytest.raises(FrankenmergeError, match="another one for 11, 12") as caught:
        decoder_of(rows)
    assert all(caught.value.faults[0])
    decoder = decoder_of(rows, excluded=None)
    assert decoder.left_out == (11, 12)
    assert decoder(rows[11]).item() == 5


@pytest.mark.parametrize("seed", range(8))
def test_the_quick_check_finds_every_unfaithful_token(seed):
    rows = table(200, 6, seed)
    scores = rows.double() @ torch.linalg.pinv(rows.double())
    wrong = (scores.argmax(dim=1) != torch.arange(200)).nonzero()[:, 0].tolist()
    assert wrong
    assert decoder_of(rows, excluded=None).left_out == tuple(wrong)


def test_no_row_is_near_one_hot():
    """Findings on the source document's claim: the diagonal of `E E^+` averages d / v."""
    rows = table(1024, 128).double()
    assert (rows @ torch.linalg.pinv(rows)).diagonal().mean().item() == pytest.approx(128 / 1024)


def test_embeddings_are_scaled_where_the_family_scales_them():
    config = AutoConfig.for_model(
        "gemma2",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=48,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(48)[None]
    rows = embedding_table(model)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=rows[None]).logits, model(input_ids=ids).logits)
    assert torch.allclose(rows, model.get_input_embeddings().weight * 4)


def test_hidden_decode_and_its_share():
    embeddings = torch.zeros(2, 3, 16)
    embeddings[0, :, 5] = 1
    embeddings[1, 0, 9] = 1
    tokens = decode_hidden(embeddings)
    assert tokens.tolist() == [[5, 5, 5], [9, 0, 0]]
    assert artefact_share(tokens, [5, 9]) == pytest.approx(4 / 6)
