"""The passes in C: against NumPy in float64, against torch bit by bit, and against callers that give it nonsense."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import TYPES, bits, bytes_of, parts_of, same

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import combine as torch_combine
from frankenmerge.splicing.methods import native_span, span
from frankenmerge.splicing.methods.inputs import BLOCK, inputs_of
from frankenmerge.splicing.methods.native_chunks import CHUNK, extension
from frankenmerge.splicing.methods.sums import LANES

# Where there is a compiler the extension must be there: what is missing then is a build, and these
# tests fail.
pytestmark = pytest.mark.skipif(
    extension is None and not shutil.which("cc"), reason="no compiler has built the extension"
)


def combined(tensors, coefficients, relative, dtype):
    """Through the extension: (the result, the first bad input, whether the result is finite)."""
    inputs = [(bytes_of(tensor), name) for name, tensor in tensors]
    result = bytearray(len(tensors[0][1]) * torch.empty(0, dtype=TYPES[dtype]).element_size())
    told = extension.combine(inputs, coefficients, relative, result, dtype)
    return torch.frombuffer(result, dtype=TYPES[dtype]) if result else torch.empty(
        0, dtype=TYPES[dtype]
    ), *told


# One element at a time


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_becomes_its_float32_and_comes_back(name):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(TYPES[name])
    wide, bad, finite = combined([(name, halves)], [1.0], False, "F32")
    expected = (
        halves.view(torch.uint8).numpy().view(np.float16).astype(np.float32)
        if name == "F16"
        else None
    )
    if expected is None:
        expected = (halves.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    assert same(wide, torch.from_numpy(expected)) and bad == 0 and not finite
    assert same(combined([("F32", wide)], [1.0], False, name)[0], halves)


def rounded_by_hand(value: float, name: str) -> float:
    """The nearest half, of two the even one, by Python's float64 and whole numbers alone."""
    digits, lowest, top = (10, -14, 65504.0) if name == "F16" else (7, -126, 3.3895313892515355e38)
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, lowest)
    step = math.ldexp(1.0, exponent - digits)
    rounded = round(value / step) * step  # exact but for round, which takes the even one of two
    return math.copysign(math.inf, value) if abs(rounded) > top else math.copysign(rounded, value)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_ties_and_their_neighbours_round_to_the_nearest_and_even(name):
    """Between every two halves: the middle, and the float32 numbers on either side of it; and what is smaller than all halves."""
    halves = torch.arange(0, 2**15 - 1, dtype=torch.int16)
    values = halves.view(TYPES[name]).float()
    values = values[values.isfinite()].double().numpy()
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    tiny = np.array([2.0**-149, 2.0**-140, 2.0**-130, 2.0**-26, 2.0**-25], np.float32)
    top = np.float32([65519.996, 65520.0, 65535.0, 65536.0, 3.39e38, 3.4028235e38])
    given_ = np.concatenate(
        [
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(np.inf)),
            tiny,
            top,
        ]
    )
    given_ = np.concatenate([given_, -given_])
    expected = [rounded_by_hand(float(value), name) for value in given_]
    found, _, _ = combined([("F32", torch.from_numpy(given_))], [1.0], False, name)
    assert same(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_float64_is_rounded_to_float32_first_and_float32_widened_without_loss():
    wide = torch.tensor(
        [1.0, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, -(2.0**-149), 1e300, 1e-300, math.nan],
        dtype=torch.float64,
    )
    narrow, bad, finite = combined([("F64", wide)], [1.0], False, "F32")
    assert same(narrow, wide.float()) and bad == 0 and not finite
    back, bad, finite = combined([("F32", narrow[:4])], [1.0], False, "F64")
    assert same(back, wide[:4].float().double()) and bad == -1 and finite


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1023, 1024, 2999])
def test_what_is_not_finite_is_found_wherever_it_is_and_told_by_its_input(dtype, value, place):
    tensors = [
        (dtype, torch.full((3000,), largest, dtype=TYPES[dtype])) for largest in (1.0, 60000.0, 2.0)
    ]
    assert combined(tensors, [0.0, 0.0, 0.5], False, dtype)[1:] == (-1, True)
    for number in (2, 1):
        tensors[number][1][place] = value
        result, bad, finite = combined(tensors, [0.0, 0.0, 0.5], False, dtype)
        assert (
            bad == number
            and not finite
            and not result[place].isfinite()
            and result[(place + 1) % 3000] == 1.0
        )
        assert (
            extension.products(
                [(bytes_of(t), dtype) for _, t in tensors],
                True,
                False,
                np.zeros((3, extension.LANES)),
            )
            == number
        )


def test_a_result_too_large_for_its_type_is_told_apart_from_its_inputs():
    assert combined([("F32", torch.tensor([1e6]))], [1.0], False, "F16")[1:] == (-1, False)
    assert combined([("F32", torch.tensor([3.4e38]))], [1.0], False, "BF16")[1:] == (-1, False)
    assert combined([("F32", torch.tensor([3.4e38]))], [2.0], False, "F64")[1:] == (-1, False)


# Whole tensors


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
def test_any_types_and_lengths_give_torch_s_bits_and_are_near_float64(
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
    """The bytes of the method's result: by the extension, and by torch."""
    whole = {"shape": shape, "parameters": parameters, "name": "t", "seed": 0}
    per_model = {"passthrough": {"scale": 0.7}} | dict.fromkeys(
        ("slerp", "karcher", "model_stock"), {}
    )
    own = [per_model.get(method, {"weight": 0.3 + 0.2 * number}) for number in range(len(tensors))]
    parts = {raw: parts_of(tensors, own, raw=raw) for raw in (True, False)}
    bases = {raw: parts_of([base], [{}], raw=raw)[0] if base else None for raw in (True, False)}
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
def test_every_method_gives_torch_s_bits(method, count, based, parameters, name, shape):
    generator = torch.Generator().manual_seed(count)
    tensors = [
        (name, (0.02 * torch.randn(shape, generator=generator)).to(TYPES[name]).flatten())
        for _ in range(count + 1)
    ]
    ours, torchs = both_ways(
        method, tensors[1:], tensors[0] if based else None, shape, parameters, name
    )
    assert ours == torchs


@pytest.mark.parametrize("method, count, based, parameters", CASES)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_torch_s_bits_and_stays_in_its_own_elements(
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
    ours, torchs = both_ways(
        method,
        tensors[1:],
        tensors[0] if based else None,
        (size,),
        parameters,
        name,
        allow_nan=True,
    )
    assert bits(torch.frombuffer(bytearray(ours), dtype=TYPES[name])).equal(
        bits(torch.frombuffer(bytearray(torchs), dtype=TYPES[name]))
    )
    spoiled = (
        (~torch.frombuffer(bytearray(ours), dtype=TYPES[name]).isfinite())
        .nonzero()
        .flatten()
        .tolist()
    )
    assert spoiled == [*range(0 if based else 1, count + 1), 5000, BLOCK + 1]


def test_inner_products_are_those_of_float64_and_do_not_depend_on_how_calls_cut_the_tensor():
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


def test_the_sums_are_as_many_as_the_rules_say():
    assert extension.LANES == LANES and CHUNK % LANES == 0


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_nan_in_an_input_is_refused_by_its_name_and_let_through_when_allowed(method):
    tensors = [("BF16", torch.ones(BLOCK + 3)), ("BF16", torch.ones(BLOCK + 3))]
    tensors = [(name, tensor.bfloat16()) for name, tensor in tensors]
    tensors[1][1][BLOCK] = math.nan
    one, other = parts_of(tensors, [{} if method == "slerp" else {"weight": 0.5}] * 2, raw=True)
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
    parts = parts_of([("F32", torch.empty(0))], [{"weight": 1.0}], raw=True)
    inputs = inputs_of("linear", parts, None, shape=(0, 4), parameters={}, name="t", seed=0)
    assert not list(native_span.rounded(span.linear(inputs), "F32", allow_nan=False))


# Nonsense


X = b"\x00" * 8


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [], False, bytearray(8), "F32"),
        ([(X, "F32")], [], False, bytearray(8), "F32"),
        ([(X, "F32")], [1.0], True, bytearray(8), "F32"),
        ([(X, "F32"), (X[:4], "F32")], [1.0, 1.0], False, bytearray(8), "F32"),
        ([(X, "F32"), (X, "BF16")], [1.0, 1.0], False, bytearray(8), "F32"),
        ([(X[:7], "F32")], [1.0], False, bytearray(8), "F32"),
        ([(X, "F32")], [1.0], False, bytearray(4), "F32"),
        ([(X, "F32")], [1.0], False, bytearray(12), "F32"),
        ([(X, "F32")], [1.0], False, bytearray(9), "F32"),
        ([(X, "I32")], [1.0], False, bytearray(8), "F32"),
        ([(X, "F32")], [1.0], False, bytearray(8), "F8_E4M3"),
        ([(X, "F32")], [1.0], False, bytearray(8), 3),
        ([(X, None)], [1.0], False, bytearray(8), "F32"),
        ([(X,)], [1.0], False, bytearray(8), "F32"),
        ([X], [1.0], False, bytearray(8), "F32"),
        ([("text", "F32")], [1.0], False, bytearray(8), "F32"),
        ([(X, "F32")], ["one"], False, bytearray(8), "F32"),
        ([(X, "F32")], 1.0, False, bytearray(8), "F32"),
        (3, [1.0], False, bytearray(8), "F32"),
        ([(X, "F32")], [1.0], False, X, "F32"),
        ([(np.zeros((4, 4), np.float32)[:, :2], "F32")], [1.0], False, bytearray(32), "F32"),
    ],
)
def test_what_does_not_fit_is_refused(arguments):
    with pytest.raises((ValueError, TypeError, BufferError)):
        extension.combine(*arguments)


def test_sums_that_do_not_fit_are_refused():
    lanes = extension.LANES
    for sums in (
        np.zeros((2, lanes)),
        np.zeros((3, lanes - 1)),
        np.zeros((4, lanes)),
        np.zeros((0, lanes)),
        bytearray(3 * lanes * 8 + 1),
    ):
        with pytest.raises(ValueError):
            extension.products([(X, "F32"), (X, "F32")], False, False, sums)
    with pytest.raises(ValueError):
        extension.products([(X, "F32")], True, False, np.zeros((1, lanes)))
    read_only = np.zeros((1, lanes))
    read_only.flags.writeable = False
    with pytest.raises((ValueError, TypeError, BufferError)):
        extension.products([(X, "F32")], False, False, read_only)
    shifted = memoryview(bytearray(lanes * 8 + 1))[1:]
    with pytest.raises(ValueError):
        extension.products([(X, "F32")], False, False, shifted)


def test_a_result_that_lies_in_an_input_is_refused():
    shared = bytearray(16)
    with pytest.raises(ValueError, match="must not overlap an input"):
        extension.combine(
            [(memoryview(shared)[:8], "F32")], [1.0], False, memoryview(shared)[4:12], "F32"
        )
    extension.combine(
        [(memoryview(shared)[:8], "F32")], [1.0], False, memoryview(shared)[8:], "F32"
    )


def test_elements_need_not_be_aligned():
    values = torch.randn(1001)
    shifted = memoryview(b"\x00" + bytes_of(values))[1:]
    result = bytearray(2 * 1001 + 1)
    extension.combine([(shifted, "F32")], [1.0], False, memoryview(result)[1:], "BF16")
    assert result[1:] == bytes_of(values.bfloat16())


def test_buffers_are_let_go_after_a_call_and_after_an_error():
    content, result = bytearray(8), bytearray(8)
    extension.combine([(content, "F32")], [1.0], False, result, "F32")
    with pytest.raises(ValueError):
        extension.combine([(content, "F32"), (content, "F16")], [1.0, 1.0], False, result, "F32")
    content.extend(b"more")  # a BufferError while anyone holds it
    result.extend(b"more")
