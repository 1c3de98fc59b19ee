"""What a whole recipe is predicted to cost, from its donors' states on the probes alone.

The recipe is run in superposition: every block adds to the residual stream what it added at home.
Where the stream differs from what a block was given at home, the block is out of place. All of it
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

FEATURES = ("final", "kept", "third", "skipped")
"""What damage is predicted from, see `features`."""
FLOOR = 0.02
"""Nats below which differences are noise; damage is predicted as the logarithm of itself and this.
"""
SAMPLED_FLOOR = 0.05
"""Nats below which damage on drawn tokens says nothing: how much better one donor is than the
other, there and on a text, differs by as much.
"""
RIDGE = 0.1
"""Pull of the weights of standardised features to zero, or to those that are refined."""


class States(NamedTuple):
    """The donors' states, all in one list: donor `d` after `i` blocks is state `first[d] + i`."""

    first: dict[str, int]
    blocks: dict[str, int]
    gram: np.ndarray
    """`[n, n]` float64: their inner products, averaged over the probes."""

    @property
    def influence(self) -> np.ndarray:
        """`1 - cos` of every state with the one before it, summed up from the donor's first one, `[n]`."""
        norms = np.sqrt(self.gram.diagonal())
        rotated = np.append(
            0, 1 - self.gram.diagonal(1) / np.maximum(norms[1:] * norms[:-1], 1e-12)
        )
        passed = np.zeros(len(norms))
        for name, start in self.first.items():
            stop = start + self.blocks[name]
            passed[start + 1 : stop + 1] = rotated[start + 1 : stop + 1].cumsum()
        return passed


class Drift(NamedTuple):
    """How far a stack of blocks is from home: `1 - cos` of the stream with the donors' own, each `[r]`."""

    roots: np.ndarray
    """Sum over the blocks of its square root."""
    final: np.ndarray
    """BlockComparison the last block, of the mean of the donors' last states, each by its share of the
    blocks.
    """


def drift(
    gram: np.ndarray, entered: np.ndarray, blocks: np.ndarray, ends: np.ndarray, *, lossy: bool
) -> Drift:
    """Run `r` stacks of blocks in superposition.

    Args:
        gram: `[n, n]`, inner products of states.
        entered: `[r]`, the state that enters each stack.
        blocks: `[r, t]`, the state that each block is given at home (its output at home is the next
            one); -1 behind the last.
        ends: `[r, n]`, weights of the states that the stream is compared with behind the last
            block.
        lossy: whether a block that is given something else adds only `cos` of what it added at
            home, and noise of the norm that is lost so; otherwise it adds the same wherever it
            stands.
    """
    rows, norms = np.arange(len(entered)), gram.diagonal()
    inner, square = (
        gram[entered].copy(),
        norms[entered].copy(),
    )  # of the stream with every state, and with itself
    noise, roots = np.zeros(len(rows)), np.zeros(len(rows))
    for given in blocks.T:
        here = given >= 0
        place = np.where(here, given, 0)
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
    """What damage is predicted from, `[r, FEATURES]`, for stacks of blocks.

    `final`: root of `1 - cos` with the donors' last states behind the last block, in lossy
        superposition. `kept`: mean over the blocks of the root of `1 - cos` before them, in plain
        superposition. `third`: blocks that are gone through a third time or more often, over the
        blocks of the deepest donor. `skipped`: influence of blocks that are jumped over, further
        than any before.
    """
    longest = max(len(stack) for stack in stacks)
    given = np.full((len(stacks), longest), -1)
    for row, stack in zip(given, stacks, strict=True):
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
    counted = np.array([_counted(stack, states) for stack in stacks])
    return np.column_stack([_drifts(states.gram, entered, given, ends, depth), counted])


def _ends(taken: Mapping[str, int], states: States) -> np.ndarray:
    """Each donor's share of the blocks, at the place of its last state, `[n]`."""
    ends = np.zeros(len(states.gram))
    for name, count in taken.items():
        ends[states.first[name] + states.blocks[name]] += count / sum(taken.values())
    return ends


def _drifts(
    gram: np.ndarray, entered: np.ndarray, given: np.ndarray, ends: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """`final` and `kept` of stacks of `depth` blocks; those of them that are not `given` are at home."""
    kept, lost = (drift(gram, entered, given, ends, lossy=lossy) for lossy in (False, True))
    return np.column_stack([np.sqrt(lost.final), kept.roots / depth])


def _counted(stack: Sequence[Block], states: States) -> tuple[float, float]:
    """`third` and `skipped` of one stack."""
    times: dict[int, int] = {}
    influence, deepest, skipped = _influence(states), 0.0, 0.0
    for block in stack:
        times[block.index] = times.get(block.index, 0) + 1
        state = states.first[block.model] + block.index
        skipped += max(0.0, influence[state] - deepest)
        deepest = max(deepest, influence[state + 1])
    return sum(max(0, count - 2) for count in times.values()) / max(states.blocks.values()), skipped


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


@dataclass(frozen=True)
class DamageModel:
    """A ridge regression of `log(FLOOR + damage)` on `features`; damage in nats per token above the donors."""

    intercept: float
    weights: tuple[float, ...]
    """One for each of `FEATURES`."""
    spread: tuple[float, float]
    """Between these nine of ten logarithms of measured damage are expected to be off, on donors it
    was not fitted on.
    """
    drawn_spread: tuple[float, float]
    """The same of damage that was measured on tokens which the donors drew, see `Plan.basis`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Donors, texts, seeds, versions, hashes."""

    def damage(self, found: np.ndarray) -> np.ndarray:
        """Predicted nats per token above the donors' own loss, `[r]`, from features `[r, FEATURES]`; 0 where there is no seam."""
        return np.maximum(0, np.exp(self.intercept + found @ np.array(self.weights)) - FLOOR)

    def interval(self, damage: float, *, drawn: bool = False) -> tuple[float, float]:
        """Where nine of ten measured damages are expected around one that was predicted, or measured on drawn tokens.

        What is predicted is never below 0; what is measured may be, where a splice of fine-tunes is
        better than their mean.
        """
        floor, ends = (SAMPLED_FLOOR, self.drawn_spread) if drawn else (FLOOR, self.spread)
        low, high = (damage + (max(0.0, damage) + floor) * (math.exp(end) - 1) for end in ends)
        return low if drawn else max(0.0, low), high

    def as_json(self) -> dict[str, Any]:
        """The model as it is stored."""
        weights = dict(zip(FEATURES, self.weights, strict=True))
        spreads = {"spread": list(self.spread), "drawn_spread": list(self.drawn_spread)}
        return {"intercept": self.intercept, "weights": weights, **spreads, "origin": self.origin}


def fitted(
    found: np.ndarray, damage: np.ndarray, importance: np.ndarray
) -> tuple[float, np.ndarray]:
    """Intercept and weights of the ridge regression, fitted to features `[r, FEATURES]` and measured damage `[r]`."""
    share, target = importance / importance.sum(), np.log(FLOOR + np.maximum(0, damage))
    mean = share @ found
    scale = np.sqrt(share @ (found - mean) ** 2) + 1e-9
    standard = (found - mean) / scale
    lean = (standard * share[:, None]).T
    weights = (
        np.linalg.solve(
            lean @ standard + RIDGE * np.eye(len(mean)), lean @ (target - share @ target)
        )
        / scale
    )
    return float(share @ target - mean @ weights), weights


def refined(
    model: DamageModel, found: np.ndarray, damage: np.ndarray, origin: dict[str, Any]
) -> DamageModel:
    """The model after seeing measured splices of other donors: its logarithm scaled and shifted, no feature weighed anew.

    A handful of splices does not tell four weights apart. The spread becomes that of leaving each
    splice out in turn.
    """
    predicted, target = np.log(FLOOR + model.damage(found)), np.log(FLOOR + np.maximum(0, damage))

    def line(chosen: np.ndarray) -> tuple[float, float]:
        x, y = predicted[chosen], target[chosen]
        slope = (((x - x.mean()) * (y - y.mean())).mean() + RIDGE) / (x.var() + RIDGE)
        return max(slope, 0.1), float(y.mean())

    def applied(chosen: np.ndarray, x: np.ndarray) -> np.ndarray:
        slope, middle = line(chosen)
        return middle + slope * (x - predicted[chosen].mean())

    everyone = np.arange(len(target))
    off = np.array(
        [
            target[left] - applied(np.delete(everyone, left), predicted[[left]])[0]
            for left in everyone
        ]
    )
    slope, middle = line(everyone)
    intercept = middle + slope * (model.intercept - predicted.mean())
    low, high = np.quantile(off, [0.05, 0.95])
    weights, spread = (
        tuple(float(slope * weight) for weight in model.weights),
        (float(min(low, 0)), float(max(high, 0))),
    )
    return DamageModel(float(intercept), weights, spread, model.drawn_spread, origin)


def default_model() -> DamageModel:
    """The model that comes with the package, fitted by `evals/fit_planner.py`."""
    told = json.loads(
        files("frankenmerge.planning").joinpath("prediction.json").read_text(encoding="utf-8")
    )
    weights, spreads = (
        tuple(told["weights"][name] for name in FEATURES),
        (tuple(told["spread"]), tuple(told["drawn_spread"])),
    )
    return DamageModel(told["intercept"], weights, *spreads, told["origin"])


def seam_damage(model: DamageModel, states: States, left: str, entered: str) -> np.ndarray:
    """Predicted damage `[l_left+1, l_entered+1]` of the splice whose one seam leaves `left` after `i` blocks and enters block `j`."""
    rows, places = states.blocks[left], states.blocks[entered]
    result, influence = np.zeros((rows + 1, places + 1)), states.influence
    begin = states.first[left] + np.arange(rows + 1)
    for j in range(places):
        given = np.tile(states.first[entered] + np.arange(j, places), (rows + 1, 1))
        skipped = np.maximum(0, influence[states.first[entered] + j] - influence[begin])
        ends = np.array(
            [
                _ends({left: i, entered: places - j}, states)
                if left != entered
                else _ends({left: 1}, states)
                for i in range(rows + 1)
            ]
        )
        drifts = _drifts(states.gram, begin, given, ends, np.arange(rows + 1) + places - j)
        result[:, j] = model.damage(np.column_stack([drifts, np.zeros(rows + 1), skipped]))
    return result


def new_family(off: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where nine of ten residuals of a family that was not seen are expected, from those `[r]` of each of several families.

    The ends of a Student interval: families differ in their means, and there are few of them.
    """
    means, within = np.array([part.mean() for part in off]), np.mean([part.var() for part in off])
    count = len(means)
    half = stdtrit(count - 1, 0.95) * np.sqrt(means.var(ddof=1) * (1 + 1 / count) + within)
    return float(means.mean() - half), float(means.mean() + half)


def donor_loss(stack: Sequence[Block], losses: Mapping[str, float]) -> float:
    """What damage is measured from: the donors' own losses, each by its share of the blocks."""
    return sum(losses[block.model] for block in stack) / len(stack)
