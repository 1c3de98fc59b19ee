"""Methods that thin out task vectors before they add them: `b + lambda sum_i w_i keep_i(x_i - b)`.

Three ways to thin out: by rank of magnitude (ties, breadcrumbs), at random (dare), at random with
odds by rank (della); each sets to 0 what is dropped. Then a sum (the `_linear` methods and
breadcrumbs), or TIES's consensus: a sign is elected for every element, and what has the other sign
is left out.

Here is what stays and how it is added, and no tensor. Ranks take two passes of counting over base
and model, and for each boundary a part of one to find where equal magnitudes part; `rescale` takes
one where it is by the sum of magnitudes; the result takes one over all. The passes are in
`native_sparse.py` (C) and in `torch_sparse.py`, with the same bits. della sorts every row, with
`rescale` twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.splicing.methods.inputs import Inputs, Operand
from frankenmerge.splicing.methods.noise import SCALE
from frankenmerge.splicing.methods.sums import Array, folded, gathered


class Ranks(NamedTuple):
    """What stays: the elements that rank from `first` to before `end` by magnitude, 0 being the largest's rank."""

    first: int
    end: int


class Chance(NamedTuple):
    """What stays: an element whose word of noise is below the limit."""

    limit: int


class RowOdds(NamedTuple):
    """What stays: an element whose word of noise is below the limit of its rank in its row."""

    limits: np.ndarray[Any, np.dtype[np.int32]]
    """`[width]`, from the smallest magnitude to the largest; of equal ones the one further on ranks
    higher.
    """


Keep = Ranks | Chance | RowOdds | None
"""What stays of a task vector; None: all."""


class Thinned(NamedTuple):
    """`b + factor sum_i w_i s_i keep_i(x_i - b)`; with consensus of every element what has the sign of that sum."""

    inputs: Inputs
    keeps: Sequence[Keep]
    scales: Sequence[float] | None
    """`s_i`; None: what gives that which is left of a task vector the sum of magnitudes of the
    whole.
    """
    consensus: bool

    @property
    def rows(self) -> bool:
        """Whether it takes whole rows to tell what stays."""
        return any(isinstance(keep, RowOdds) for keep in self.keeps)

    @property
    def least(self) -> float | None:
        """Beyond this what agrees is divided by the sum of its weights; None: it never is.

        Weights of one sign that agree have no sum of 0. Those of both signs may, and float32 leaves
        some rounding of it.
        """
        if not self.consensus or not self.inputs.parameters["normalize"]:
            return None
        weights = self.inputs.each("weight")
        return 1e-6 * sum(map(abs, weights)) if min(weights) < 0 < max(weights) else 0.0

    @property
    def factor(self) -> float:
        """What the sum is multiplied by: lambda, and without consensus, with `normalize`, over the sum of the weights."""
        divisor = (
            sum(self.inputs.each("weight"))
            if self.inputs.parameters["normalize"] and not self.consensus
            else 1.0
        )
        return float(self.inputs.parameters["lambda"]) / divisor


def ties(inputs: Inputs) -> Thinned:
    """TIES-Merging (arXiv 2306.01708, algorithm 1): trim all but the `density` largest, elect signs, average what agrees.

    As in mergekit: ranks are taken within a tensor and not over a whole model; the elected sign is
    that of the sum of *weighted* task vectors, plus where that is 0; with `normalize` what agrees
    is divided by the sum of its weights; with `rescale` what is left of a task vector gets the sum
    of magnitudes of the whole. `int(density * size)` elements stay, at least one unless density is
    0, of equal magnitudes those with the lower index. Unlike mergekit it does not divide by what
    rounding leaves of weights that cancel.
    """
    return _thinned(
        inputs,
        [_ranks(inputs, operand, 0.0, fewest=1) for operand in inputs.models],
        consensus=True,
    )


def breadcrumbs(inputs: Inputs) -> Thinned:
    """Model Breadcrumbs (arXiv 2312.06795, section 3): drop the largest magnitudes, a share of `gamma`, and the smallest.

    As in mergekit: `density` is the share that stays, so the smallest dropped are `1 - density -
    gamma`, and where that is negative fewer of the largest are dropped; ranks are taken within a
    tensor.
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
    """DARE (arXiv 2311.03099, eq. 2 to 4): every element stays with probability `density`, and is divided by it with `rescale`.

    mergekit's guide says the same; what it runs divides by the share of the sum of magnitudes that
    stayed, which tends to `density` as tensors grow. Density 0 drops everything.
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
    """DELLA (arXiv 2406.11617, section 3): an element stays with a probability that rises with its magnitude's rank in its row.

    `density - epsilon` for the smallest to `density + epsilon` for the largest, evenly spaced; then
    sign consensus as in `ties`. As in mergekit, and not in the paper, which divides every element
    by its own probability, `rescale` gives what is left of a task vector the sum of magnitudes of
    the whole. Of equal magnitudes the one further on ranks higher; a row of one element stays with
    probability `density`. Rows run along the last dimension (mergekit's along the second, for more
    than two as well).
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
    """The `density` that comes after the `gamma` largest."""
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
    """Every model's `w_i s_i`.

    `sums` gathers the magnitudes of the task vector of a model, by its number, and of what stays of
    it, `[2, LANES]`: of all elements or of the finite ones. Where nothing is left `s_i` is 1.
    """
    inputs, scales = thinned.inputs, thinned.scales
    if scales is None:
        both = [
            gathered(lambda finite_only, model=model: folded(sums(model, finite_only)))
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
"""The methods of this kind by their names in a recipe."""
