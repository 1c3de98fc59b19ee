"""Thinned task vectors in C, compared with torch bit by bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import needs_extension
from tensors import TYPES, bits, bytes_of, operands_of

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import combine as torch_combine
from frankenmerge.splicing.methods import native, sparse
from frankenmerge.splicing.methods.inputs import inputs_of
from frankenmerge.splicing.methods.native_chunks import CHUNK

pytestmark = needs_extension

METHODS = list(sparse.RULES)
CONSENSUS = ("ties", "breadcrumbs_ties", "dare_ties", "della")


def numbers(rng, name, size, spread=0.02) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(size) * spread).to(TYPES[name])


def arguments_of(method, tensors, own, parameters, shape, *, raw=True):
    """Return models, base and the other arguments; the first tensor is that of the base."""
    base, *parts = operands_of(tensors, [{}, *own], raw=raw)
    return parts, base, {"shape": shape, "parameters": parameters, "name": "t", "seed": 5}


def by_c(method, tensors, own, parameters, shape, dtype, *, allow_nan=False) -> bytes:
    parts, base, whole = arguments_of(method, tensors, own, parameters, shape)
    thinned = sparse.RULES[method](inputs_of(method, parts, base, **whole))
    return b"".join(
        bytes(content) for content, _ in native.rounded(thinned, dtype, allow_nan=allow_nan)
    )


def by_torch(method, tensors, own, parameters, shape, dtype) -> bytes:
    parts, base, whole = arguments_of(method, tensors, own, parameters, shape, raw=False)
    return b"".join(
        bytes_of(chunk.to(TYPES[dtype]))
        for chunk in torch_combine.combine(method, parts, base, **whole)
    )


def parameters_of(method, density, weight, gamma):
    """Return the parameters of a model."""
    parameters = {"density": density, "weight": weight}
    if method.startswith("della"):
        return parameters | {"epsilon": min(density, 1 - density) / 2}
    return parameters | ({"gamma": gamma} if method.startswith("breadcrumbs") else {})


SHARES = st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0])


@settings(deadline=None, max_examples=250)
@given(
    method=st.sampled_from(METHODS),
    types=st.lists(st.sampled_from(sorted(TYPES)), min_size=2, max_size=4),
    dtype=st.sampled_from(sorted(TYPES)),
    shape=st.tuples(st.sampled_from([1, 2, 19, 64]), st.sampled_from([1, 2, 63, 1023, 1024, 1025]))
    | st.sampled_from([(20_011,), ()]),
    spread=st.sampled_from([1e-42, 0.02, 1e4]),
    switches=st.tuples(st.booleans(), st.booleans()),
    coarse=st.booleans(),
    data=st.data(),
)
def test_any_tensors_give_the_bits_of_torch(
    method, types, dtype, shape, spread, switches, coarse, data
):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tensors = [(name, numbers(rng, name, math.prod(shape), spread)) for name in types]
    if coarse:  # many equal magnitudes, and differences of 0
        tensors = [
            (name, (tensor.double() / spread).round().mul(spread).to(tensor.dtype))
            for name, tensor in tensors
        ]
    own = [
        parameters_of(
            method,
            data.draw(SHARES),
            data.draw(st.sampled_from([1.0, -0.6, 0.3])),
            data.draw(SHARES),
        )
        for _ in types[1:]
    ]
    normalize, rescale = switches
    divisible = method in CONSENSUS or abs(sum(one["weight"] for one in own)) > 1e-3
    parameters = {"normalize": normalize and divisible, "rescale": rescale, "lambda": 0.7}
    content = by_c(method, tensors, own, parameters, shape, dtype, allow_nan=True)
    assert same_bytes(content, by_torch(method, tensors, own, parameters, shape, dtype), dtype)


def same_bytes(one: bytes, other: bytes, dtype: str) -> bool:
    first, second = (
        bits(torch.frombuffer(bytearray(content), dtype=TYPES[dtype])) for content in (one, other)
    )
    return torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [(2 * CHUNK + 1001,), (400, 1001), (2, CHUNK + 5)])
def test_tensors_of_several_chunks_give_the_bits_of_torch(method, rescale, shape):
    rng = np.random.default_rng(2)
    tensors = [("BF16", numbers(rng, "BF16", math.prod(shape))) for _ in range(3)]
    own = [
        parameters_of(method, density, weight, 0.01) for density, weight in ((0.3, 0.5), (0.7, 0.9))
    ]
    parameters = {"rescale": rescale}
    assert by_c(method, tensors, own, parameters, shape, "BF16") == by_torch(
        method, tensors, own, parameters, shape, "BF16"
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(
    "values",
    [
        (math.nan,) * 4,
        (math.inf,) * 4,
        (-math.inf,) * 4,
        (0.0, math.inf, -math.inf, math.nan),
        (math.nan, math.nan, 0, -math.nan),
    ],
)
def test_nan_and_inf_give_the_bits_of_torch_and_affect_only_their_own_elements(
    method, rescale, name, values
):
    rng = np.random.default_rng(4)
    size = CHUNK + 3
    tensors = [(name, numbers(rng, name, size)) for _ in range(4)]
    for number, ((_, tensor), value) in enumerate(zip(tensors, values, strict=True)):
        tensor[[number, 5000, CHUNK + 1]] = value
    own = [
        parameters_of(method, density, weight, 0.001)
        for density, weight in ((0.4, 0.5), (0.8, 0.9), (0.6, 0.7))
    ]
    content = by_c(method, tensors, own, {"rescale": rescale}, (size,), name, allow_nan=True)
    assert same_bytes(
        content, by_torch(method, tensors, own, {"rescale": rescale}, (size,), name), name
    )
    nonfinite = (
        (~torch.frombuffer(bytearray(content), dtype=TYPES[name]).isfinite())
        .nonzero()
        .flatten()
        .tolist()
    )
    assert set(nonfinite) <= {0, 1, 2, 3, 5000, CHUNK + 1}


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_every_nan_has_the_same_rank(name):
    """The bits of a converted NaN vary, but all rank equally: the lower indices are kept."""
    tensors = [
        (name, torch.zeros(19).to(TYPES[name])),
        (name, torch.full((19,), math.nan).to(TYPES[name])),
    ]
    own = [{"weight": 1.0, "density": 0.5}]
    content = by_c("ties", tensors, own, {}, (19,), "F32", allow_nan=True)
    assert torch.frombuffer(
        bytearray(content), dtype=torch.float32
    ).isnan().nonzero().flatten().tolist() == list(range(9))
    assert same_bytes(content, by_torch("ties", tensors, own, {}, (19,), "F32"), "F32")


@pytest.mark.parametrize("method", CONSENSUS)
@pytest.mark.parametrize("weights", [(0.3, 0.6, -0.9), (-0.8, 0.7, 0.1), (1e-9,), (1e-9, -1e-9)])
def test_the_divisor_is_never_a_rounding_error_however_small_the_weights(method, weights):
    """The result is at most the sum of the terms that agree over their smallest sum of weights."""
    rng = np.random.default_rng(6)
    tensors = [("F32", numbers(rng, "F32", 5000)) for _ in range(len(weights) + 1)]
    parameters = {"normalize": True, "rescale": False}
    content = by_c(
        method,
        tensors,
        [parameters_of(method, 1.0, weight, 0.0) for weight in weights],
        parameters,
        (5000,),
        "F32",
    )
    assert same_bytes(
        content,
        by_torch(
            method,
            tensors,
            [parameters_of(method, 1.0, w, 0.0) for w in weights],
            parameters,
            (5000,),
            "F32",
        ),
        "F32",
    )
    result, base = torch.frombuffer(bytearray(content), dtype=torch.float32), tensors[0][1]
    assert (result - base).abs().max() < 2
    if len(weights) == 1:
        torch.testing.assert_close(result, tensors[1][1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [0, 1])
def test_nan_in_an_input_is_an_error_that_names_it(method, number):
    tensors = [("BF16", torch.ones(CHUNK + 3).bfloat16()) for _ in range(2)]
    tensors[number][1][CHUNK] = math.nan
    with pytest.raises(FrankenmergeError) as caught:
        by_c(method, tensors, [parameters_of(method, 0.5, 1.0, 0.01)], {}, (CHUNK + 3,), "BF16")
    assert [fault.place for fault in caught.value.faults] == [f"donor {number}"]


def test_a_tensor_of_no_elements_has_no_chunks():
    parts, base, whole = arguments_of(
        "ties", [("F32", torch.empty(0))] * 2, [{"weight": 1.0}], {}, (0,)
    )
    assert not list(
        native.rounded(sparse.ties(inputs_of("ties", parts, base, **whole)), "F32", allow_nan=False)
    )
