"""The damage that a recipe is predicted to do, from its donors' states on the probes alone.

The recipe is run in superposition: every block adds to the residual stream what it added in its own
donor. A block is out of place where the stream differs from its input in its own donor. All of this
follows from inner products of the donors' states (`Alignment.gram`): no weights, no text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from frankenmerge.artefacts.recipe import Block

FEATURES = ("final", "kept", "skipped")
"""The predictors of damage, see `features`."""
FLOOR = 0.02
"""Nats per token below which differences are noise."""
MOST = 10.0
"""Nats per token that predictions approach: a model that knows nothing loses no more than the
logarithm of its vocabulary.
"""
SAMPLED_FLOOR = 0.05
"""Nats per token below which damage on sampled tokens is noise: the difference between two donors
on sampled tokens deviates from that on a text by as much.
"""
RIDGE = 0.1
"""Ridge penalty on the weights of features of unit size, towards zero or the weights before."""


class States(NamedTuple):
    """The states of all donors in one list: donor `d` after `i` blocks is state `first[d] + i`."""

    first: dict[str, int]
    blocks: dict[str, int]
    gram: np.ndarray
    """`[n, n]` float64: their inner products, averaged over the probes."""

    @property
    def influence(self) -> np.ndarray:
        """Cumulative sum over each donor's blocks of `1 - cos` of consecutive states, `[n]`."""
        norms = np.sqrt(self.gram.diagonal())
        change = np.append(0, 1 - self.gram.diagonal(1) / np.maximum(norms[1:] * norms[:-1], 1e-12))
        influence = np.zeros(len(norms))
        for name, start in self.first.items():
            stop = start + self.blocks[name]
            influence[start + 1 : stop + 1] = change[start + 1 : stop + 1].cumsum()
        return influence


class Drift(NamedTuple):
    """How far the stream of a stack of blocks is from the donors' own, as `1 - cos`; each `[r]`."""

    roots: np.ndarray
    """Sum over the blocks of the square root of `1 - cos` at their inputs."""
    final: np.ndarray
    """`1 - cos` after the last block, with the mean of the donors' last states, weighted by their
    shares of the blocks.
    """


def drift(
    gram: np.ndarray, entered: np.ndarray, blocks: np.ndarray, ends: np.ndarray, *, lossy: bool
) -> Drift:
    """Run `r` stacks of blocks in superposition.

    Args:
        gram: `[n, n]`, inner products of states.
        entered: `[r]`, the state that enters each stack.
        blocks: `[r, t]`, the state that is each block's input in its own donor (its output there is
            the next one); -1 after the last block.
        ends: `[r, n]`, weights of the states that the stream is compared with after the last block.
        lossy: whether a block with another input adds only the share `cos` of what it added in its
            own donor, and noise of the norm that is lost; otherwise it always adds the same.
    """
    rows, norms = np.arange(len(entered)), gram.diagonal()
    # Inner products of the stream with every state, and with itself.
    inner, square = gram[entered].copy(), norms[entered].copy()
    noise, roots = np.zeros(len(rows)), np.zeros(len(rows))
    for inputs in blocks.T:
        here = inputs >= 0
        place = np.where(here, inputs, 0)
        match = np.clip(
            inner[rows, place] / np.sqrt(np.maximum(norms[place] * (square + noise), 1e-24)), -1, 1
        )
        roots += np.sqrt(1 - match) * here
        kept = (np.maximum(match, 0) if lossy else np.ones_like(match)) * here
        own = norms[place + 1] + norms[place] - 2 * gram[place, place + 1]
        square += 2 * kept * (inner[rows, place + 1] - inner[rows, place]) + kept**2 * own
        inner += kept[:, None] * (gram[place + 1] - gram[place])
        if lossy:
            noise += (1 - kept**2) * own * here
    length = ((ends @ gram) * ends).sum(axis=1)
    match = (inner * ends).sum(axis=1) / np.sqrt(np.maximum(length * (square + noise), 1e-24))
    return Drift(roots, np.maximum(0, 1 - match))


def features(stacks: Sequence[Sequence[Block]], states: States) -> np.ndarray:
    """The predictors of damage, `[r, FEATURES]`, for stacks of blocks.

    `final`: root of `1 - cos` with the donors' last states after the last block, in lossy
        superposition. `kept`: mean over the blocks of the root of `1 - cos` at their inputs, in
        plain superposition. `skipped`: summed influence of blocks that are left out, counted from
        the deepest block so far.
    """
    longest = max(len(stack) for stack in stacks)
    inputs = np.full((len(stacks), longest), -1)
    for row, stack in zip(inputs, stacks, strict=True):
        row[: len(stack)] = [states.first[block.model] + block.index for block in stack]
    entered = np.array([states.first[stack[0].model] for stack in stacks])
    depth = np.array([len(stack) for stack in stacks])
    ends = np.array(
        [
            _ends(
                {name: sum(block.model == name for block in stack) for name in states.first}, states
            )
            for stack in stacks
        ]
    )
    skipped = [_skipped(stack, states) for stack in stacks]
    return np.column_stack([_drifts(states.gram, entered, inputs, ends, depth), skipped])


def _ends(taken: Mapping[str, int], states: States) -> np.ndarray:
    """Each donor's share of the blocks, at the index of its last state, `[n]`."""
    ends = np.zeros(len(states.gram))
    for name, count in taken.items():
        ends[states.first[name] + states.blocks[name]] += count / sum(taken.values())
    return ends


def _drifts(
    gram: np.ndarray, entered: np.ndarray, inputs: np.ndarray, ends: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """`final` and `kept` of stacks of `depth` blocks; those not in `inputs` are in place."""
    kept, lost = (drift(gram, entered, inputs, ends, lossy=lossy) for lossy in (False, True))
    return np.column_stack([np.sqrt(lost.final), kept.roots / depth])


def _skipped(stack: Sequence[Block], states: States) -> float:
    """`skipped` of one stack."""
    influence, deepest, skipped = _influence(states), 0.0, 0.0
    for block in stack:
        state = states.first[block.model] + block.index
        skipped += max(0.0, influence[state] - deepest)
        deepest = max(deepest, influence[state + 1])
    return skipped


def _influence(states: States) -> list[float]:
    return _cached_influence(
        states.gram.tobytes(), tuple(states.first.items()), tuple(states.blocks.items())
    )


@cache
def _cached_influence(gram: bytes, first: tuple, blocks: tuple) -> list[float]:
    count = sum(number + 1 for _, number in blocks)
    return States(
        dict(first), dict(blocks), np.frombuffer(gram).reshape(count, count)
    ).influence.tolist()


INTERVAL_COVERAGE = 0.9
"""Of the intervals of a `DamageModel`."""


def _damage_of(logarithm: np.ndarray) -> np.ndarray:
    """Damage in nats per token from what the regression predicts."""
    free = np.maximum(0, np.exp(logarithm) - FLOOR)
    return free / (1 + free / MOST)


def _unbounded(damage: np.ndarray) -> np.ndarray:
    """The exponential of what the regression is to predict for a damage, less `FLOOR`.

    Above nine tenths of `MOST` it is that of nine tenths.
    """
    held = np.clip(damage, 0, 0.9 * MOST)
    return held / (1 - held / MOST)


def log_error(measured: np.ndarray, predicted: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    """By how much the logarithm of predicted damage is too small, `[r]`; damage below 0 is as 0."""
    return np.log(floor + np.maximum(0, measured)) - np.log(floor + np.maximum(0, predicted))


@dataclass(frozen=True)
class DamageModel:
    """A ridge regression of the logarithm of damage on `features`.

    Damage `d` is in nats per token above the donors' own losses; what is predicted is
    `log(FLOOR + d / (1 - d / MOST))`.
    """

    intercept: float
    weights: tuple[float, ...]
    """One for each of `FEATURES`."""
    spread: tuple[float, float]
    """90 % interval of the error of the logarithm, on donors that the model was not fitted to."""
    sampled_spread: tuple[float, float]
    """The same for damage that was measured on tokens sampled from the donors, see `Plan.basis`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Donors, texts, seeds, versions, hashes."""
    domain_share: float = 0.0
    """By how much further intervals of what was measured on sampled tokens reach, to both sides, as
    a share of the donors' disagreement: a text mixes their domains in other proportions.
    """

    def damage(self, values: np.ndarray) -> np.ndarray:
        """Predicted damage `[r]` in nats per token, from features `[r, FEATURES]`."""
        return _damage_of(self.logarithm(values))

    def logarithm(self, values: np.ndarray) -> np.ndarray:
        """What the regression predicts, `[r]`; at least `log(FLOOR)`."""
        return np.maximum(self.intercept + values @ np.array(self.weights), math.log(FLOOR))

    def interval(
        self, damage: float, *, sampled: bool = False, disagreement: float = 0.0
    ) -> tuple[float, float]:
        """90 % interval of the damage on a text.

        Predicted damage is never below 0; measured damage may be, if a splice of fine-tunes is
        better than their mean.

        Args:
            damage: in nats per token, predicted or measured.
            sampled: whether it was measured on tokens sampled from the donors.
            disagreement: what donors lose on each other's tokens, nats per token.
        """
        floor, ends = (SAMPLED_FLOOR, self.sampled_spread) if sampled else (FLOOR, self.spread)
        low, high = (damage + (max(0.0, damage) + floor) * (math.exp(end) - 1) for end in ends)
        further = self.domain_share * disagreement
        return (low - further, high + further) if sampled else (max(0.0, low), high)

    def as_json(self) -> dict[str, Any]:
        """The model as it is stored."""
        weights = dict(zip(FEATURES, self.weights, strict=True))
        spreads = {"spread": list(self.spread), "drawn_spread": list(self.sampled_spread)}
        share = {"domain_share": self.domain_share}
        return {"intercept": self.intercept, "weights": weights, **spreads, **share} | {
            "origin": self.origin
        }


def fitted(values: np.ndarray, damage: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Fit the weights `[FEATURES]` of the ridge regression.

    Its intercept is `log(FLOOR)`: where nothing is out of place, nothing is lost.

    Args:
        values: features `[r, FEATURES]`.
        damage: measured damage `[r]` in nats per token.
        importance: weight of each measurement, `[r]`.
    """
    share, target = importance / importance.sum(), np.log1p(_unbounded(damage) / FLOOR)
    scale = np.sqrt(share @ values**2) + 1e-9
    standard = values / scale
    weighted = (standard * share[:, None]).T
    penalised = weighted @ standard + RIDGE * np.eye(len(scale))
    return np.linalg.solve(penalised, weighted @ target) / scale


def refined(
    model: DamageModel, values: np.ndarray, damage: np.ndarray, origin: dict[str, Any]
) -> DamageModel:
    """Calibrate the model on measured splices by scaling and shifting its logarithm.

    The relative weights of the features stay the same, because a handful of splices does not
    determine the weights. The spread becomes that of leave-one-out predictions.

    Args:
        model: before calibration.
        values: features `[r, FEATURES]` of the splices.
        damage: their measured damage `[r]` in nats per token.
        origin: donors, texts, seeds, versions, hashes.
    """
    predicted, target = model.logarithm(values), np.log(FLOOR + _unbounded(damage))

    def line(chosen: np.ndarray) -> tuple[float, float]:
        x, y = predicted[chosen], target[chosen]
        slope = (((x - x.mean()) * (y - y.mean())).mean() + RIDGE) / (x.var() + RIDGE)
        return max(slope, 0.1), float(y.mean())

    def applied(chosen: np.ndarray, x: np.ndarray) -> np.ndarray:
        slope, middle = line(chosen)
        return middle + slope * (x - predicted[chosen].mean())

    everyone = np.arange(len(target))
    without = np.concatenate(
        [applied(np.delete(everyone, left), predicted[[left]]) for left in everyone]
    )
    errors = log_error(damage, _damage_of(without))
    slope, middle = line(everyone)
    intercept = middle + slope * (model.intercept - predicted.mean())
    low, high = np.quantile(errors, [0.05, 0.95])
    weights = tuple(float(slope * weight) for weight in model.weights)
    spread = float(min(low, 0)), float(max(high, 0))
    return DamageModel(
        float(intercept), weights, spread, model.sampled_spread, origin, model.domain_share
    )


def default_model() -> DamageModel:
    """The model in the package, fitted by `evals/fit_planner.py`."""
    file = files("frankenmerge.planning").joinpath("prediction.json")
    stored = json.loads(file.read_text(encoding="utf-8"))
    weights = tuple(stored["weights"][name] for name in FEATURES)
    spreads = tuple(stored["spread"]), tuple(stored["drawn_spread"])
    share = stored["domain_share"]
    return DamageModel(stored["intercept"], weights, *spreads, stored["origin"], share)


def seam_damage(model: DamageModel, states: States, left: str, entered: str) -> np.ndarray:
    """Predicted damage `[l_left+1, l_entered+1]` of all splices with a single seam.

    Entry `i, j` is for the splice that leaves `left` after `i` blocks and enters `entered` at block
    `j`.
    """
    rows, places = states.blocks[left], states.blocks[entered]
    result, influence = np.zeros((rows + 1, places + 1)), states.influence
    begin = states.first[left] + np.arange(rows + 1)
    for j in range(places):
        inputs = np.tile(states.first[entered] + np.arange(j, places), (rows + 1, 1))
        skipped = np.maximum(0, influence[states.first[entered] + j] - influence[begin])
        ends = np.array(
            [
                _ends({left: i, entered: places - j}, states)
                if left != entered
                else _ends({left: 1}, states)
                for i in range(rows + 1)
            ]
        )
        drifts = _drifts(states.gram, begin, inputs, ends, np.arange(rows + 1) + places - j)
        result[:, j] = model.damage(np.column_stack([drifts, skipped]))
    return result


def new_family(residuals: Sequence[np.ndarray]) -> tuple[float, float]:
    """90 % prediction interval of a residual on a new family, from those `[r]` of several families.

    It is a Student interval, because families differ in their means and there are few of them.
    """
    means = np.array([family.mean() for family in residuals])
    within = np.mean([family.var() for family in residuals])
    count = len(means)
    half = stdtrit(count - 1, 0.95) * np.sqrt(means.var(ddof=1) * (1 + 1 / count) + within)
    return float(means.mean() - half), float(means.mean() + half)


def donor_loss(stack: Sequence[Block], losses: Mapping[str, float]) -> float:
    """The reference of damage: the donors' own losses, weighted by their shares of the blocks."""
    return sum(losses[block.model] for block in stack) / len(stack)
