"""Domains: every token of a text once, parts that share nothing, losses as torch computes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.domains import (
    FEWEST_UNITS,
    LENGTH,
    LONGEST_UNIT,
    MOST_ROWS,
    POSITIONS,
    Domain,
    sampled_domain,
    split,
    stages,
    task_domain,
    text_domain,
)
from frankenmerge.evaluation.items import ItemRows
from frankenmerge.evaluation.language import LOGITS_BYTES, Encoded, positions_for
from frankenmerge.models.loading import load_model


def predicted_tokens(domain: Domain) -> list[int]:
    return domain.ids[:, 1:][domain.counted].tolist()


def rows_of(domain: Domain) -> set[tuple[int, ...]]:
    return {tuple(row) for row in domain.ids.tolist()}


def numbered(count: int, context: int = 9) -> Domain:
    """A text whose tokens are all different, so that a row tells where it is from."""
    return text_domain("numbers", np.arange(1, count + 1), 0, context)


@given(length=st.integers(4, 400), context=st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_with_a_start_token_every_token_of_a_text_is_predicted_once(length, context):
    ids = np.arange(1, length + 1)
    domain = text_domain("text", ids, 0, context)
    assert predicted_tokens(domain) == ids.tolist()
    assert (domain.ids[:, 0] == 0).all()
    assert domain.ids.shape[1] <= context


@given(length=st.integers(4, 400), context=st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_without_one_the_first_of_every_row_is_only_read(length, context):
    ids = np.arange(1, length + 1)
    domain = text_domain("text", ids, None, context)
    first = {begin + 1 for begin in range(0, length, context)}
    assert predicted_tokens(domain) == [each for each in ids.tolist() if each not in first]


def test_padding_does_not_count():
    domain = text_domain("text", np.arange(1, 12), 0, 5)
    assert domain.ids.tolist() == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10, 11, 0]]
    assert domain.counted.sum(1).tolist() == [4, 4, 3]
    logits = torch.randn(3, 5, 12)
    assert (domain.nats(logits)[2, 3:] == 0).all()
    changed = logits.clone()
    changed[2, 3:] = 100 * torch.randn(2, 12)
    assert torch.equal(domain.nats(logits), domain.nats(changed))


@pytest.mark.parametrize(
    "rows, unit", [(1, 1), (95, 1), (96, 2), (FEWEST_UNITS * LONGEST_UNIT, LONGEST_UNIT), (505, 8)]
)
def test_units_are_neighbouring_rows_and_as_many_as_can_be_up_to_a_number(rows, unit):
    domain = numbered(8 * rows)
    assert len(domain.ids) == rows
    assert domain.units.tolist() == [row // unit for row in range(rows)]
    assert domain.size == -(-rows // unit) >= min(rows, FEWEST_UNITS)


def test_of_a_long_text_evenly_spaced_pieces_are_used():
    domain = numbered(8 * 4000)
    assert len(domain.ids) == MOST_ROWS and domain.size == MOST_ROWS // LONGEST_UNIT
    # Each row holds the numbers of its tokens: which rows of the text they are.
    rows = domain.ids[:, 1].numpy().reshape(-1, LONGEST_UNIT)
    steps = np.diff(rows, axis=1)
    assert (steps == steps[0, 0]).all()
    gaps = np.diff(rows[:, 0])
    assert gaps.max() - gaps.min() <= steps[0, 0]


@given(rows=st.integers(8, 300), parts=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_the_parts_of_a_split_are_disjoint_complete_and_of_like_size(rows, parts):
    domain = numbered(8 * rows)
    found = [part for (part,) in split([domain], parts)]
    dealt = [rows_of(part) for part in found]
    assert set().union(*dealt) == rows_of(domain)
    assert sum(map(len, dealt)) == rows
    assert max(part.size for part in found) - min(part.size for part in found) <= 1
    for part in found:
        assert set(part.units.tolist()) == set(range(part.size))
        together = [rows_of(part.of_units(np.array([unit]))) for unit in range(part.size)]
        whole = [rows_of(domain.of_units(np.array([unit]))) for unit in range(domain.size)]
        assert all(unit in whole for unit in together)


@given(rows=st.integers(12, 300))
@settings(max_examples=40, deadline=None)
def test_stages_are_disjoint_complete_and_have_their_shares(rows):
    domain, shares = numbered(8 * rows), (1 / 6, 1 / 3, 1 / 2)
    found = [stage for (stage,) in stages([domain], shares)]
    dealt = [rows_of(stage) for stage in found]
    assert set().union(*dealt) == rows_of(domain)
    assert sum(map(len, dealt)) == rows
    for stage, share in zip(found, shares, strict=True):
        assert abs(stage.size - share * domain.size) <= 1


def test_a_stage_is_from_all_over_the_text():
    domain = numbered(8 * 48)
    (first,), *_ = stages([domain], (1 / 6, 1 / 3, 1 / 2))
    places = (first.ids[:, 1].numpy() - 1) // 8
    assert len(places) == 8 and np.diff([-4, *places, 52]).max() <= 10


def test_batches_are_all_rows_in_order_within_the_most_positions():
    domain = numbered(8 * 2000)
    batches = domain.batches()
    assert len(batches) > 1
    assert torch.equal(torch.cat([batch.ids for batch in batches]), domain.ids)
    assert np.array_equal(np.concatenate([batch.units for batch in batches]), domain.units)
    assert all(batch.ids.numel() <= POSITIONS for batch in batches)


def test_batches_are_smaller_where_logits_would_be_large():
    assert positions_for(32_000) == POSITIONS
    assert 4 * 262_144 * positions_for(262_144) == LOGITS_BYTES
    domain = numbered(8 * 100)._replace(positions=20)  # two rows of 9
    (half,) = split([domain], 2)[0]
    assert [len(batch.ids) for batch in half.batches()] == [2] * 25


def test_the_loss_of_a_text_is_torchs_cross_entropy():
    domain = text_domain("text", np.arange(1, 30), 0, 8)
    logits = torch.randn(*domain.ids.shape, 32)
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), domain.ids[:, 1:].flatten(), reduction="none"
    ).view(len(domain.ids), -1)
    torch.testing.assert_close(domain.nats(logits), expected * domain.counted)


def test_the_expected_loss_is_a_sum_over_all_tokens():
    ids = torch.randint(5, (3, 4))
    target = torch.rand(3, 3, 5).softmax(-1)
    domain = Domain("d", ids, torch.ones(3, 3, dtype=torch.bool), np.arange(3), target)
    logits = torch.randn(3, 4, 5)
    found = domain.nats(logits)
    for row in range(3):
        for place in range(3):
            scores = logits[row, place].double()
            log_sum = torch.log(torch.exp(scores).sum())
            expected = sum(
                -float(target[row, place, token]) * float(scores[token] - log_sum)
                for token in range(5)
            )
            assert float(found[row, place]) == pytest.approx(expected, rel=1e-5)


def test_sums_of_units_are_of_their_rows():
    domain = numbered(8 * 100 - 3)
    losses = np.random.default_rng(0).random((100, 8))
    nats, tokens, right = domain.sums(losses)
    assert nats == pytest.approx([losses[row : row + 2].sum() for row in range(0, 100, 2)])
    assert tokens.tolist() == [16.0] * 49 + [13.0]
    assert not right.any()


@pytest.mark.parametrize("name", ["a", "g"])
def test_sampled_tokens_come_with_the_probabilities_of_the_model_that_drew_them(donors, name):
    model = load_model(open_checkpoint(str(donors[name])))
    domain = sampled_domain("own", model, 3, rows=70)
    positions = min(LENGTH, 64)  # the tests' donors have 64 positions
    assert domain.ids.shape == (70, positions) and domain.size == 70
    assert domain.counted.all() and domain.target is not None
    with torch.no_grad():
        logits = model(input_ids=domain.ids).logits
    torch.testing.assert_close(domain.target, logits[:, :-1].softmax(-1), atol=1e-6, rtol=1e-4)
    # A model's expected loss on its own tokens is its entropy, the least that any model can have.
    entropy = torch.distributions.Categorical(logits=logits[:, :-1]).entropy()
    torch.testing.assert_close(domain.nats(logits), entropy, atol=1e-5, rtol=1e-4)
    other = domain.nats(logits + torch.randn_like(logits))
    assert (other >= entropy - 1e-5).all()
    # The drawn tokens estimate it.
    drawn = domain._replace(target=None).nats(logits)
    error = drawn.std() / drawn.numel() ** 0.5
    assert abs(float(drawn.mean() - entropy.mean())) < 4 * float(error)


def test_one_seed_draws_the_same_and_another_one_not(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    first, again, other = (sampled_domain("d", model, seed, rows=3) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


def test_an_item_of_a_task_loses_what_its_right_choice_lacks():
    items = np.array([0, 0, 0, 1, 1])
    counted = np.array([[1, 1], [0, 1], [1, 0], [1, 1], [0, 1]], dtype=bool)
    ids = np.zeros((5, 3), dtype=np.int64)
    rows = ItemRows(ids, counted, items, np.array([2, 0]), np.ones(5))
    domain = task_domain("task", rows)
    nats = np.random.default_rng(0).random((5, 2)) * counted
    probabilities = np.exp(-nats.sum(1))
    losses, weights, right = domain.sums(nats)
    shares = [
        probabilities[2] / probabilities[:3].sum(),
        probabilities[3] / probabilities[3:].sum(),
    ]
    assert losses == pytest.approx(-np.log(shares))
    assert weights.tolist() == [1, 1]
    assert right.tolist() == [probabilities[:3].argmax() == 2, probabilities[3:].argmax() == 0]
    # Items stay whole, and the order of batches does not matter.
    second = domain.of_units(np.array([1]))
    assert second.sums(nats[3:])[0] == pytest.approx(losses[1:])


def test_of_a_conversation_every_token_that_counts_is_predicted_once():
    ids = np.arange(1, 31)
    counted = (ids[1:] > 9) & (ids[1:] < 20)
    chat = Encoded(ids, 0, counted=counted)
    domain = text_domain("chats", [np.arange(100, 105), chat, chat], 0, 8)
    answers = list(range(10, 20))
    assert predicted_tokens(domain) == [*range(100, 105), *answers, *answers]
    for row in domain.ids[1:]:  # as they follow each other, with no start token between
        assert (row.diff() == 1).all()
    assert domain.size == len(domain.ids) == 9
