"""Tensors, parameters and calls that the tests of the merge methods share."""

import itertools
import math

import numpy as np
import torch

from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.methods.combine import Operand, combine
from frankenmerge.splicing.methods.inputs import BLOCK

SEED, NAME = 11, "layers.0.weight"


def part_of(array, parameters=None, asked=None):
    """Return an operand that overwrites its previous result when it is read again."""
    flat = torch.from_numpy(np.asarray(array, dtype=np.float32).reshape(-1).copy())
    last = []

    def read(start, stop):
        assert 0 <= start < stop <= len(flat)
        for tensor in last:
            tensor.fill_(math.nan)
        last[:] = [flat[start:stop].clone()]
        if asked is not None:
            asked.append(stop - start)
        return last[0]

    return Operand(read, parameters or {})


def merged(method, arrays, base=None, models=None, chunk=BLOCK, seed=SEED, name=NAME, **parameters):
    models = models or [{}] * len(arrays)
    parts = [part_of(array, given) for array, given in zip(arrays, models, strict=True)]
    chunks = combine(
        method,
        parts,
        None if base is None else part_of(base),
        shape=arrays[0].shape,
        parameters=parameters,
        name=name,
        seed=seed,
        chunk=chunk,
    )
    return torch.cat([chunk.clone() for chunk in chunks]).numpy().reshape(arrays[0].shape)


WEIGHTS = ([0.5, 0.3, 0.4], [1.0, -0.6, 0.2])
TASK = [
    {},
    {"normalize": True, "lambda": 0.7},
    {"normalize": False, "rescale": True},
    {"rescale": False, "normalize": True},
]
SHARED = {
    "linear": [{}, {"normalize": False}],
    "slerp": [{"t": 0.0}, {"t": 0.3}, {"t": 1}],
    "nuslerp": [
        {},
        {"nuslerp_flatten": False},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{}, {"normalize_weights": False}],
    "karcher": [{"tol": 1e-9, "max_iter": 50}],
    "model_stock": [{}, {"filter_wise": True}],
    "nearswap": [{"t": 0.0}, {"t": 0.2}, {"t": 10}],
    "sce": [{}, {"select_topk": 0.4}, {"select_topk": 0}],
    "ram": [{}, {"epsilon": 0.3}],
    "ramplus_tl": [{}, {"r": 0.7, "alpha": 3.0, "epsilon": 0.2}],
}
OWN = {
    "scale": [[1.0] * 3, [-0.4] * 3],
    "density": [[0.53, 0.3, 1.0], [0.0, 0.5, 0.999]],
    "gamma": [[0.01, 0.2, 0.3]],
    "epsilon": [[0.15, 0.2, 0.0], [0.1, 0.3, 0.0005]],
    "weight": WEIGHTS,
}


def cases(method):
    """Yield number of models, whether there is a base, and parameters of models and tensor."""
    spec = METHODS[method]
    low, high = spec.models
    names = [name for name, parameter in spec.parameters.items() if parameter.per_model]
    rounds = max([len(OWN[name]) for name in names], default=1)
    own = [
        [{name: OWN[name][r % len(OWN[name])][n] for name in names} for n in range(3)]
        for r in range(rounds)
    ]
    shared = SHARED.get(method, TASK if "lambda" in spec.parameters else [{}])
    for base in {"none": [False], "optional": [False, True], "required": [True]}[spec.base]:
        for count in sorted({low, min(high or 3, 3)}):
            for models, parameters in itertools.product(own, shared):
                yield count, base, models[:count], parameters


SHAPES = [(6, 20), (3, 4, 5), (31,), (5, 1), (1,), ()]


def example(shape, seed=0, count=3):
    """Return a base, and models near it that leave a third of its elements unchanged."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    models = [
        base + 0.8 * generator.normal(size=shape) * (generator.random(shape) < 0.7)
        for _ in range(count)
    ]
    return np.float32(base).astype(np.float64), [
        np.float32(model).astype(np.float64) for model in models
    ]
