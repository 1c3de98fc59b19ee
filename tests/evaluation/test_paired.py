"""Paired tests on items: closed forms, hand-made cases, and how often they err."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import multinomial

from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.paired import (
    ItemResults,
    difference_interval,
    holm,
    mcnemar,
    paired_tests,
)

Z = 1.959963984540054


def results(correct: str, task: str = "t", metric: str = "acc", **hashes: str) -> ItemResults:
    items = {str(number): digit == "1" for number, digit in enumerate(correct)}
    return ItemResults(task, metric, items, hashes)


@pytest.mark.parametrize("b", range(8))
@pytest.mark.parametrize("c", [0, 1, 4, 30])
def test_mcnemar_is_twice_the_smaller_tail_of_a_fair_coin(b, c):
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar(b, c) == pytest.approx(min(1, 2 * tail)) == mcnemar(c, b)


def test_models_that_differ_on_no_item_are_not_told_apart():
    assert mcnemar(0, 0) == 1
    low, high = difference_interval(0, 0, 100)
    assert -low == pytest.approx(high) == pytest.approx(Z**2 / (100 + Z**2))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def score(b: int, c: int, n: int, difference: float) -> float:
    """The score statistic, with the likeliest share of `c` found by a search."""

    def loss(share: float) -> float:
        shares = np.array([share + difference, share, 1 - 2 * share - difference])
        return -float(xlogy([b, c, n - b - c], np.maximum(shares, 1e-300)).sum())

    bounds = max(0, -difference), (1 - difference) / 2
    share = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * difference) / (n * (2 * share + difference * (1 - difference))) ** 0.5


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (5, 1, 60), (30, 20, 400), (3, 40, 90)])
def test_the_interval_ends_where_the_score_test_rejects(b, c, n):
    low, high = difference_interval(b, c, n)
    assert score(b, c, n, low) == pytest.approx(Z, abs=1e-4)
    assert score(b, c, n, high) == pytest.approx(-Z, abs=1e-4)


def test_the_interval_where_all_items_differ_in_one_direction():
    """In closed form: (n - z^2) / (n + z^2)."""
    low, high = difference_interval(50, 0, 50)
    assert (low, high) == (pytest.approx((50 - Z**2) / (50 + Z**2)), 1)
    assert difference_interval(0, 50, 50) == pytest.approx((-high, -low))


@pytest.mark.parametrize("shares", [(0.15, 0.1), (0.05, 0.05), (0.02, 0.005), (0.4, 0.1)])
def test_the_interval_covers_the_true_difference(shares):
    """Over all outcomes of 60 items, weighed by their probabilities."""
    n, covered, known = 60, 0.0, 0.0
    law = multinomial(n, [*shares, 1 - sum(shares)])
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if (probability := float(law.pmf([b, c, n - b - c]))) > 1e-6:
                low, high = difference_interval(b, c, n)
                known += probability
                covered += probability * (low <= shares[0] - shares[1] <= high)
    assert known > 0.999 and covered > 0.935


def test_a_pair_by_hand():
    ours = [results("1110110010"), results("11", task="u"), results("1", task="alone")]
    theirs = [results("1000110001"), results("00", task="u")]
    first, second = paired_tests(ours, theirs, "a and b")
    assert (first.only_model, first.only_donor, first.items) == (3, 1, 10)
    assert (first.accuracy, first.donor_accuracy) == (0.6, 0.4)
    assert first.difference == pytest.approx(0.2)
    assert first.p == pytest.approx(0.625) and second.p == pytest.approx(0.5)
    assert [first.p_holm, second.p_holm] == [1, 1]


def test_results_on_other_items_are_refused_with_their_number():
    with pytest.raises(FrankenmergeError) as error:
        paired_tests([results("1101")], [results("11")], "a and b")
    assert "0 items missing from the first, 2 from the second" in str(error.value)
    with pytest.raises(FrankenmergeError, match="1 items of equal ids with other content"):
        paired_tests(
            [results("11", **{"0": "x", "1": "y"})], [results("11", **{"0": "x", "1": "z"})], "p"
        )


def test_the_standard_error_is_that_of_a_share():
    assert results("1100").stderr == pytest.approx((0.25 / 3) ** 0.5)
    assert results("1").stderr is None
