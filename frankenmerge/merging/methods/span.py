"""Methods whose result is a linear combination of the models: only its coefficients need the whole tensors.

All coefficients follow from the Gram matrix `G_ij = <v_i, v_j>` of the models, or of their task vectors where there is a base: angles
and lengths are inner products, and a mean on the sphere lies in the span of its points, so that its iterations run on the
coefficients alone. A Gram matrix costs one pass: per element and pair a multiplication and an addition, reading every input once.
The result costs another: per element and model a multiplication and an addition. Where every row has its own coefficients, a chunk
holds whole rows and the second pass alone does.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frankenmerge.errors import fail
from frankenmerge.merging.methods.inputs import Inputs, Plan, precise_sum

Array = np.ndarray[Any, np.dtype[np.float64]]
Coefficients = Callable[[Array], Array]
"""Gram matrices `[k, n, n]`, one for every row or column or one for the tensor, to coefficients `[k, n]`."""


def passthrough(inputs: Inputs) -> Plan:
    """`scale * x`."""
    return _combination(inputs, np.array([inputs.each("scale")]))


def linear(inputs: Inputs) -> Plan:
    """`sum_i w_i x_i`, over `sum_i w_i` with `normalize`: model soups (arXiv 2203.05482)."""
    weights = np.array([inputs.each("weight")])
    return _combination(inputs, weights / weights.sum() if inputs.parameters["normalize"] else weights)


def task_arithmetic(inputs: Inputs) -> Plan:
    """`b + lambda sum_i w_i (x_i - b)` (arXiv 2212.04089, section 2), over `sum_i w_i` with `normalize`.

    As in mergekit `density` and `rescale` are accepted and do nothing.
    """
    weights = np.array([inputs.each("weight")])
    if inputs.parameters["normalize"]:
        weights = weights / weights.sum()
    return _combination(inputs, weights * float(inputs.parameters["lambda"]))


def slerp(inputs: Inputs) -> Plan:
    """Spherical interpolation from the base (t = 0) to the other model (Shoemake 1985, "Animating rotation", section 3.3).

    `sin((1-t) a) / sin(a) b + sin(t a) / sin(a) x`, `a` the angle between the two tensors, which keep their lengths. As in
    mergekit it is linear where `|cos a| > 0.9995`, and a zero tensor counts as orthogonal to the other.
    """
    assert inputs.base
    both = inputs._replace(parts=[inputs.base, *inputs.parts], base=None)
    t = float(inputs.parameters["t"])
    return _combination(both, _arc(_gram(both), t, straight=math.sqrt(1 - 0.9995**2)))


def nuslerp(inputs: Inputs) -> Plan:
    """Spherical interpolation of two models, or of their task vectors where there is a base; t = `w_2 / (w_1 + w_2)`.

    There is no paper. `nuslerp_flatten: false` does it for every row (vectors along the last dimension) by itself, and with
    `nuslerp_row_wise: true` for every column: mergekit's guide has the two the other way round, this is what it does. A tensor
    of more than two dimensions is seen as a matrix of rows (mergekit's columns then run along the first dimension alone).
    """
    first, second = inputs.each("weight")
    wise = "tensor" if inputs.parameters["nuslerp_flatten"] else "column" if inputs.parameters["nuslerp_row_wise"] else "row"
    return _wise(inputs, wise, lambda gram: _arc(gram, second / (first + second), straight=1e-3))


def multislerp(inputs: Inputs) -> Plan:
    """The weighted mean of the directions, brought to the weighted mean of the lengths; with a base, of task vectors.

    There is no paper. mergekit describes it as a mean in the sphere's tangent space at `m`, the normalised weighted mean of the unit
    vectors `u_i`, mapped back. Projected there, `sum_i w_i (u_i - <u_i, m> m) = 0`, so the point is `m` itself. Directions that
    cancel give 0.
    """
    weights, eps = np.array(inputs.each("weight")), float(inputs.parameters["eps"])
    if inputs.parameters["normalize_weights"]:
        weights = weights / weights.sum()
    gram = _gram(inputs)[0]
    lengths = np.sqrt(gram.diagonal())
    mean = np.divide(weights, lengths + eps, out=np.zeros_like(weights), where=lengths > 0)
    length = math.sqrt(max(mean @ gram @ mean, 0.0))
    return _combination(inputs, (mean * (weights @ lengths) / length if length > eps else 0 * mean)[None])


def karcher(inputs: Inputs) -> Plan:
    """The Karcher mean of the directions, brought to the mean of the lengths (arXiv 2603.04972).

    The point `p` of the sphere with the least sum of squared angles to the unit vectors, by `p <- exp_p(mean_i log_p(u_i))` until a
    step is shorter than `tol` or after `max_iter` steps, from the normalised mean. As in mergekit all models weigh the same; a
    zero tensor has no direction, and its length counts.
    """
    gram = _gram(inputs)[0]
    lengths = np.sqrt(gram.diagonal())
    shown = lengths > 0
    unit = np.diag(np.divide(1.0, lengths, out=np.zeros_like(lengths), where=shown))  # rows: the unit vectors' coefficients
    point = unit[shown].mean(axis=0) if shown.any() else unit[0]
    if point @ gram @ point < 1e-12 and shown.any():  # they cancel: begin at the first
        point = unit[shown][0]
    point = _normalised(point, gram)
    for _ in range(int(inputs.parameters["max_iter"])):
        step = np.zeros_like(point)
        for direction in unit[shown]:
            cosine = float(np.clip(direction @ gram @ point, -1, 1))
            sine = math.sqrt(1 - cosine**2)
            if sine > (0 if cosine > 0 else 1e-3):  # to the opposite point no way is the shortest
                step += math.acos(cosine) / sine * (direction - cosine * point) / shown.sum()
        length = math.sqrt(max(step @ gram @ step, 0.0))
        if length < float(inputs.parameters["tol"]) or not length:
            break
        point = _normalised(math.cos(length) * point + math.sin(length) / length * step, gram)
    return _combination(inputs, (point * lengths.mean())[None])


def _normalised(point: Array, gram: Array) -> Array:
    length = math.sqrt(max(point @ gram @ point, 0.0))
    return point / length if length else point


def model_stock(inputs: Inputs) -> Plan:
    """`t mean_i x_i + (1 - t) b`, `t = n c / (1 + (n - 1) c)`, c the cosine between task vectors (arXiv 2403.19522, eq. 4 and 5).

    As in mergekit c is the mean over all pairs, once for a tensor, or for every row with `filter_wise`; a zero task vector
    counts as orthogonal. Task vectors whose sum is 0 (`1 + (n - 1) c = 0`) give the base.
    """
    count = len(inputs.parts)

    def coefficients(gram: Array) -> Array:
        cosines = _cosines(gram)
        c = (cosines.sum(axis=(1, 2)) - cosines.diagonal(axis1=1, axis2=2).sum(axis=1)) / (count * (count - 1))
        below = 1 + (count - 1) * c
        t = np.divide(count * c, below, out=np.zeros_like(c), where=below > 1e-6)
        return np.repeat(t[:, None] / count, count, axis=1)

    return _wise(inputs, "row" if inputs.parameters["filter_wise"] else "tensor", coefficients)


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


def _wise(inputs: Inputs, wise: str, coefficients: Coefficients) -> Plan:
    """Coefficients for the tensor, every `row` or every `column`; one-dimensional tensors have but one row."""
    if wise == "tensor" or len(inputs.shape) < 2:
        return _combination(inputs, coefficients(_gram(inputs)))
    if wise == "column":
        return _combination(inputs, coefficients(_gram(inputs, columns=True)), rows=True)

    def chunk(start: int, stop: int) -> Tensor:
        base, vectors = _vectors(inputs, start, stop)
        vectors = [vector.view(-1, inputs.width) for vector in vectors]
        found = coefficients(_finite(_products(vectors, dim=1), inputs.name))
        return _sum(base, vectors, found.T[:, :, None])

    return Plan(chunk, rows=True)


def _combination(inputs: Inputs, coefficients: Array, *, rows: bool = False) -> Plan:
    """The plan that takes `sum_i c_i v_i`, plus the base; `coefficients` are `[1, n]`, or `[width, n]` with `rows`."""

    def chunk(start: int, stop: int) -> Tensor:
        base, vectors = _vectors(inputs, start, stop)
        if rows:
            vectors = [vector.view(-1, inputs.width) for vector in vectors]
        return _sum(base, vectors, coefficients.T)

    return Plan(chunk, rows)


def _vectors(inputs: Inputs, start: int, stop: int) -> tuple[Tensor | None, list[Tensor]]:
    if inputs.base:
        return inputs.deltas(start, stop)
    return None, [part.read(start, stop) for part in inputs.parts]


def _sum(base: Tensor | None, vectors: list[Tensor], coefficients: Array) -> Tensor:
    """`base + sum_i c_i v_i`, flat; each c_i broadcasts against its vector. Overwrites the vectors."""
    scaled = [
        vector.mul_(torch.as_tensor(c, dtype=torch.float32, device=vector.device)) for vector, c in zip(vectors, coefficients, strict=True)
    ]
    total = scaled[0]
    for vector in scaled[1:]:
        total.add_(vector)
    total = total.view(-1)
    return total if base is None else total.add_(base)


def _gram(inputs: Inputs, *, columns: bool = False) -> Array:
    """`[1, n, n]`, or `[width, n, n]` for the columns."""
    count = len(inputs.parts)
    total = np.zeros((inputs.width if columns else 1, count, count))
    for start, stop in inputs.spans(rows=columns):
        _, vectors = _vectors(inputs, start, stop)
        total += _products([vector.view(-1, inputs.width) for vector in vectors], dim=0) if columns else _products(vectors, dim=None)
    return _finite(total, inputs.name)


def _products(vectors: list[Tensor], dim: int | None) -> Array:
    """Inner products `[k, n, n]` of matrices along `dim`, or of flat vectors (k = 1).

    Products are float32, sums float64: a product's rounding, 6e-8 of it either way, averages out over the elements; a sum's would not.
    """
    count, scratch = len(vectors), torch.empty_like(vectors[0])
    result = np.empty((1 if dim is None else scratch.shape[1 - dim], count, count))
    for i in range(count):
        for j in range(i + 1):
            torch.mul(vectors[i], vectors[j], out=scratch)
            found = precise_sum(scratch) if dim is None else scratch.sum(dim, dtype=torch.float64).cpu().numpy()
            result[:, i, j] = result[:, j, i] = found
    return result


def _finite(gram: Array, name: str) -> Array:
    if not np.isfinite(gram).all():
        found = "NaN, infinity, or values too large to be squared"
        raise fail(name, "finite values, since lengths and angles are needed", found, "check the donors, or choose another method")
    return gram
