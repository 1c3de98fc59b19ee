"""Methods whose result is a linear combination of the models.

Only the coefficients depend on whole tensors. All of them follow from the Gram matrix `G_ij = <v_i,
v_j>` of the models, or of their task vectors if there is a base: angles and lengths are inner
products, and a mean on the sphere is in the span of its points, so that its iterations use the
coefficients alone. A Gram matrix costs one pass: per element and pair a multiplication and an
addition, reading every input once. The result costs another: per element and model a multiplication
and an addition. If every row has its own coefficients, a chunk contains whole rows, and the second
pass suffices.

This module computes the coefficients, without tensors. The two passes are in `native_span.py` (C)
and in `torch_span.py`, with the same bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from frankenmerge.errors import fail
from frankenmerge.splicing.methods.inputs import Inputs
from frankenmerge.splicing.methods.sums import Array, finite_sums, folded

Coefficients = Callable[[Array], Array]
"""From Gram matrices `[k, n, n]`, one per row or column or one for the tensor, to coefficients
`[k, n]`.
"""


class Combination(NamedTuple):
    """`sum_i c_i v_i` of models, or `b + sum_i c_i v_i` of task vectors if there is a base."""

    inputs: Inputs
    coefficients: Array | Coefficients
    """`[n]`, or the function of Gram matrices that gives them."""
    per: Literal["tensor", "row", "column"] = "tensor"
    """Whether the tensor, each row or each column has its own coefficients."""


def passthrough(inputs: Inputs) -> Combination:
    """`scale * x`."""
    return Combination(inputs, np.array(inputs.each("scale")))


def linear(inputs: Inputs) -> Combination:
    """`sum_i w_i x_i`, divided by `sum_i w_i` if `normalize`: model soups (arXiv 2203.05482)."""
    weights = np.array(inputs.each("weight"))
    return Combination(
        inputs, weights / weights.sum() if inputs.parameters["normalize"] else weights
    )


def task_arithmetic(inputs: Inputs) -> Combination:
    """`b + lambda sum_i w_i (x_i - b)` (arXiv 2212.04089, section 2).

    With `normalize` the sum is divided by `sum_i w_i`. As in mergekit, `density` and `rescale` are
    accepted and have no effect.
    """
    weights = np.array(inputs.each("weight"))
    if inputs.parameters["normalize"]:
        weights = weights / weights.sum()
    return Combination(inputs, weights * float(inputs.parameters["lambda"]))


def slerp(inputs: Inputs) -> Combination:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1).

    `sin((1-t) a) / sin(a) b + sin(t a) / sin(a) x`, where `a` is the angle between the two tensors,
    which are not normalised (Shoemake 1985, "Animating rotation", section 3.3). As in mergekit, it
    is linear where `|cos a| > 0.9995`, and a zero tensor counts as orthogonal to the other.
    """
    assert inputs.base
    both = inputs._replace(models=[inputs.base, *inputs.models], base=None)
    t = float(inputs.parameters["t"])
    return Combination(both, lambda gram: _arc(gram, t, straight=math.sqrt(1 - 0.9995**2)))


def nuslerp(inputs: Inputs) -> Combination:
    """Spherical interpolation of two models, or of their task vectors if there is a base.

    `t = w_2 / (w_1 + w_2)`. There is no paper. `nuslerp_flatten: false` interpolates every row
    (vector along the last dimension) separately, and with `nuslerp_row_wise: true` every column:
    this is what mergekit's code does, while its guide says the opposite. A tensor with more than
    two dimensions is treated as a matrix of rows (mergekit's columns then run along the first
    dimension only).
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
    """The weighted mean direction, with the weighted mean length.

    With a base it is that of the task vectors. There is no paper. mergekit describes it as a mean
    in the sphere's tangent space at `m`, the normalised weighted mean of the unit vectors `u_i`,
    mapped back to the sphere. Projected there, `sum_i w_i (u_i - <u_i, m> m) = 0`, so the point is
    `m` itself. Directions that cancel give 0.
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
    """The Karcher mean of the directions, with the mean length (arXiv 2603.04972).

    That is the point `p` of the sphere with the least sum of squared angles to the unit vectors. It
    is computed by `p <- exp_p(mean_i log_p(u_i))` from the normalised mean, until a step is shorter
    than `tol` or after `max_iter` steps. As in mergekit, all models have the same weight; a zero
    tensor has no direction, but its length counts.
    """
    steps, tolerance = int(inputs.parameters["max_iter"]), float(inputs.parameters["tol"])
    return Combination(inputs, lambda gram: _karcher(gram[0], steps, tolerance)[None])


def _karcher(gram: Array, steps: int, tolerance: float) -> Array:
    lengths = np.sqrt(gram.diagonal())
    nonzero = lengths > 0
    unit = np.diag(
        np.divide(1.0, lengths, out=np.zeros_like(lengths), where=nonzero)
    )  # rows: the unit vectors' coefficients
    point = unit[nonzero].mean(axis=0) if nonzero.any() else unit[0]
    if point @ gram @ point < 1e-12 and nonzero.any():  # they cancel: start at the first
        point = unit[nonzero][0]
    point = _normalised(point, gram)
    for _ in range(steps):
        step = np.zeros_like(point)
        for direction in unit[nonzero]:
            cosine = float(np.clip(direction @ gram @ point, -1, 1))
            sine = math.sqrt(1 - cosine**2)
            if sine > (0 if cosine > 0 else 1e-3):  # no path to the opposite point is the shortest
                step += math.acos(cosine) / sine * (direction - cosine * point) / nonzero.sum()
        length = math.sqrt(max(step @ gram @ step, 0.0))
        if length < tolerance or not length:
            break
        point = _normalised(math.cos(length) * point + math.sin(length) / length * step, gram)
    return point * lengths.mean()


def _normalised(point: Array, gram: Array) -> Array:
    length = math.sqrt(max(point @ gram @ point, 0.0))
    return point / length if length else point


def model_stock(inputs: Inputs) -> Combination:
    """`t mean_i x_i + (1 - t) b`, `t = n c / (1 + (n - 1) c)` (arXiv 2403.19522, eq. 4 and 5).

    c is the cosine between task vectors. As in mergekit, it is the mean over all pairs, for the
    whole tensor, or with `filter_wise` for every row; a zero task vector counts as orthogonal. Task
    vectors whose sum is 0 (`1 + (n - 1) c = 0`) give the base.
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
    """Return slerp's coefficients `[k, 2]`; linear where the sine of the angle is <= `straight`."""
    cosine = _cosines(gram)[:, 0, 1]
    sine, angle = np.sqrt(1 - cosine**2), np.arccos(cosine)
    ends = np.stack([(1 - t) * angle, t * angle], axis=1)
    line = np.broadcast_to([1 - t, t], ends.shape)
    return np.divide(np.sin(ends), sine[:, None], out=line.copy(), where=sine[:, None] > straight)


def _combination(
    inputs: Inputs, coefficients: Coefficients, per: Literal["tensor", "row", "column"]
) -> Combination:
    """Return the combination; a one-dimensional tensor has only one row."""
    return Combination(inputs, coefficients, per if len(inputs.shape) > 1 else "tensor")


def solved(combination: Combination, sums: Callable[[bool], Array]) -> Array:
    """Return the coefficients `[n]` of a whole tensor.

    `sums` computes inner products `[pairs, LANES]`, in the order of `pairs`, of all elements
    (False) or of the finite ones (True).
    """
    if not callable(combination.coefficients):
        return combination.coefficients
    inputs = combination.inputs
    return combination.coefficients(
        grams(lambda finite_only: _gram(sums(finite_only), len(inputs.models)), inputs.name)
    )[0]


def pairs(count: int) -> Iterator[tuple[int, int]]:
    """Return all pairs of `count` vectors, including (i, i): (0, 0), (1, 0), (1, 1), (2, 0)..."""
    return ((i, j) for i in range(count) for j in range(i + 1))


def _gram(sums: Array, count: int) -> Array:
    gram = np.empty((1, count, count))
    for (i, j), total in zip(pairs(count), folded(sums), strict=True):
        gram[:, i, j] = gram[:, j, i] = total
    return gram


def grams(products: Callable[[bool], Array], name: str) -> Array:
    """Return the Gram matrices of all elements, or of the finite ones if those are not finite.

    Raises FrankenmergeError, which names the tensor, if neither are finite.
    """
    result = finite_sums(products)
    if not np.isfinite(result).all():
        raise fail(
            name,
            "values that can be squared, to compute lengths and angles",
            "values above 1e19",
            "check the donors, or choose another method",
        )
    return result


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
"""The methods of this kind, by their names in a recipe."""
