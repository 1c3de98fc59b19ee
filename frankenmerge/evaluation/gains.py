"""Gains: what a model wins against the best of its donors, with paired intervals.

The gain of a model is the loss of the best donor minus its own, in nats per token, on the same
tokens. Units of tokens are resampled with replacement, the same for every model (a paired block
bootstrap). In every resample the best donor is chosen anew, so that the interval knows that which
donor is best is not certain.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.artefacts.bootstrap import expanded_interval, resample_counts
from frankenmerge.evaluation.domains import Domain
from frankenmerge.evaluation.paired import ItemResults
from frankenmerge.evaluation.prefix_sharing import Assemble, splices_together
from frankenmerge.progress import Advance, ignore
from frankenmerge.splicing.resolve import Splice

RESAMPLES = 2000
Sums = Mapping[str, np.ndarray]
"""Nats, weight and right answers of every unit `[3, u]`, by domain; see `Domain.sums`."""


class Measured(NamedTuple):
    """The losses of splices, and what they cost."""

    sums: list[Sums]
    """Of every splice."""
    blocks: int
    """Passes of one batch through one block."""


class Gain(NamedTuple):
    """Nats per token won against the best donor; above 0 is better."""

    nats: float
    interval: tuple[float, float]
    domains: dict[str, float]
    """On every domain alone, against the best donor there."""


class Done(NamedTuple):
    """A splice that has been measured."""

    splice: int
    """Its number."""
    sums: Sums
    blocks: int
    """Passes of one batch through one block that it took."""


def losses_in_turn(
    splices: Sequence[Splice], assemble: Assemble, domains: Sequence[Domain]
) -> Iterator[Done]:
    """Measure splices on domains, one after the other in an order that shares most."""
    batches = _batches(domains)
    nats: list[np.ndarray] = []
    blocks = 0
    for output in splices_together(splices, assemble, [batch.ids for _, batch in batches]):
        made = batches[output.batch][1].nats(output.logits)
        nats.append(made.double().cpu().numpy())
        blocks += output.blocks
        if output.batch == len(batches) - 1:
            yield Done(output.splice, _sums(domains, batches, nats), blocks)
            nats, blocks = [], 0


def losses_together(
    splices: Sequence[Splice],
    assemble: Assemble,
    domains: Sequence[Domain],
    *,
    advance: Advance = ignore,
) -> Measured:
    """Measure splices on domains; what several begin with is run once.

    `advance` is called with 1 for every splice that is done.
    """
    done: dict[int, Done] = {}
    for each in losses_in_turn(splices, assemble, domains):
        done[each.splice] = each
        advance(1)
    blocks = sum(each.blocks for each in done.values())
    return Measured([done[number].sums for number in range(len(splices))], blocks)


@torch.no_grad()
def donor_losses(
    models: Mapping[str, PreTrainedModel], domains: Sequence[Domain]
) -> tuple[dict[str, Sums], Sums]:
    """Measure donors one by one, and their ensemble: the mean of the probabilities they predict."""
    batches = _batches(domains)
    names = [*models, ""]
    nats: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _, batch in batches:
        total: Tensor | None = None  # in turn: all predictions at once would take much memory
        for name, model in models.items():
            predicted = _predicted(model, batch.ids)
            nats[name].append(batch.nats(predicted).double().cpu().numpy())
            total = predicted if total is None else torch.logaddexp(total, predicted)
        if total is not None:  # the constant of the mean does not count
            nats[""].append(batch.nats(total).double().cpu().numpy())
    sums = {name: _sums(domains, batches, each) for name, each in nats.items()}
    return {name: sums[name] for name in models}, sums[""]


@torch.no_grad()
def model_losses(model: PreTrainedModel, domains: Sequence[Domain]) -> Sums:
    """Measure one model that is in memory."""
    batches = _batches(domains)
    nats = [
        batch.nats(model(input_ids=batch.ids.to(model.device), use_cache=False).logits)
        for _, batch in batches
    ]
    return _sums(domains, batches, [each.double().cpu().numpy() for each in nats])


def _predicted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().log_softmax(-1)


def _batches(domains: Sequence[Domain]) -> list[tuple[Domain, Domain]]:
    """The batches of all domains, each after the domain that it is of."""
    return [(domain, batch) for domain in domains for batch in domain.batches()]


def _sums(
    domains: Sequence[Domain],
    batches: Sequence[tuple[Domain, Domain]],
    nats: Sequence[np.ndarray],
) -> Sums:
    """Put the losses of batches together: those of each domain."""
    parts: dict[str, list[np.ndarray]] = {domain.name: [] for domain in domains}
    for (domain, _), each in zip(batches, nats, strict=True):
        parts[domain.name].append(each)
    return {domain.name: domain.sums(np.concatenate(parts[domain.name])) for domain in domains}


def mean_loss(sums: Sums) -> float:
    """Nats per token (or item of a task) on all domains together, every one alike."""
    nats, weight = np.sum([each[:2].sum(1) for each in sums.values()], axis=0)
    return float(nats / weight)


def best_of(donors: Mapping[str, Sums]) -> str:
    """The name of the donor with the least loss."""
    return min(donors, key=lambda name: mean_loss(donors[name]))


def captured_share(gain: Gain, ensemble: Gain) -> float | None:
    """The share of the ensemble's gain; None where the ensemble gains nothing."""
    return gain.nats / ensemble.nats if ensemble.nats > 0 else None


def answers(sums: Sums, domains: Sequence[Domain]) -> list[ItemResults]:
    """Which items of the domains that are tasks a model answers correctly."""
    return [
        ItemResults(
            domain.name,
            "acc",
            {str(item): bool(right) for item, right in enumerate(sums[domain.name][2])},
        )
        for domain in domains
        if domain.right is not None
    ]


def counted(sums: Sums) -> int:
    """The number of tokens, or items, on all domains together."""
    return round(sum(float(each[1].sum()) for each in sums.values()))


def joined(parts: Sequence[Sums]) -> Sums:
    """The sums on several disjoint pieces of the same domains."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def gain_of(sums: Sums, donors: Mapping[str, Sums], *, seed: int, coverage: float = 0.95) -> Gain:
    """A model's gain against the best of the donors, measured on the same units.

    Args:
        sums: of the model.
        donors: theirs, by name.
        seed: of the resamples; the same seed draws the same for every model.
        coverage: of the interval. For the best of `k` candidates, `1 - 0.05 / k` bounds the chance
            that any of the `k` intervals fails by 5 % (Bonferroni).
    """
    best = min(mean_loss(each) for each in donors.values())
    counts = {
        name: resample_counts(each.shape[1], RESAMPLES, [seed, place])
        for place, (name, each) in enumerate(sums.items())
    }
    drawn = np.min([_resampled(each, counts) for each in donors.values()], axis=0)
    units = sum(each.shape[1] for each in counts.values())
    gains = drawn - _resampled(sums, counts)
    interval = expanded_interval(gains, units, len(counts), coverage)
    alone = {
        name: min(mean_loss({name: each[name]}) for each in donors.values())
        - mean_loss({name: sums[name]})
        for name in sums
    }
    return Gain(best - mean_loss(sums), interval, alone)


def _resampled(sums: Sums, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean loss of every resample, `[r]`."""
    nats, weight = np.sum([counts[name] @ each[:2].T for name, each in sums.items()], axis=0).T
    return nats / weight
