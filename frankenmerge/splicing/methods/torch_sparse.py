"""The passes over task vectors that are thinned, in torch, on any device.

Masks are computed from sign bits by integer arithmetic (a subtraction and an arithmetic shift give
all ones or 0), since comparisons and boolean selection take ten times as long. Per element and
model, the result costs about twenty such operations of 4 bytes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from frankenmerge.splicing.methods.inputs import ChunkRule, Inputs, one_nan
from frankenmerge.splicing.methods.noise import words
from frankenmerge.splicing.methods.select import boundaries
from frankenmerge.splicing.methods.sparse import Chance, Keep, Ranks, RowOdds, Thinned, coefficients
from frankenmerge.splicing.methods.sums import LANES, Array
from frankenmerge.splicing.methods.torch_select import before, magnitudes, order_of
from frankenmerge.splicing.methods.torch_span import add_to_lanes, finite

Thin = Callable[[Tensor, int], Tensor]
"""From elements of a task vector and the index of the first to the same, with dropped ones set to 0
(in place).
"""


def chunk_rule(thinned: Thinned) -> ChunkRule:
    """Return how to compute chunks, after computing the ranks and the scales."""
    inputs = thinned.inputs
    thins = [_thin(inputs, model, keep) for model, keep in enumerate(thinned.keeps)]
    factors = coefficients(
        thinned,
        lambda model, finite_only: _sums(
            inputs, model, thins[model], finite_only, rows=thinned.rows
        ),
    )
    weights, least = inputs.each("weight"), thinned.least

    def chunk(start: int, stop: int) -> Tensor:
        base, deltas = inputs.deltas(start, stop)
        terms = [
            thin(delta, start).mul_(factor)
            for thin, delta, factor in zip(thins, deltas, factors, strict=True)
        ]
        total = (
            agreed(terms, total_of(terms), weights, least) if thinned.consensus else total_of(terms)
        )
        return total.mul_(thinned.factor).add_(base)

    return ChunkRule(chunk, thinned.rows)


def total_of(terms: list[Tensor]) -> Tensor:
    """Return the sum, in order, in a new tensor."""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    return total


def agreed(
    terms: list[Tensor], elected: Tensor, weights: list[float], least: float | None
) -> Tensor:
    """Return the sum of the terms that have the sign of `elected` (plus where it is 0).

    Unless `least` is None, it is divided by the sum of their weights where that exceeds `least`. A
    term that is 0 has no sign and does not count (arXiv 2306.01708, algorithm 1, "disjoint merge").
    Overwrites the terms.
    """
    signs = one_nan(elected.add_(0.0)).view(torch.int32)  # -0.0 becomes 0.0
    for term in terms:
        bits = term.view(torch.int32)
        bits.bitwise_and_(bits.bitwise_xor(signs).bitwise_right_shift_(31).bitwise_not_())
    total = total_of(terms)
    if least is None:
        return total
    mass = total_of(
        [term.ne_(0.0).mul_(weight) for term, weight in zip(terms, weights, strict=True)]
    )
    return total.div_(mass.add_(mass.abs().le_(least)))


def _thin(inputs: Inputs, model: int, keep: Keep) -> Thin:
    if keep is None:
        return lambda delta, _: delta
    if isinstance(keep, Ranks):
        return _by_rank(inputs, model, keep)
    return partial(_at_random, inputs, model, keep)


def _by_rank(inputs: Inputs, model: int, keep: Ranks) -> Thin:
    def keys(start: int, stop: int) -> Tensor:
        return magnitudes(_delta(inputs, model, start, stop))

    first, end = boundaries(order_of(keys, inputs.spans), inputs.size, keep)

    def thin(delta: Tensor, start: int) -> Tensor:
        bits = magnitudes(delta)
        mask = before(bits, start, end)
        if keep.first:
            mask.bitwise_and_(before(bits, start, first).bitwise_not_())
        delta.view(torch.int32).bitwise_and_(mask)
        return delta

    return thin


def _at_random(
    inputs: Inputs, model: int, keep: Chance | RowOdds, delta: Tensor, start: int
) -> Tensor:
    noise = torch.from_numpy(words(inputs.seed, inputs.name, model, start, start + len(delta))).to(
        delta.device
    )
    limit = keep.limit if isinstance(keep, Chance) else _row_limits(inputs, keep, delta)
    delta.view(torch.int32).bitwise_and_(noise.sub_(limit).bitwise_right_shift_(31))
    return delta


def _row_limits(inputs: Inputs, odds: RowOdds, delta: Tensor) -> Tensor:
    rows = magnitudes(delta).view(-1, inputs.width)
    order = rows.argsort(dim=1, stable=True)
    limits = torch.from_numpy(odds.limits).to(delta.device)
    return torch.empty_like(rows).scatter_(1, order, limits.expand_as(rows)).view(-1)


def _delta(inputs: Inputs, model: int, start: int, stop: int) -> Tensor:
    assert inputs.base
    return one_nan(inputs.models[model].read(start, stop).sub_(inputs.base.read(start, stop)))


def _sums(inputs: Inputs, model: int, thin: Thin, finite_only: bool, *, rows: bool) -> Array:
    """Return sums `[2, LANES]` of a task vector's magnitudes and of the kept ones.

    Sums are over all elements or over the finite ones.
    """
    total: Tensor | None = None
    for start, stop in inputs.spans(rows=rows):
        delta = _delta(inputs, model, start, stop)
        if total is None:
            total = torch.zeros(2, LANES, dtype=torch.float64, device=delta.device)
        whole = delta.abs()
        for sums, values in zip(
            total, finite([whole, thin(delta, start).abs_()], finite_only), strict=True
        ):
            add_to_lanes(sums, values)
    assert total is not None
    return total.cpu().numpy()
