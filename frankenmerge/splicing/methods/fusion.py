"""Methods that decide element by element: nearswap, arcee_fusion, sce, ram, ramplus_tl."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from frankenmerge.splicing.methods.inputs import ChunkRule, Inputs, precise_sum
from frankenmerge.splicing.methods.select import boundaries, kth_largest
from frankenmerge.splicing.methods.torch_select import before, magnitudes, order_of
from frankenmerge.splicing.methods.torch_sparse import agreed, total_of


def nearswap(inputs: Inputs) -> ChunkRule:
    """`(1 - w) b + w x`, `w = min(1, t / |x - b|)`: the model where it is near the base.

    That is `b` plus the difference clamped to `[-t, t]` (alchemonaut, QuartetAnemoi-70B-t0.0001).
    """
    t = float(inputs.parameters["t"])

    def chunk(start: int, stop: int) -> Tensor:
        base, (delta,) = inputs.deltas(start, stop)
        return delta.clamp_(-t, t).add_(base)

    return ChunkRule(chunk)


def arcee_fusion(inputs: Inputs) -> ChunkRule:
    """The model's element where its importance is high in the tensor, else the base's.

    Importance is `|x - b| KL(softmax(row of x) || softmax(row of b))`; it is high from `median +
    1.5 (Q3 - Q1)` on (Arcee, MergeKit 0.1 release notes). Quartiles are elements, the lower of two.
    If all importances are equal, for example because there is no difference, every element is the
    model's. KL is float64: weights are small, so it is a small difference of large terms.
    """
    last = inputs.size - 1

    def importance(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        assert inputs.base
        x, base = inputs.models[0].read(start, stop), inputs.base.read(start, stop)
        wide_x, wide_base = (tensor.view(-1, inputs.width).double() for tensor in (x, base))
        surprise = (
            wide_x.softmax(1).mul_(wide_x - wide_base).sum(1)
            - wide_x.logsumexp(1)
            + wide_base.logsumexp(1)
        )
        score = (
            (x - base).abs_().view(-1, inputs.width).mul_(surprise.clamp_(min=0).float()[:, None])
        )
        return score.view(-1), x, base

    def keys(start: int, stop: int) -> Tensor:
        return magnitudes(importance(start, stop)[0])

    quartiles = [last - last * quarter // 4 for quarter in (1, 2, 3)]
    keyed = kth_largest(order_of(keys, lambda: inputs.spans(rows=True)), quartiles)
    low, median, high = (
        torch.tensor([key for key, _ in keyed], dtype=torch.int32).view(torch.float32).tolist()
    )
    threshold = median + 1.5 * (high - low)

    def chunk(start: int, stop: int) -> Tensor:
        score, x, base = importance(start, stop)
        return torch.where(score >= threshold, x, base)

    return ChunkRule(chunk, rows=True)


def sce(inputs: Inputs) -> ChunkRule:
    """SCE (arXiv 2408.07990, section 3.3): select, calculate, erase.

    Select: of the elements that vary between task vectors, the share `select_topk` with the largest
    variance is kept (of equal variances, those with the lower index). Calculate: a model's weight
    is the mean square of its kept elements, divided by the sum over all models. Erase: TIES's
    consensus with the sign of the unweighted sum, and division by the weights that agree, as in
    mergekit.
    """
    select = _selected(inputs)
    squares = [0.0] * len(inputs.models)
    for start, stop in inputs.spans():
        _, deltas = inputs.deltas(start, stop)
        for model, delta in enumerate(select(deltas, start)):
            # in float64 the square of a float32 number is finite
            squares[model] += precise_sum(delta.double().square_())
    whole = sum(squares) or 1.0
    weights = [square / whole for square in squares]

    def chunk(start: int, stop: int) -> Tensor:
        base, deltas = inputs.deltas(start, stop)
        deltas = select(deltas, start)
        elected = total_of(deltas)
        return agreed(
            [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)],
            elected,
            weights,
            0.0,
        ).add_(base)

    return ChunkRule(chunk)


def _selected(inputs: Inputs) -> Callable[[list[Tensor], int], list[Tensor]]:
    share = float(inputs.parameters["select_topk"])
    if share == 1:
        return lambda deltas, _: deltas

    def spread(deltas: list[Tensor]) -> Tensor:
        # sum_(i<j) (d_i - d_j)^2 is n^2 times the variance, and exactly 0 where all are equal
        return magnitudes(
            total_of(
                [(one - other).square_() for one, other in combinations(deltas, 2)]
                or [torch.zeros_like(deltas[0])]
            )
        )

    def keys(start: int, stop: int) -> Tensor:
        return spread(inputs.deltas(start, stop)[1])

    varied = sum(int(keys(start, stop).count_nonzero()) for start, stop in inputs.spans())
    (end,) = boundaries(order_of(keys, inputs.spans), inputs.size, [int(share * varied)])

    def select(deltas: list[Tensor], start: int) -> list[Tensor]:
        mask = before(spread(deltas), start, end)
        for delta in deltas:
            delta.view(torch.int32).bitwise_and_(mask)
        return deltas

    return select


def ram(inputs: Inputs) -> ChunkRule:
    """Reinforced Agent Merging (arXiv 2601.13572): average over the models that changed an element.

    A model has changed an element where `|x - b| > epsilon`, so a change by one model alone is
    added whole.
    """
    return _ram(inputs, [1.0] * len(inputs.models))


def ramplus_tl(inputs: Inputs) -> ChunkRule:
    """RAM+ (arXiv 2601.13572): as `ram`, with unique changes multiplied by `1 + r min(rho, alpha)`.

    `rho` is the number of a model's changes that other models share, divided by the number of those
    that are unique to it. As the name (tensor-local) says, both are counted in the tensor, as in
    mergekit, and not in the whole model.
    """
    shared, own = [0.0] * len(inputs.models), [0.0] * len(inputs.models)
    for start, stop in inputs.spans():
        _, deltas = inputs.deltas(start, stop)
        changed = _changed(inputs, deltas)
        alone = total_of(changed).eq_(1.0)
        for model, change in enumerate(changed):
            mine = precise_sum(change * alone)
            own[model] += mine
            shared[model] += precise_sum(change) - mine
    r, alpha, epsilon = (float(inputs.parameters[name]) for name in ("r", "alpha", "epsilon"))
    ratios = [many / (few or epsilon or 1.0) for many, few in zip(shared, own, strict=True)]
    return _ram(inputs, [1 + r * min(ratio, alpha) for ratio in ratios])


def _changed(inputs: Inputs, deltas: list[Tensor]) -> list[Tensor]:
    """Return, for each model, 1 where it changed the base, else 0."""
    return [delta.abs().gt_(float(inputs.parameters["epsilon"])) for delta in deltas]


def _ram(inputs: Inputs, scales: list[float]) -> ChunkRule:
    def chunk(start: int, stop: int) -> Tensor:
        base, deltas = inputs.deltas(start, stop)
        changed = _changed(inputs, deltas)
        count = total_of(changed)
        alone = count.eq(1.0).float()
        changes = [delta.mul_(change) for delta, change in zip(deltas, changed, strict=True)]
        result = total_of(changes).div_(count.clamp_(min=1.0))
        for change, scale in zip(changes, scales, strict=True):
            if scale != 1:
                result.add_(change.mul_(alone).mul_(scale - 1))
        return result.add_(base)

    return ChunkRule(chunk)
