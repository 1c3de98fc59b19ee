"""Intervals cover as often as they say on correlated losses; differences are paired."""

import math

import numpy as np
import pytest

from frankenmerge.evaluation import intervals as intervals_module
from frankenmerge.evaluation.intervals import (
    FEWEST,
    SEGMENT,
    difference,
    intervals,
    resampled,
    segment_sums,
)
from frankenmerge.evaluation.language import Loss


def text_like(
    generator: np.random.Generator, tokens: int, length: int = 4, correlation: float = 0.9
) -> Loss:
    """Losses around 3 nats of tokens of `length` bytes: a first-order autoregressive process."""
    noise = generator.standard_normal(tokens) * math.sqrt(1 - correlation**2)
    values = np.empty(tokens)
    values[0] = generator.standard_normal()
    for place in range(1, tokens):
        values[place] = correlation * values[place - 1] + noise[place]
    return Loss(3 + values, tokens * length, values > 0, np.arange(1, tokens + 1) * length)


def bits(loss: Loss, seed: int = 0):
    return intervals(resampled({"text": loss}, seed)["text"])["bits_per_byte"]


def test_segments_hold_every_token_once_where_it_ends():
    loss = Loss(
        np.array([1.0, 2.0, 4.0, 8.0]),
        40,
        np.array([True, True, False, True]),
        np.array([2, 3, 20, 40]),
    )
    nats, hits, tokens, size = segment_sums(loss)
    assert len(nats) == FEWEST and size.tolist() == [2] * 20
    assert {place: value for place, value in enumerate(nats) if value} == {0: 1, 1: 2, 9: 4, 19: 8}
    assert {place: value for place, value in enumerate(hits) if value} == {0: 1, 1: 1, 19: 1}
    assert tokens.sum() == 4


@pytest.mark.parametrize(
    "size, count", [(1, 1), (7, 7), (500, FEWEST), (SEGMENT * 20, 20), (SEGMENT * 57 + 100, 57)]
)
def test_segments_are_of_two_kibibytes_or_twenty(size, count):
    sums = segment_sums(Loss(np.ones(3), size))
    assert sums.shape == (4, count) and sums[0].sum() == 3 and sums[3].sum() == size


def test_intervals_cover_the_true_value_in_95_percent():
    """The true mean is in 95 % of the intervals; those of independent tokens cover far less."""
    generator = np.random.default_rng(0)
    truth, held, naive = 3 / math.log(2) / 4, 0, 0
    for seed in range(150):
        loss = text_like(generator, 15_000)
        low, high = bits(loss, seed)
        held += low <= truth <= high
        spread = 1.96 * loss.nats.std() / math.sqrt(loss.tokens)
        naive += abs(loss.nats_per_token - 3) <= spread
    assert held / 150 > 0.88
    assert naive / 150 < 0.6


def test_the_figure_lies_in_its_interval_and_the_interval_narrows_with_more_text():
    generator = np.random.default_rng(1)
    widths = []
    for tokens in (8_000, 128_000):
        loss = text_like(generator, tokens)
        found = intervals(resampled({"text": loss}, 0)["text"])
        for name in ("bits_per_byte", "nats_per_token", "accuracy"):
            assert found[name].low < getattr(loss, name) < found[name].high
        widths.append(found["bits_per_byte"].high - found["bits_per_byte"].low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    loss = text_like(np.random.default_rng(2), 10_000)
    assert bits(loss, 3) == bits(loss, 3) != bits(loss, 4)


def test_accuracy_that_was_not_asked_has_no_interval():
    assert set(intervals(resampled({"text": Loss(np.ones(50), 100)}, 0)["text"])) == {
        "bits_per_byte",
        "nats_per_token",
    }


def test_differences_are_paired():
    """A constant difference is found exactly, though each figure by itself is uncertain."""
    donor = {
        "one": text_like(np.random.default_rng(3), 20_000),
        "two": text_like(np.random.default_rng(4), 5_000),
    }
    model = {name: loss._replace(nats=loss.nats + 0.005) for name, loss in donor.items()}
    total, texts = difference(model, donor, 0)
    added = 0.005 / math.log(2) / 4
    low, high = bits(donor["one"])
    assert high - low > 10 * added
    for found in (total, *texts.values()):
        assert found.bits_per_byte == pytest.approx(added)
        assert found.interval == pytest.approx((added, added), rel=0.01)
    assert list(texts) == ["one", "two"]


def test_a_model_beside_itself_differs_by_nothing():
    losses = {"text": text_like(np.random.default_rng(5), 3_000)}
    total, _ = difference(losses, losses, 0)
    assert total == (0, (0, 0))


def test_models_of_different_tokenizers_are_compared_on_the_same_bytes():
    """The same nats per byte in tokens of four bytes and of two: no difference."""
    long = text_like(np.random.default_rng(6), 10_000)
    half = Loss(np.repeat(long.nats / 2, 2), long.bytes, None, np.arange(1, 20_001) * 2)
    total, _ = difference({"text": half}, {"text": long}, 0)
    assert total.bits_per_byte == pytest.approx(0, abs=1e-12)
    assert total.interval == pytest.approx((0, 0), abs=1e-3)
    low, high = bits(long)
    assert high - low > 0.02


def test_resamples_in_parts_are_the_same(monkeypatch):
    loss = text_like(np.random.default_rng(0), 15_000)
    whole = resampled({"text": loss}, 3)["text"]
    monkeypatch.setattr(intervals_module, "COUNTS", 70)
    np.testing.assert_allclose(resampled({"text": loss}, 3)["text"], whole)
