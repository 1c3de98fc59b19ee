"""What a recipe wins over its donors on texts that nothing was chosen by."""

from collections.abc import Sequence
from typing import NamedTuple

from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.gains import (
    Gain,
    best_of,
    captured_share,
    counted,
    donor_losses,
    gain_of,
    losses_together,
)
from frankenmerge.splicing.resolve import Splice
from frankenmerge.workflows.gaining import domains_on


class HeldOut(NamedTuple):
    """A recipe and its donors on the same tokens."""

    best_donor: str
    gain: Gain
    """Over the best donor."""
    over: dict[str, Gain]
    """Over each donor."""
    ensemble: Gain
    """Of the mean of the donors' probabilities over the best donor: a ceiling, no single model."""
    tokens: int

    @property
    def captured(self) -> float | None:
        """The share of the ensemble's gain; None where the ensemble gains nothing."""
        return captured_share(self.gain, self.ensemble)


def held_out(
    splice: Splice, donors: Sequence[str], bench: Bench, texts: Sequence[Text], *, seed: int = 0
) -> HeldOut:
    """Measure what a recipe wins over its donors on texts, with paired 95 % intervals.

    Args:
        splice: the recipe with its donors.
        donors: names of those that it is compared with, in the bench.
        bench: with these donors.
        texts: at least 512 tokens each, that nothing was chosen by.
        seed: of the resamples.

    Raises:
        FrankenmergeError: for donors that do not read the same tokens, and for a short text.
    """
    domains = domains_on(texts, bench, donors, seed)
    models = {name: bench.load(name).model for name in donors}
    measured, ensemble = donor_losses(models, domains)
    (ours,) = losses_together([splice], bench.assemble, domains).sums
    return HeldOut(
        best_of(measured),
        gain_of(ours, measured, seed=seed),
        {name: gain_of(ours, {name: sums}, seed=seed) for name, sums in measured.items()},
        gain_of(ensemble, measured, seed=seed),
        counted(ensemble),
    )
