"""Methods that thin task vectors and then add them: `b + lambda sum_i w_i keep_i(x_i - b)`.

Elements are dropped (set to 0) by rank of magnitude (ties, breadcrumbs), at random (dare), or at
random with a probability that depends on the rank (della). The rest is added (the `_linear` methods
and breadcrumbs), or combined by TIES's consensus: a sign is elected for every element, and elements
with the other sign are dropped.

This module decides what is kept and how it is added, without tensors. Ranks take two counting
passes over base and model, and for each boundary part of a pass to find its index among equal
magnitudes; `rescale` by the sum of magnitudes takes one pass; the result takes one over all models.
The passes are in `native_sparse.py` (C) and in `torch_sparse.py`, with the same bits. della sorts
every row, twice with `rescale`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.splicing.methods.inputs import Inputs, Operand
from frankenmerge.splicing.methods.noise import SCALE
from frankenmerge.splicing.methods.sums import Array, finite_sums, folded


class Ranks(NamedTuple):
    """Keep the elements whose rank by magnitude is in `[first, end)`; rank 0 is the largest."""

    first: int
    end: int


class Chance(NamedTuple):
    """Keep the elements whose random word is below the limit."""

    limit: int


class RowOdds(NamedTuple):
    """Keep the elements whose random word is below the limit of their rank in their row."""

    limits: np.ndarray[Any, np.dtype[np.int32]]
    """`[width]`, from the smallest magnitude to the largest. Of equal magnitudes, the one with the
    higher index ranks higher.
    """


Keep = Ranks | Chance | RowOdds | None
"""What is kept of a task vector; None: all of it."""


class Thinned(NamedTuple):
    """`b + factor sum_i w_i s_i keep_i(x_i - b)`.

    With consensus, only the terms that have the sign of the sum are added.
    """

    inputs: Inputs
    keeps: Sequence[Keep]
    scales: Sequence[float] | None
    """`s_i`; None: the values that give the kept elements of a task vector the sum of magnitudes of
    all its elements.
    """
    consensus: bool

    @property
    def rows(self) -> bool:
        """Whether whole rows are needed to decide what is kept."""
        return any(isinstance(keep, RowOdds) for keep in self.keeps)

    @property
    def least(self) -> float | None:
        """The terms that agree are divided by the sum of their weights if it exceeds this value.

        None: they are never divided. Weights of one sign do not cancel. Weights of both signs may,
        up to the rounding of float32.
        """
        if not self.consensus or not self.inputs.parameters["normalize"]:
            return None
        weights = self.inputs.each("weight")
        return 1e-6 * sum(map(abs, weights)) if min(weights) < 0 < max(weights) else 0.0

    @property
    def factor(self) -> float:
        """The factor of the sum: lambda, divided by the sum of the weights if `normalize`.

        With consensus it is lambda: the divisor then is a sum for each element.
        """
        divisor = (
            sum(self.inputs.each("weight"))
            if self.inputs.parameters["normalize"] and not self.consensus
            else 1.0
        )
        return float(self.inputs.parameters["lambda"]) / divisor


def ties(inputs: Inputs) -> Thinned:
    """TIES-Merging (arXiv 2306.01708, algorithm 1): trim, elect signs, average what agrees.

    Trimming keeps the `int(density * size)` largest magnitudes, at least one unless density is 0,
    and of equal magnitudes those with the lower index. As in mergekit, ranks are taken within a
    tensor, not over a whole model; the elected sign is that of the sum of *weighted* task vectors,
    plus where that is 0; with `normalize`, the terms that agree are divided by the sum of their
    weights; with `rescale`, the kept elements of a task vector are scaled to the sum of magnitudes
    of all its elements. Unlike mergekit, it does not divide by the rounding error of weights that
    cancel.
    """
    return _thinned(
        inputs,
        [_ranks(inputs, operand, 0.0, fewest=1) for operand in inputs.models],
        consensus=True,
    )


def breadcrumbs(inputs: Inputs) -> Thinned:
    """Model Breadcrumbs (arXiv 2312.06795, section 3): drop the largest and smallest magnitudes.

    `gamma` is the share of the largest that is dropped. As in mergekit, `density` is the share that
    is kept, so a share `1 - density - gamma` of the smallest is dropped, and if that is negative,
    fewer of the largest are dropped; ranks are taken within a tensor.
    """
    return _breadcrumbs(inputs, consensus=False)


def breadcrumbs_ties(inputs: Inputs) -> Thinned:
    """`breadcrumbs` with the sign consensus of `ties`."""
    return _breadcrumbs(inputs, consensus=True)


def _breadcrumbs(inputs: Inputs, *, consensus: bool) -> Thinned:
    keeps = [
        _ranks(inputs, operand, float(operand.parameters["gamma"]), fewest=0)
        for operand in inputs.models
    ]
    return _thinned(inputs, keeps, consensus=consensus)


def dare_linear(inputs: Inputs) -> Thinned:
    """DARE (arXiv 2311.03099, eq. 2 to 4): keep every element with probability `density`.

    With `rescale` the kept elements are divided by `density`. mergekit's guide says the same; its
    code divides by the share of the sum of magnitudes that was kept, which tends to `density` as
    tensors grow. Density 0 drops everything.
    """
    return _dare(inputs, consensus=False)


def dare_ties(inputs: Inputs) -> Thinned:
    """`dare_linear` with the sign consensus of `ties`."""
    return _dare(inputs, consensus=True)


def _dare(inputs: Inputs, *, consensus: bool) -> Thinned:
    densities = inputs.each("density")
    keeps = [_chance(density) for density in densities]
    rescaled = [inputs.parameters["rescale"] and isinstance(keep, Chance) for keep in keeps]
    return Thinned(
        inputs,
        keeps,
        [
            1 / density if scaled else 1.0
            for density, scaled in zip(densities, rescaled, strict=True)
        ],
        consensus,
    )


def della(inputs: Inputs) -> Thinned:
    """DELLA (arXiv 2406.11617, section 3): keep elements at random, large ones more often.

    The probability rises evenly with the rank of the magnitude in its row, from `density - epsilon`
    for the smallest to `density + epsilon` for the largest; then sign consensus as in `ties`. As in
    mergekit, `rescale` scales the kept elements of a task vector to the sum of magnitudes of all
    its elements; the paper divides every element by its own probability. Of equal magnitudes, the
    one with the higher index ranks higher; a row of one element is kept with probability `density`.
    Rows run along the last dimension (in mergekit along the second, even if there are more than
    two).
    """
    return _della(inputs, consensus=True)


def della_linear(inputs: Inputs) -> Thinned:
    """`della` without sign consensus."""
    return _della(inputs, consensus=False)


def _della(inputs: Inputs, *, consensus: bool) -> Thinned:
    return _thinned(
        inputs, [_row_odds(inputs, operand) for operand in inputs.models], consensus=consensus
    )


def _thinned(inputs: Inputs, keeps: Sequence[Keep], *, consensus: bool) -> Thinned:
    return Thinned(
        inputs, keeps, None if inputs.parameters["rescale"] else [1.0] * len(keeps), consensus
    )


def _ranks(inputs: Inputs, operand: Operand, gamma: float, fewest: int) -> Keep:
    """Return the ranks of the share `density` that follows the share `gamma` of the largest."""
    density, size = float(operand.parameters["density"]), inputs.size
    count = max(int(density * size), fewest) if density > 0 else 0
    largest = min(int(gamma * size), size - count)
    return None if count == size else Ranks(largest, largest + count)


def _chance(density: float) -> Keep:
    limit = round(density * SCALE)
    return None if limit == SCALE else Chance(limit) if limit else Ranks(0, 0)


def _row_odds(inputs: Inputs, operand: Operand) -> Keep:
    density, epsilon = float(operand.parameters["density"]), float(operand.parameters["epsilon"])
    if inputs.width == 1 or density in (0, 1):
        return _chance(density)
    odds = np.linspace(density - epsilon, density + epsilon, inputs.width)
    return RowOdds((odds * SCALE).round().clip(0, SCALE - 1).astype(np.int32))


def coefficients(thinned: Thinned, sums: Callable[[int, bool], Array]) -> list[float]:
    """Return `w_i s_i` of every model; `s_i` is 1 if nothing is kept.

    `sums(model, finite_only)` computes the sums `[2, LANES]` of the magnitudes of a model's task
    vector and of its kept elements, over all elements or over the finite ones.
    """
    inputs, scales = thinned.inputs, thinned.scales
    if scales is None:
        both = [
            finite_sums(lambda finite_only, model=model: folded(sums(model, finite_only)))
            for model in range(len(inputs.models))
        ]
        scales = [float(whole / kept) if kept else 1.0 for whole, kept in both]
    return [weight * scale for weight, scale in zip(inputs.each("weight"), scales, strict=True)]


RULES: dict[str, Callable[[Inputs], Thinned]] = {
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
}
"""The methods of this kind, by their names in a recipe."""
