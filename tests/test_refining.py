"""Turns of single blocks: run and refined on donors that differ by a turn alone, whose right turn is known."""

import pytest
import torch
from conftest import turned_donor, write_donor

from frankenmerge.analysis.turning import Turns, at_seam, drawn, fit_over_blocks, refine, seam_scale, show, turning
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.families import FAMILIES
from frankenmerge.gauge import Turn, random_turn
from frankenmerge.models import load_model, virtual_splice
from frankenmerge.recipe import Block, recipe_of

IDS = torch.randint(48, (12, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def twins(request, tmp_path):
    """Two models that differ by a known turn, the second one's blocks from 2 on, and the turn back."""
    family = getattr(request, "param", "llama")
    first = write_donor(tmp_path / "first", family, seed=3)
    turn = random_turn(16, 1, centred=FAMILIES[family].norm == "layer")
    second = turned_donor(first, tmp_path / "second", turn)
    checkpoint = open_checkpoint(str(second))
    models = [load_model(open_checkpoint(str(path))).requires_grad_(False) for path in (first, second)]
    recipe = recipe_of([Block("second", 2), Block("second", 3)])
    part = virtual_splice(recipe, {"second": checkpoint}, {"second": models[1]}).requires_grad_(False)
    return *models, part, turn.matrix.T.contiguous()


def off(turns: Turns) -> float:
    identity = turns.matrices @ turns.matrices.mT
    return float((identity - torch.eye(16)).abs().max())


def nudged(matrix, amount):
    skew = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)) * amount
    return (matrix.float() @ torch.matrix_exp(skew - skew.T)).expand(5, 16, 16).clone()


@torch.no_grad()
@pytest.mark.parametrize("twins", ["llama", "gpt2", "gpt_neox"], indirect=True)
def test_blocks_on_a_stream_in_another_basis_finish_what_the_other_donor_began(twins):
    a, b, part, back = twins
    shown = show(a, b, IDS)
    with turning(part, [back.float()] * 3, [1.0] * 3, [shown.states[0][2]]):
        logits = part(input_ids=IDS).logits
    torch.testing.assert_close(logits, a(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in part.modules())


@torch.no_grad()
def test_what_is_shown_is_what_transformers_gives(donors):
    a, b = (load_model(open_checkpoint(str(donors[name]))) for name in ("a", "b"))
    shown = show(a, b, IDS)
    mean = (a(input_ids=IDS).logits.softmax(-1) + b(input_ids=IDS).logits.softmax(-1)) / 2
    torch.testing.assert_close(shown.said.exp(), mean)
    expected = b(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(state, other) for state, other in zip(shown.states[1][:-1], expected[:-1], strict=True))


def test_a_fit_over_blocks_comes_near_the_turn_of_twins(twins):
    a, b, _, back = twins
    turns = fit_over_blocks(show(a, b, torch.randint(48, (40, 8), generator=torch.Generator().manual_seed(0))))
    assert turns.matrices.shape == (5, 16, 16) and off(turns) < 1e-5
    agreement = (turns.matrices * back.float()).sum((1, 2)) / 16  # 1 where they are equal, about 0 for unrelated turns
    assert agreement[1:].min() > 0.9


def test_the_turns_at_a_seam_are_exact_and_scaled_to_it(twins):
    a, b, _, back = twins
    shown = show(a, b, IDS)
    exact = at_seam(Turns(back.float().expand(5, 16, 16), torch.full((5,), 2.0)), shown, 2, 2)
    assert len(exact) == 3
    for turn in exact:
        torch.testing.assert_close(turn.matrix @ turn.matrix.T, torch.eye(16, dtype=torch.float64), atol=1e-14, rtol=0)
        assert turn.scale == pytest.approx(2, rel=1e-3)
    assert seam_scale(-back.float(), shown, 2, 2) == pytest.approx(-1, rel=1e-3)


@pytest.mark.parametrize("twins", ["llama", "gpt2"], indirect=True)
def test_refining_leads_back_towards_the_right_turn(twins):
    a, b, part, back = twins
    centred = a.config.model_type == "gpt2"
    shown = show(a, b, IDS)
    if centred:
        keep = torch.eye(16) - 1 / 16
        left, _, right = torch.linalg.svd(keep @ nudged(back, 0.05) @ keep + 1 / 16)
        start = Turns(left @ right, torch.ones(5))
    else:
        start = Turns(nudged(back, 0.05), torch.ones(5))
    refined = refine(start, shown, {2: part}, [(2, 2)], steps=40, centred=centred)

    def divergence(turns):
        found = at_seam(turns, shown, 2, 2)
        with torch.no_grad(), turning(part, [turn.matrix.float() for turn in found], [turn.scale for turn in found], [shown.states[0][2]]):
            said = part(input_ids=IDS).logits.log_softmax(-1)
        return float((shown.said.exp() * (shown.said - said)).sum(-1).mean())

    assert divergence(refined) < 0.3 * divergence(start)
    assert off(refined) < 1e-5
    assert torch.equal(refined.matrices[:2], start.matrices[:2])
    if centred:
        torch.testing.assert_close(refined.matrices.sum(1), torch.ones(5, 16), atol=1e-4, rtol=0)


def test_tokens_are_drawn_as_the_model_says(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    ids = drawn(model, 4000, 2, 7, seed=0)
    assert ids.shape == (4000, 2) and set(ids[:, 0].tolist()) == {7}
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1)
    assert (ids[:, 1].bincount(minlength=48) / 4000 - expected).abs().max() < 0.03
    assert torch.equal(ids, drawn(model, 4000, 2, 7, seed=0))
    assert not torch.equal(ids, drawn(model, 4000, 2, 7, seed=1))


def test_turns_are_hashed_by_their_numbers():
    assert Turn(torch.eye(2).double()).hash != Turn(torch.eye(2).double(), 2.0).hash
