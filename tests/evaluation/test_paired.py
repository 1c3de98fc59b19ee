"""Paired tests on items: closed forms, hand-made cases, and how often they err."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.paired import (
    ItemResults,
    difference_interval,
    holm,
    mcnemar,
    paired_tests,
)


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
    assert -low == high == pytest.approx(1 - 0.05**0.01)  # nearly 3 in 100


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


@pytest.mark.parametrize(("b", "c"), [(9, 1), (10, 2), (8, 3), (15, 5), (0, 6), (5, 0), (40, 25)])
def test_the_interval_excludes_0_where_the_test_rejects(b, c):
    low, high = difference_interval(b, c, 200)
    assert (low > 0 or high < 0) == (mcnemar(b, c) < 0.05)
    assert low <= (b - c) / 200 <= high


def test_the_interval_s_ends_are_the_shares_that_leave_a_tail_of_2_5_percent():
    low, high = difference_interval(12, 7, 100)
    shares = [(end * 100 / 19 + 1) / 2 for end in (low, high)]
    assert binom.sf(11, 19, shares[0]) == pytest.approx(0.025)
    assert binom.cdf(12, 19, shares[1]) == pytest.approx(0.025)


def test_the_interval_covers_the_true_difference():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        only_model, only_donor, _ = generator.multinomial(150, [0.15, 0.1, 0.75])
        low, high = difference_interval(int(only_model), int(only_donor), 150)
        covered += low <= 0.05 <= high
    assert covered >= 0.93 * 400


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
