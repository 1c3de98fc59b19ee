"""Methods that thin out task vectors before they add them: `b + lambda sum_i w_i keep_i(x_i - b)`.

Three ways to thin out: by rank of magnitude (ties, breadcrumbs), at random (dare), at random with odds by rank (della); each sets
to 0 what is dropped. Then a sum (the `_linear` methods and breadcrumbs), or TIES's consensus: a sign is elected for every element,
and what has the other sign is left out.

Masks are made of sign bits by integer arithmetic (a subtraction and an arithmetic shift give all ones or 0), since comparisons and
selections of booleans take ten times as long. Per element and model the result costs about twenty such operations of 4 bytes. Ranks
add two passes of counting, and a part of one to find where equal magnitudes part; della sorts every row; `rescale` adds a pass where
it is by the sum of magnitudes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from frankenmerge.merging.methods.inputs import Inputs, Part, Plan, precise_sum
from frankenmerge.merging.methods.noise import SCALE, words
from frankenmerge.merging.methods.select import before, boundaries, magnitudes

Keep = Callable[[Tensor, int], Tensor]
"""A task vector's elements and the index of the first, to themselves with 0 for what is dropped (in place)."""

TINY = 1e-8
"""A sum of agreeing weights this small is not divided by; it takes weights of both signs."""


def ties(inputs: Inputs) -> Plan:
    """TIES-Merging (arXiv 2306.01708, algorithm 1): trim all but the `density` largest, elect signs, average what agrees.

    As in mergekit: ranks are taken within a tensor and not over a whole model; the elected sign is that of the sum of *weighted* task
    vectors, plus where that is 0; with `normalize` what agrees is divided by the sum of its weights; with `rescale` what is left of
    a task vector gets the sum of magnitudes of the whole. `int(density * size)` elements stay, at least one unless density
    is 0, of equal magnitudes those with the lower index.
    """
    return _task(inputs, [_ranked(inputs, part, 0.0, fewest=1) for part in inputs.parts], _whole_mass, consensus=True)


def breadcrumbs(inputs: Inputs) -> Plan:
    """Model Breadcrumbs (arXiv 2312.06795, section 3): drop the largest magnitudes, a share of `gamma`, and the smallest.

    As in mergekit: `density` is the share that stays, so the smallest dropped are `1 - density - gamma`, and where that is negative
    fewer of the largest are dropped; ranks are taken within a tensor.
    """
    return _breadcrumbs(inputs, consensus=False)


def breadcrumbs_ties(inputs: Inputs) -> Plan:
    """`breadcrumbs` with the sign consensus of `ties`."""
    return _breadcrumbs(inputs, consensus=True)


def _breadcrumbs(inputs: Inputs, *, consensus: bool) -> Plan:
    keeps = [_ranked(inputs, part, float(part.parameters["gamma"]), fewest=0) for part in inputs.parts]
    return _task(inputs, keeps, _whole_mass, consensus=consensus)


def dare_linear(inputs: Inputs) -> Plan:
    """DARE (arXiv 2311.03099, eq. 2 to 4): every element stays with probability `density`, and is divided by it with `rescale`.

    mergekit's guide says the same; what it runs divides by the share of the sum of magnitudes that stayed, which tends to
    `density` as tensors grow. Density 0 drops everything.
    """
    return _dare(inputs, consensus=False)


def dare_ties(inputs: Inputs) -> Plan:
    """`dare_linear` with the sign consensus of `ties`."""
    return _dare(inputs, consensus=True)


def _dare(inputs: Inputs, *, consensus: bool) -> Plan:
    def whole(_: Inputs, part: Part, __: Keep) -> float:
        return 1 / float(part.parameters["density"] or 1)

    return _task(inputs, [_bernoulli(inputs, model) for model in range(len(inputs.parts))], whole, consensus=consensus)


def della(inputs: Inputs) -> Plan:
    """DELLA (arXiv 2406.11617, section 3): an element stays with a probability that rises with its magnitude's rank in its row.

    `density - epsilon` for the smallest to `density + epsilon` for the largest, evenly spaced; then sign consensus as in `ties`. As in
    mergekit, and not in the paper, which divides every element by its own probability, `rescale` gives what is left of a task
    vector the sum of magnitudes of the whole. Of equal magnitudes the one further on ranks higher; a row of one element stays
    with probability `density`. Rows run along the last dimension (mergekit's along the second, for more than two as well).
    """
    return _della(inputs, consensus=True)


def della_linear(inputs: Inputs) -> Plan:
    """`della` without sign consensus."""
    return _della(inputs, consensus=False)


def _della(inputs: Inputs, *, consensus: bool) -> Plan:
    keeps = [_by_rank(inputs, model) for model in range(len(inputs.parts))]
    return _task(inputs, keeps, partial(_whole_mass, rows=True), consensus=consensus, rows=True)


def _task(inputs: Inputs, keeps: list[Keep], whole: Callable[[Inputs, Part, Keep], float], *, consensus: bool, rows: bool = False) -> Plan:
    weights = inputs.each("weight")
    scales = [1.0] * len(weights)
    if inputs.parameters["rescale"]:
        scales = [whole(inputs, part, keep) for part, keep in zip(inputs.parts, keeps, strict=True)]
    normalize, factor = bool(inputs.parameters["normalize"]), float(inputs.parameters["lambda"])
    if normalize and not consensus:
        factor /= sum(weights)

    def chunk(start: int, stop: int) -> Tensor:
        base, deltas = inputs.deltas(start, stop)
        terms = [keep(delta, start).mul_(weight * scale) for keep, delta, weight, scale in zip(keeps, deltas, weights, scales, strict=True)]
        total = agreed(terms, total_of(terms), weights if normalize else None) if consensus else total_of(terms)
        return total.mul_(factor).add_(base)

    return Plan(chunk, rows)


def total_of(terms: list[Tensor]) -> Tensor:
    """The sum, in order, in a new tensor."""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    return total


def agreed(terms: list[Tensor], elected: Tensor, weights: list[float] | None) -> Tensor:
    """The sum of what has the sign of `elected` (plus where that is 0), over the sum of its weights if there are any.

    Overwrites the terms. A term that is 0 has no sign and does not count (arXiv 2306.01708, algorithm 1, "disjoint merge").
    """
    signs = elected.add_(0.0).view(torch.int32)  # -0.0 becomes 0.0
    for term in terms:
        bits = term.view(torch.int32)
        bits.bitwise_and_(bits.bitwise_xor(signs).bitwise_right_shift_(31).bitwise_not_())
    total = total_of(terms)
    if weights is None:
        return total
    mass = total_of([term.ne_(0.0).mul_(weight) for term, weight in zip(terms, weights, strict=True)])
    return total.div_(mass.add_(mass.abs().lt_(TINY)))


def _ranked(inputs: Inputs, part: Part, gamma: float, fewest: int) -> Keep:
    """Keep the `density` that comes after the `gamma` largest."""
    density, size = float(part.parameters["density"]), inputs.size
    count = max(int(density * size), fewest) if density > 0 else 0
    largest = min(int(gamma * size), size - count)

    def keys(start: int, stop: int) -> Tensor:
        assert inputs.base
        return magnitudes(part.read(start, stop).sub_(inputs.base.read(start, stop)))

    first, end = boundaries(keys, inputs.spans, size, [largest, largest + count])

    def keep(delta: Tensor, start: int) -> Tensor:
        bits = magnitudes(delta)
        mask = before(bits, start, end)
        if largest:
            mask.bitwise_and_(before(bits, start, first).bitwise_not_())
        delta.view(torch.int32).bitwise_and_(mask)
        return delta

    return keep


def _bernoulli(inputs: Inputs, model: int) -> Keep:
    density = float(inputs.parts[model].parameters["density"])

    def keep(delta: Tensor, start: int) -> Tensor:
        if density == 1:
            return delta
        noise = words(inputs.seed, inputs.name, model, start, start + len(delta)).to(delta.device)
        return _drop(delta, noise, round(density * SCALE))

    return keep


def _by_rank(inputs: Inputs, model: int) -> Keep:
    parameters = inputs.parts[model].parameters
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    odds = torch.linspace(density - epsilon, density + epsilon, inputs.width, dtype=torch.float64)
    if inputs.width == 1 or density in (0, 1):
        odds = torch.full_like(odds, density)
    limits = odds.mul_(SCALE).round_().clamp_(0, SCALE - 1).int()

    def keep(delta: Tensor, start: int) -> Tensor:
        if density == 1:
            return delta
        rows = magnitudes(delta).view(-1, inputs.width)
        order = rows.argsort(dim=1, stable=True)
        limit = torch.empty_like(rows).scatter_(1, order, limits.to(delta.device).expand_as(rows))
        return _drop(delta, words(inputs.seed, inputs.name, model, start, start + len(delta)).to(delta.device), limit.view(-1))

    return keep


def _drop(delta: Tensor, noise: Tensor, limit: Tensor | int) -> Tensor:
    """Keep where noise is below the limit."""
    delta.view(torch.int32).bitwise_and_(noise.sub_(limit).bitwise_right_shift_(31))
    return delta


def _whole_mass(inputs: Inputs, part: Part, keep: Keep, *, rows: bool = False) -> float:
    """What the kept part must be multiplied by to have the whole task vector's sum of magnitudes; 1 where nothing is left."""
    whole = kept = 0.0
    for start, stop in inputs.spans(rows=rows):
        assert inputs.base
        delta = part.read(start, stop).sub_(inputs.base.read(start, stop))
        whole += precise_sum(delta.abs())
        kept += precise_sum(keep(delta, start).abs_())
    return whole / kept if kept else 1.0
