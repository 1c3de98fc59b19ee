"""The two passes of a linear combination in torch, on any device.

They compute inner products, and the combination itself.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from frankenmerge.splicing.methods.inputs import ChunkRule, Inputs
from frankenmerge.splicing.methods.span import Coefficients, Combination, grams, pairs, solved
from frankenmerge.splicing.methods.sums import LANES, Array


def chunk_rule(combination: Combination) -> ChunkRule:
    """Return how to compute chunks of the combination.

    Coefficients per row are computed with each chunk, all others here.
    """
    inputs, coefficients = combination.inputs, combination.coefficients
    if callable(coefficients) and combination.per == "row":
        return _by_row(inputs, coefficients)
    if callable(coefficients) and combination.per == "column":
        return _summed(
            inputs, coefficients(grams(partial(_column_grams, inputs), inputs.name)).T, rows=True
        )
    return _summed(inputs, solved(combination, partial(_sums, inputs)))


def _by_row(inputs: Inputs, coefficients: Coefficients) -> ChunkRule:
    def chunk(start: int, stop: int) -> Tensor:
        base, vectors = _vectors(inputs, start, stop)
        vectors = [vector.view(-1, inputs.width) for vector in vectors]
        by_row = coefficients(grams(partial(_products, vectors, 1), inputs.name))
        return _sum(base, vectors, by_row.T[:, :, None])

    return ChunkRule(chunk, rows=True)


def _summed(inputs: Inputs, coefficients: Array, *, rows: bool = False) -> ChunkRule:
    """Return the rule for known coefficients `[n]`, or if `rows` `[n, width]`."""

    def chunk(start: int, stop: int) -> Tensor:
        base, vectors = _vectors(inputs, start, stop)
        if rows:
            vectors = [vector.view(-1, inputs.width) for vector in vectors]
        return _sum(base, vectors, coefficients)

    return ChunkRule(chunk, rows)


def _vectors(inputs: Inputs, start: int, stop: int) -> tuple[Tensor | None, list[Tensor]]:
    if inputs.base:
        return inputs.deltas(start, stop)
    return None, [operand.read(start, stop) for operand in inputs.models]


def _sum(base: Tensor | None, vectors: list[Tensor], coefficients: Array) -> Tensor:
    """Return `base + sum_i c_i v_i`, flat; c_i broadcasts to v_i. Overwrites the vectors."""
    scaled = [
        vector.mul_(torch.as_tensor(c, dtype=torch.float32, device=vector.device))
        for vector, c in zip(vectors, coefficients, strict=True)
    ]
    total = scaled[0]
    for vector in scaled[1:]:
        total.add_(vector)
    total = total.view(-1)
    return total if base is None else total.add_(base)


def finite(vectors: list[Tensor], finite_only: bool) -> list[Tensor]:
    """Return the vectors, with NaN and Inf replaced by 0 if `finite_only`."""
    return [vector.nan_to_num(0.0, 0.0, 0.0) for vector in vectors] if finite_only else vectors


def _sums(inputs: Inputs, finite_only: bool) -> Array:
    """Return inner products `[pairs, LANES]` of all elements or of the finite ones.

    Products are float32, sums float64: the relative rounding errors of products, up to 6e-8,
    average out over the elements; those of sums would not.
    """
    total: Tensor | None = None
    for start, stop in inputs.spans():
        vectors = finite(_vectors(inputs, start, stop)[1], finite_only)
        if total is None:
            total = torch.zeros(
                sum(1 for _ in pairs(len(vectors))),
                LANES,
                dtype=torch.float64,
                device=vectors[0].device,
            )
        for (i, j), sums in zip(pairs(len(vectors)), total, strict=True):
            add_to_lanes(sums, vectors[i] * vectors[j])
    assert total is not None
    return total.cpu().numpy()


def add_to_lanes(sums: Tensor, values: Tensor) -> None:
    """Add element k of flat float32 values to the float64 sum k % LANES."""
    for stretch in values.split(LANES):
        sums[: len(stretch)] += stretch


def _column_grams(inputs: Inputs, finite_only: bool) -> Array:
    """Return Gram matrices `[width, n, n]` of all elements or of the finite ones."""
    count = len(inputs.models)
    total = np.zeros((inputs.width, count, count))
    for start, stop in inputs.spans(rows=True):
        _, vectors = _vectors(inputs, start, stop)
        total += _products([vector.view(-1, inputs.width) for vector in vectors], 0, finite_only)
    return total


def _products(vectors: list[Tensor], dim: int, finite_only: bool) -> Array:
    """Return inner products `[k, n, n]` of matrices along `dim`.

    They are those of all elements or of the finite ones. Products are float32, sums float64.
    """
    vectors = finite(vectors, finite_only)
    count = len(vectors)
    result = np.empty((vectors[0].shape[1 - dim], count, count))
    for i, j in pairs(count):
        result[:, i, j] = result[:, j, i] = (
            (vectors[i] * vectors[j]).sum(dim, dtype=torch.float64).cpu().numpy()
        )
    return result
