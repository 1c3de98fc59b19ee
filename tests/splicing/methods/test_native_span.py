"""Linear combinations in C, compared with torch bit by bit and with float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import combined, needs_extension
from tensors import TYPES, bits, bytes_of, operands_of, same

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import combine as torch_combine
from frankenmerge.splicing.methods import native_span, span
from frankenmerge.splicing.methods.inputs import BLOCK, inputs_of
from frankenmerge.splicing.methods.native_chunks import CHUNK, extension
from frankenmerge.splicing.methods.sums import LANES

pytestmark = needs_extension


ANY = st.sampled_from(sorted(TYPES))


@settings(deadline=None, max_examples=150)
@given(
    types=st.lists(ANY, min_size=2, max_size=5),
    dtype=ANY,
    size=st.sampled_from([0, 1, 2, 7, 63, 1023, 1024, 1025, 2049, 8191, 8193, 20_011]),
    relative=st.booleans(),
    spread=st.sampled_from([1e-42, 1e-7, 0.02, 1.0, 1e4]),
    seed=st.integers(0, 2**32),
)
def test_any_types_and_lengths_give_the_bits_of_torch_and_are_close_to_float64(
    types, dtype, size, relative, spread, seed
):
    rng = np.random.default_rng(seed)
    tensors = [
        (name, torch.from_numpy(rng.standard_normal(size) * spread).to(TYPES[name]))
        for name in types
    ]
    coefficients = [float(c) for c in rng.uniform(-1, 1, len(types) - relative)]
    found, bad, finite = combined(tensors, coefficients, relative, dtype)
    wide = [tensor.float() for _, tensor in tensors]
    base, models = (
        (wide[0], [tensor - wide[0] for tensor in wide[1:]]) if relative else (None, wide)
    )
    total = models[0] * torch.tensor(coefficients[0])
    for c, model in zip(coefficients[1:], models[1:], strict=True):
        total = total + model * torch.tensor(c)
    total = total if base is None else total + base
    assert same(found, total.to(TYPES[dtype]))
    assert bad == next(
        (number for number, tensor in enumerate(wide) if not tensor.isfinite().all()), -1
    )
    assert finite == bool(found.isfinite().all())
    if not finite or bad >= 0:
        return
    exact = [tensor.double() for tensor in wide]
    vectors = [tensor - exact[0] for tensor in exact[1:]] if relative else exact
    oracle = sum(
        (c * v for c, v in zip(coefficients, vectors, strict=True)),
        exact[0] if relative else 0 * exact[0],
    )
    size_of = sum(
        (abs(c) * v.abs() for c, v in zip(coefficients, vectors, strict=True)), 2 * exact[0].abs()
    )
    info = torch.finfo(TYPES[dtype])
    bound = (
        info.eps / 2 * oracle.abs()
        + info.smallest_normal * info.eps
        + 4 * len(types) * (2.0**-24 * size_of + 2.0**-149)
    )
    assert ((found.double() - oracle).abs() <= bound).all()


CASES = [
    *[
        ("passthrough", 1, False, {}),
        ("linear", 3, False, {}),
        ("linear", 2, False, {"normalize": False}),
        ("slerp", 1, True, {"t": 0.3}),
    ],
    *[("nuslerp", 2, based, {}) for based in (False, True)],
    *[("multislerp", 3, based, {}) for based in (False, True)],
    *[
        ("karcher", 3, False, {}),
        ("task_arithmetic", 2, True, {"lambda": 0.7}),
        ("model_stock", 2, True, {}),
        ("model_stock", 3, True, {}),
    ],
]


def both_ways(method, tensors, base, shape, parameters, dtype, allow_nan=False):
    """Return the bytes of the method's result from the extension and from torch."""
    whole = {"shape": shape, "parameters": parameters, "name": "t", "seed": 0}
    per_model = {"passthrough": {"scale": 0.7}} | dict.fromkeys(
        ("slerp", "karcher", "model_stock"), {}
    )
    own = [per_model.get(method, {"weight": 0.3 + 0.2 * number}) for number in range(len(tensors))]
    parts = {raw: operands_of(tensors, own, raw=raw) for raw in (True, False)}
    bases = {raw: operands_of([base], [{}], raw=raw)[0] if base else None for raw in (True, False)}
    combination = span.RULES[method](inputs_of(method, parts[True], bases[True], **whole))
    ours = b"".join(
        bytes(content)
        for content, _ in native_span.rounded(combination, dtype, allow_nan=allow_nan)
    )
    chunks = torch_combine.combine(method, parts[False], bases[False], **whole)
    return ours, b"".join(bytes_of(chunk.to(TYPES[dtype])) for chunk in chunks)


@pytest.mark.parametrize("method, count, based, parameters", CASES)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (8193,), (BLOCK // 512 + 3, 513), (2, BLOCK)])
def test_every_method_gives_the_bits_of_torch(method, count, based, parameters, name, shape):
    generator = torch.Generator().manual_seed(count)
    tensors = [
        (name, (0.02 * torch.randn(shape, generator=generator)).to(TYPES[name]).flatten())
        for _ in range(count + 1)
    ]
    native, expected = both_ways(
        method, tensors[1:], tensors[0] if based else None, shape, parameters, name
    )
    assert native == expected


@pytest.mark.parametrize("method, count, based, parameters", CASES)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_give_the_bits_of_torch_and_affect_only_their_own_elements(
    method, count, based, parameters, name, value
):
    generator = torch.Generator().manual_seed(count)
    size = BLOCK + 3
    tensors = [
        (name, (0.02 * torch.randn(size, generator=generator)).to(TYPES[name]))
        for _ in range(count + 1)
    ]
    for number, (_, tensor) in enumerate(tensors):
        tensor[[number, 5000, BLOCK + 1]] = value
    native, expected = both_ways(
        method,
        tensors[1:],
        tensors[0] if based else None,
        (size,),
        parameters,
        name,
        allow_nan=True,
    )
    assert bits(torch.frombuffer(bytearray(native), dtype=TYPES[name])).equal(
        bits(torch.frombuffer(bytearray(expected), dtype=TYPES[name]))
    )
    nonfinite = (
        (~torch.frombuffer(bytearray(native), dtype=TYPES[name]).isfinite())
        .nonzero()
        .flatten()
        .tolist()
    )
    assert nonfinite == [*range(0 if based else 1, count + 1), 5000, BLOCK + 1]


def test_inner_products_match_float64_and_do_not_depend_on_how_calls_split_the_tensor():
    rng = np.random.default_rng(3)
    vectors = [
        torch.from_numpy(
            rng.standard_normal(3 * extension.LANES + 1001).astype(np.float32)
        ).bfloat16()
        for _ in range(3)
    ]
    exact = np.stack([vector.double().numpy() for vector in vectors])
    exact = exact[1:] - exact[0]
    sums = []
    for cuts in ([0, len(vectors[0])], [0, extension.LANES, 3 * extension.LANES, len(vectors[0])]):
        total = np.zeros((3, extension.LANES))
        for start, stop in itertools.pairwise(cuts):
            assert (
                extension.products(
                    [(bytes_of(vector[start:stop]), "BF16") for vector in vectors],
                    True,
                    False,
                    total,
                )
                == -1
            )
        sums.append(total)
    assert (sums[0] == sums[1]).all()
    for (i, j), found in zip([(0, 0), (1, 0), (1, 1)], sums[0].sum(axis=1), strict=True):
        assert found == pytest.approx(exact[i] @ exact[j], rel=1e-6, abs=1e-3)


def test_the_number_of_lanes_is_the_same_in_python():
    assert extension.LANES == LANES and CHUNK % LANES == 0


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_nan_in_an_input_is_an_error_that_names_it_unless_allowed(method):
    tensors = [("BF16", torch.ones(BLOCK + 3)), ("BF16", torch.ones(BLOCK + 3))]
    tensors = [(name, tensor.bfloat16()) for name, tensor in tensors]
    tensors[1][1][BLOCK] = math.nan
    one, other = operands_of(tensors, [{} if method == "slerp" else {"weight": 0.5}] * 2, raw=True)
    parts, base = ([other], one) if method == "slerp" else ([one, other], None)
    parameters = {"t": 0.5} if method == "slerp" else {}
    inputs = inputs_of(
        method, parts, base, shape=(BLOCK + 3,), parameters=parameters, name="t", seed=0
    )
    with pytest.raises(FrankenmergeError) as caught:
        list(native_span.rounded(span.RULES[method](inputs), "BF16", allow_nan=False))
    assert [fault.place for fault in caught.value.faults] == ["donor 1"]
    chunks = list(native_span.rounded(span.RULES[method](inputs), "BF16", allow_nan=True))
    assert [finite for _, finite in chunks] == [True, False]


def test_a_tensor_of_no_elements_has_no_chunks():
    parts = operands_of([("F32", torch.empty(0))], [{"weight": 1.0}], raw=True)
    inputs = inputs_of("linear", parts, None, shape=(0, 4), parameters={}, name="t", seed=0)
    assert not list(native_span.rounded(span.linear(inputs), "F32", allow_nan=False))
