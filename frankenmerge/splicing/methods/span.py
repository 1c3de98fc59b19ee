"""Methods whose result is a linear combination of the models: only its coefficients need the whole tensors.

All coefficients follow from the Gram matrix `G_ij = <v_i, v_j>` of the models, or of their task
vectors where there is a base: angles and lengths are inner products, and a mean on the sphere lies
in the span of its points, so that its iterations run on the coefficients alone. A Gram matrix costs
one pass: per element and pair a multiplication and an addition, reading every input once. The
result costs another: per element and model a multiplication and an addition. Where every row has
its own coefficients, a chunk holds whole rows and the second pass alone does.

Here are the coefficients, and no tensor. The two passes are in `native_span.py` (C) and in
`torch_span.py`, with the same bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from frankenmerge.errors import fail
from frankenmerge.splicing.methods.inputs import Inputs
from frankenmerge.splicing.methods.sums import Array, folded, gathered

Coefficients = Callable[[Array], Array]
"""Gram matrices `[k, n, n]`, one for every row or column or one for the tensor, to coefficients
`[k, n]`.
"""


class Combination(NamedTuple):
    """`sum_i c_i v_i`, plus the base where there is one; `v_i` are the models, or with a base the task vectors."""

    inputs: Inputs
    coefficients: Array | Coefficients
    """`[n]`, or how they follow from Gram matrices."""
    per: Literal["tensor", "row", "column"] = "tensor"
    """What has coefficients of its own."""


def passthrough(inputs: Inputs) -> Combination:
    """`scale * x`."""
    return Combination(inputs, np.array(inputs.each("scale")))


def linear(inputs: Inputs) -> Combination:
    """`sum_i w_i x_i`, over `sum_i w_i` with `normalize`: model soups (arXiv 2203.05482)."""
    weights = np.array(inputs.each("weight"))
    return Combination(
        inputs, weights / weights.sum() if inputs.parameters["normalize"] else weights
    )


def task_arithmetic(inputs: Inputs) -> Combination:
    """`b + lambda sum_i w_i (x_i - b)` (arXiv 2212.04089, section 2), over `sum_i w_i` with `normalize`.

    As in mergekit `density` and `rescale` are accepted and do nothing.
    """
    weights = np.array(inputs.each("weight"))
    if inputs.parameters["normalize"]:
        weights = weights / weights.sum()
    return Combination(inputs, weights * float(inputs.parameters["lambda"]))


def slerp(inputs: Inputs) -> Combination:
    """Spherical interpolation from the base (t = 0) to the other model (Shoemake 1985, "Animating rotation", section 3.3).

    `sin((1-t) a) / sin(a) b + sin(t a) / sin(a) x`, `a` the angle between the two tensors, which
    keep their lengths. As in mergekit it is linear where `|cos a| > 0.9995`, and a zero tensor
    counts as orthogonal to the other.
    """
    assert inputs.base
    both = inputs._replace(models=[inputs.base, *inputs.models], base=None)
    t = float(inputs.parameters["t"])
    return Combination(both, lambda gram: _arc(gram, t, straight=math.sqrt(1 - 0.9995**2)))


def nuslerp(inputs: Inputs) -> Combination:
    """Spherical interpolation of two models, or of their task vectors where there is a base; t = `w_2 / (w_1 + w_2)`.

    There is no paper. `nuslerp_flatten: false` does it for every row (vectors along the last
    dimension) by itself, and with
    `nuslerp_row_wise: true` for every column: mergekit's guide has the two the other way round,
        this is what it does. A tensor of more than two dimensions is seen as a matrix of rows
        (mergekit's columns then run along the first dimension alone).
    """
    first, second = inputs.each("weight")
    per = (
        "tensor"
        if inputs.parameters["nuslerp_flatten"]
        else "column"
        if inputs.parameters["nuslerp_row_wise"]
        else "row"
    )
    return _combination(
        inputs, lambda gram: _arc(gram, second / (first + second), straight=1e-3), per
    )


def multislerp(inputs: Inputs) -> Combination:
    """The weighted mean of the directions, brought to the weighted mean of the lengths; with a base, of task vectors.

    There is no paper. mergekit describes it as a mean in the sphere's tangent space at `m`, the
    normalised weighted mean of the unit vectors `u_i`, mapped back. Projected there, `sum_i w_i
    (u_i - <u_i, m> m) = 0`, so the point is `m` itself. Directions that cancel give 0.
    """
    weights, eps = np.array(inputs.each("weight")), float(inputs.parameters["eps"])
    if inputs.parameters["normalize_weights"]:
        weights = weights / weights.sum()

    def coefficients(grams: Array) -> Array:
        gram = grams[0]
        lengths = np.sqrt(gram.diagonal())
        mean = np.divide(weights, lengths + eps, out=np.zeros_like(weights), where=lengths > 0)
        length = math.sqrt(max(mean @ gram @ mean, 0.0))
        return (mean * (weights @ lengths) / length if length > eps else 0 * mean)[None]

    return Combination(inputs, coefficients)


def karcher(inputs: Inputs) -> Combination:
    """The Karcher mean of the directions, brought to the mean of the lengths (arXiv 2603.04972).

    The point `p` of the sphere with the least sum of squared angles to the unit vectors, by `p <-
    exp_p(mean_i log_p(u_i))` until a step is shorter than `tol` or after `max_iter` steps, from the
    normalised mean. As in mergekit all models weigh the same; a zero tensor has no direction, and
    its length counts.
    """
    steps, tolerance = int(inputs.parameters["max_iter"]), float(inputs.parameters["tol"])
    return Combination(inputs, lambda gram: _karcher(gram[0], steps, tolerance)[None])


def _karcher(gram: Array, steps: int, tolerance: float) -> Array:
    lengths = np.sqrt(gram.diagonal())
    shown = lengths > 0
    unit = np.diag(
        np.divide(1.0, lengths, out=np.zeros_like(lengths), where=shown)
    )  # rows: the unit vectors' coefficients
    point = unit[shown].mean(axis=0) if shown.any() else unit[0]
    if point @ gram @ point < 1e-12 and shown.any():  # they cancel: begin at the first
        point = unit[shown][0]
    point = _normalised(point, gram)
    for _ in range(steps):
        step = np.zeros_like(point)
        for direction in unit[shown]:
            cosine = float(np.clip(direction @ gram @ point, -1, 1))
            sine = math.sqrt(1 - cosine**2)
            if sine > (0 if cosine > 0 else 1e-3):  # to the opposite point no way is the shortest
                step += math.acos(cosine) / sine * (direction - cosine * point) / shown.sum()
        length = math.sqrt(max(step @ gram @ step, 0.0))
        if length < tolerance or not length:
            break
        point = _normalised(math.cos(length) * point + math.sin(length) / length * step, gram)
    return point * lengths.mean()


def _normalised(point: Array, gram: Array) -> Array:
    length = math.sqrt(max(point @ gram @ point, 0.0))
    return point / length if length else point


def model_stock(inputs: Inputs) -> Combination:
    """`t mean_i x_i + (1 - t) b`, `t = n c / (1 + (n - 1) c)`, c the cosine between task vectors (arXiv 2403.19522, eq. 4 and 5).

    As in mergekit c is the mean over all pairs, once for a tensor, or for every row with
    `filter_wise`; a zero task vector counts as orthogonal. Task vectors whose sum is 0 (`1 + (n -
    1) c = 0`) give the base.
    """
    count = len(inputs.models)

    def coefficients(gram: Array) -> Array:
        cosines = _cosines(gram)
        c = (cosines.sum(axis=(1, 2)) - cosines.diagonal(axis1=1, axis2=2).sum(axis=1)) / (
            count * (count - 1)
        )
        below = 1 + (count - 1) * c
        t = np.divide(count * c, below, out=np.zeros_like(c), where=below > 1e-6)
        return np.repeat(t[:, None] / count, count, axis=1)

    return _combination(
        inputs, coefficients, "row" if inputs.parameters["filter_wise"] else "tensor"
    )


def _cosines(gram: Array) -> Array:
    lengths = np.sqrt(gram.diagonal(axis1=1, axis2=2))
    product = lengths[:, :, None] * lengths[:, None, :]
    return np.clip(np.divide(gram, product, out=np.zeros_like(gram), where=product > 0), -1, 1)


def _arc(gram: Array, t: float, straight: float) -> Array:
    """Slerp's coefficients `[k, 2]`; linear where the sine of the angle is at most `straight`."""
    cosine = _cosines(gram)[:, 0, 1]
    sine, angle = np.sqrt(1 - cosine**2), np.arccos(cosine)
    ends = np.stack([(1 - t) * angle, t * angle], axis=1)
    line = np.broadcast_to([1 - t, t], ends.shape)
    return np.divide(np.sin(ends), sine[:, None], out=line.copy(), where=sine[:, None] > straight)


def _combination(
    inputs: Inputs, coefficients: Coefficients, per: Literal["tensor", "row", "column"]
) -> Combination:
    """One-dimensional tensors have but one row."""
    return Combination(inputs, coefficients, per if len(inputs.shape) > 1 else "tensor")


def solved(combination: Combination, sums: Callable[[bool], Array]) -> Array:
    """The coefficients `[n]` of a whole tensor.

    `sums` gathers its inner products `[pairs, LANES]`, pairs as `pairs` has them, of all elements
    or of the finite ones.
    """
    if not callable(combination.coefficients):
        return combination.coefficients
    inputs = combination.inputs
    return combination.coefficients(
        grams(lambda finite_only: _gram(sums(finite_only), len(inputs.models)), inputs.name)
    )[0]


def pairs(count: int) -> Iterator[tuple[int, int]]:
    """Every two of so many vectors, each with itself too: (0, 0), (1, 0), (1, 1), (2, 0)..."""
    return ((i, j) for i in range(count) for j in range(i + 1))


def _gram(sums: Array, count: int) -> Array:
    gram = np.empty((1, count, count))
    for (i, j), total in zip(pairs(count), folded(sums), strict=True):
        gram[:, i, j] = gram[:, j, i] = total
    return gram


def grams(gather: Callable[[bool], Array], name: str) -> Array:
    """Gram matrices as `gather` sums them, of all elements or where NaN or Inf was let through of the finite ones.

    Raises FrankenmergeError, naming the tensor, where that does not help.
    """
    found = gathered(gather)
    if not np.isfinite(found).all():
        expected = "values that can be squared, since lengths and angles are needed"
        raise fail(
            name, expected, "larger ones, beyond 1e19", "check the donors, or choose another method"
        )
    return found


RULES: dict[str, Callable[[Inputs], Combination]] = {
    "passthrough": passthrough,
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic,
    "model_stock": model_stock,
}
"""The methods of this kind by their names in a recipe."""
