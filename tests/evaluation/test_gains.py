"""Gains: by hand, by a bootstrap in plain loops, and in simulations where the truth is known."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.domains import Domain, text_domain
from frankenmerge.evaluation.gains import RESAMPLES, donor_losses, gain_of, joined, mean_loss
from frankenmerge.models.loading import load_model


def sums_of(rng: np.random.Generator, mean: float, units: dict[str, int]) -> dict[str, np.ndarray]:
    made = {}
    for name, count in units.items():
        tokens = rng.integers(5, 20, count).astype(float)
        made[name] = np.stack([tokens * (mean + rng.normal(0, 0.3, count)), tokens])
    return made


def test_gain_by_hand():
    one = {"x": np.array([[2.0, 4.0], [2.0, 2.0]]), "y": np.array([[9.0], [3.0]])}
    two = {"x": np.array([[4.0, 4.0], [2.0, 2.0]]), "y": np.array([[3.0], [3.0]])}
    model = {"x": np.array([[1.0, 3.0], [2.0, 2.0]]), "y": np.array([[3.0], [3.0]])}
    assert mean_loss(one) == 15 / 7 and mean_loss(two) == 11 / 7 and mean_loss(model) == 1
    found = gain_of(model, {"one": one, "two": two}, seed=0)
    assert found.nats == pytest.approx(4 / 7)
    # On x the first donor is better (1.5), on y the second one (1).
    assert found.domains == pytest.approx({"x": 0.5, "y": 0.0})


def test_the_interval_is_that_of_a_bootstrap_in_plain_loops():
    rng, units = np.random.default_rng(1), {"x": 7, "y": 4}
    model = sums_of(rng, 1.0, units)
    donors = {name: sums_of(rng, mean, units) for name, mean in (("a", 1.1), ("b", 1.15))}
    for each in donors.values():
        for name in units:
            each[name][1] = model[name][1]
    found = gain_of(model, donors, seed=5, coverage=0.9)
    counts = {
        name: np.random.default_rng([5, place]).multinomial(
            count, np.full(count, 1 / count), size=RESAMPLES
        )
        for place, (name, count) in enumerate(units.items())
    }
    gains = []
    for draw in range(RESAMPLES):
        losses = {}
        for name, sums in {"model": model, **donors}.items():
            nats = tokens = 0.0
            for domain in units:
                for unit, times in enumerate(counts[domain][draw]):
                    nats += times * sums[domain][0, unit]
                    tokens += times * sums[domain][1, unit]
            losses[name] = nats / tokens
        gains.append(min(losses["a"], losses["b"]) - losses["model"])
    # 11 units in two domains: the 95th percentile of Student's t with 9 degrees is 1.83311, the
    # normal one 1.64485.
    middle, factor = np.median(gains), np.sqrt(11 / 9) * 1.83311 / 1.64485
    expected = middle + factor * (np.percentile(gains, [5, 95]) - middle)
    assert found.interval == pytest.approx(tuple(expected), rel=1e-4)


def test_95_percent_intervals_hold_the_truth_in_about_as_many_runs():
    rng, runs, held = np.random.default_rng(0), 200, 0
    for run in range(runs):
        tokens = np.full(100, 16.0)
        common = rng.normal(3, 0.5, 100)  # the difficulty of a unit is the same for all
        donor = {"x": np.stack([tokens * (common + rng.normal(0, 0.1, 100)), tokens])}
        model = {"x": np.stack([tokens * (common - 0.02 + rng.normal(0, 0.1, 100)), tokens])}
        low, high = gain_of(model, {"d": donor}, seed=run).interval
        held += low <= 0.02 <= high
    assert 0.90 * runs <= held <= 0.99 * runs


def test_where_nothing_is_gained_over_two_equal_donors_it_is_seldom_claimed():
    rng, runs, claimed = np.random.default_rng(0), 100, 0
    for run in range(runs):
        tokens = np.full(80, 16.0)
        common = rng.normal(3, 0.5, 80)

        def made(common=common, tokens=tokens):
            return {"x": np.stack([tokens * (common + rng.normal(0, 0.1, 80)), tokens])}

        claimed += gain_of(made(), {"a": made(), "b": made()}, seed=run).interval[0] > 0
    assert claimed <= 0.06 * runs


@pytest.mark.parametrize("units", [2, 4, 8])
def test_few_units_claim_no_more_than_many(units):
    """Three finalists that are all as good as the donor: in 5 % of runs at most one is better."""
    rng, runs, claimed = np.random.default_rng(0), 400, 0
    tokens = np.full(units, 128.0)
    for run in range(runs):
        common = rng.normal(3, 0.5, units)
        donor, *finalists = (
            {"x": np.stack([tokens * (common + rng.normal(0, 0.1, units)), tokens])}
            for _ in range(4)
        )
        lows = [
            gain_of(each, {"d": donor}, seed=run, coverage=1 - 0.05 / 3).interval[0]
            for each in finalists
        ]
        claimed += max(lows) > 0
    assert claimed <= 0.05 * runs


def test_more_coverage_is_a_wider_interval_and_one_seed_the_same():
    rng, units = np.random.default_rng(2), {"x": 40}
    model, donor = sums_of(rng, 1.0, units), sums_of(rng, 1.1, units)
    narrow, wide, again, other = (
        gain_of(model, {"d": donor}, seed=seed, coverage=coverage).interval
        for seed, coverage in ((0, 0.95), (0, 1 - 0.05 / 3), (0, 0.95), (1, 0.95))
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert narrow == again != other


def test_pieces_that_are_joined_are_the_whole():
    rng = np.random.default_rng(3)
    one, two = sums_of(rng, 1, {"x": 5, "y": 3}), sums_of(rng, 2, {"x": 4, "y": 6})
    nats = sum(part[name][0].sum() for part in (one, two) for name in "xy")
    tokens = sum(part[name][1].sum() for part in (one, two) for name in "xy")
    assert mean_loss(joined([one, two])) == pytest.approx(nats / tokens)


@pytest.mark.parametrize("expected_loss", [False, True])
def test_the_ensemble_is_the_mean_of_probabilities(donors, expected_loss):
    models: dict[str, PreTrainedModel] = {
        name: load_model(open_checkpoint(str(donors[name]))) for name in ("a", "b", "deep")
    }
    letters = np.random.default_rng(0).integers(1, 48, 60)
    domain: Domain = text_domain("x", letters, 0, 16)
    if expected_loss:
        target = torch.rand(*domain.counted.shape, 48).softmax(-1)
        domain = domain._replace(target=target)
    each, ensemble = donor_losses(models, [domain])
    with torch.no_grad():
        probabilities = {
            name: model(input_ids=domain.ids).logits[:, :-1].double().softmax(-1)
            for name, model in models.items()
        }
    mean = torch.stack(list(probabilities.values())).mean(0)

    def nats(found: torch.Tensor) -> float:
        if domain.target is not None:
            losses = -(domain.target * found.log()).sum(-1)
        else:
            losses = -found.gather(-1, domain.ids[:, 1:, None]).squeeze(-1).log()
        return float(losses[domain.counted].mean())

    assert mean_loss(ensemble) == pytest.approx(nats(mean), rel=1e-5)
    for name, found in probabilities.items():
        assert mean_loss(each[name]) == pytest.approx(nats(found), rel=1e-5)
