"""Two models on the same items: exact McNemar tests, and Holm's correction over the tasks.

McNemar, Psychometrika 12 (1947), in its exact form: of the items that one model alone answers
correctly, each model has half if they are equally good. Holm, Scand. J. Statist. 6 (1979).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.stats import binomtest, norm

from frankenmerge.artefacts.bootstrap import COVERAGE
from frankenmerge.errors import fail
from frankenmerge.evaluation.intervals import Interval


class ItemResults(NamedTuple):
    """Which items of a task a model answers correctly, by one metric."""

    task: str
    metric: str
    correct: dict[str, bool]
    """By the items' ids."""
    hashes: dict[str, str] = {}
    """Of the items' content, where they are known."""

    @property
    def accuracy(self) -> float:
        """The share of items that are answered correctly."""
        return float(np.mean(list(self.correct.values())))

    @property
    def stderr(self) -> float | None:
        """The standard error of the accuracy, as of a sample of items; None for a single item."""
        spread = self.accuracy * (1 - self.accuracy)
        return (spread / (len(self.correct) - 1)) ** 0.5 if len(self.correct) > 1 else None


class PairedTest(NamedTuple):
    """A model and a donor on the same items of a task."""

    task: str
    metric: str
    items: int
    accuracy: float
    """The model's."""
    donor_accuracy: float
    difference: float
    """The model's accuracy minus the donor's."""
    interval: Interval
    only_model: int
    """Items that the model alone answers correctly."""
    only_donor: int
    p: float
    """Of the exact McNemar test, two-sided."""
    p_holm: float
    """The same after Holm's correction over all tests of the pair."""


def mcnemar(only_model: int, only_donor: int) -> float:
    """The p-value of the exact two-sided McNemar test; 1 if the models differ on no item."""
    differing = only_model + only_donor
    return float(binomtest(only_model, differing).pvalue) if differing else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction, in their order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(np.array(p_values)[order] * factors))
    return adjusted[np.argsort(order)].tolist()


def difference_interval(only_model: int, only_donor: int, items: int) -> Interval:
    """The 95 % score interval of a difference of accuracies on the same items.

    Tango, Statistics in Medicine 17 (1998): all differences that the score test does not reject,
    with the share of the items that differ estimated anew for each. Unlike an interval given how
    many items differ, or a bootstrap, it does not collapse where few or none differ.
    """
    quantile = float(norm.ppf((1 + COVERAGE) / 2) ** 2)

    def excess(difference: float) -> float:
        """The squared distance from `difference`, minus the largest that is not rejected."""
        product = difference * (1 - difference)
        linear = (2 * items - only_model + only_donor) * difference - only_model - only_donor
        root = math.sqrt(max(0.0, linear**2 + 8 * items * only_donor * product))
        likeliest = (root - linear) / (4 * items)  # share of `only_donor`, given the difference
        distance = only_model - only_donor - items * difference
        return distance**2 - quantile * items * (2 * likeliest + product)

    found = (only_model - only_donor) / items
    near = 1e-9  # a little beside the difference that was found, where the test never rejects
    brackets = ([found + (end - found) * near, end] for end in (-1, 1))
    low, high = (float(root_scalar(excess, bracket=bracket).root) for bracket in brackets)
    return Interval(low, high)


def paired_tests(
    model: Sequence[ItemResults], donor: Sequence[ItemResults], place: str
) -> list[PairedTest]:
    """Compare a model with a donor on every task and metric that both have.

    `place` names the pair in messages.

    Raises:
        FrankenmergeError: for results on other items.
    """
    theirs = {(each.task, each.metric): each for each in donor}
    found = [
        _paired_test(each, theirs[each.task, each.metric], place)
        for each in model
        if (each.task, each.metric) in theirs
    ]
    adjusted = holm([test.p for test in found])
    return [test._replace(p_holm=p) for test, p in zip(found, adjusted, strict=True)]


def _paired_test(model: ItemResults, donor: ItemResults, place: str) -> PairedTest:
    _check_items(model, donor, f"{place}: {model.task}")
    only_model = sum(right and not donor.correct[item] for item, right in model.correct.items())
    only_donor = sum(donor.correct[item] and not right for item, right in model.correct.items())
    items, p = len(model.correct), mcnemar(only_model, only_donor)
    return PairedTest(
        task=model.task,
        metric=model.metric,
        items=items,
        accuracy=model.accuracy,
        donor_accuracy=donor.accuracy,
        difference=(only_model - only_donor) / items,
        interval=difference_interval(only_model, only_donor, items),
        only_model=only_model,
        only_donor=only_donor,
        p=p,
        p_holm=p,
    )


def _check_items(model: ItemResults, donor: ItemResults, place: str) -> None:
    missing = [
        len(b.correct.keys() - a.correct.keys()) for a, b in ((model, donor), (donor, model))
    ]
    if any(missing):
        found = f"{missing[0]} items missing from the first, {missing[1]} from the second"
        remedy = "evaluate both on the same items"
        raise fail(place, "results on the same items", found, remedy)
    shared = model.hashes.keys() & donor.hashes.keys()
    if other := sum(model.hashes[item] != donor.hashes[item] for item in shared):
        found = f"{other} items of equal ids with other content (doc_hash)"
        raise fail(place, "results on the same items", found, "evaluate both on the same data")
