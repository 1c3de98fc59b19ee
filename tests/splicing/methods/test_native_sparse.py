"""Thinned task vectors in C: against torch bit by bit, against sorting, and against callers that give it nonsense."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import SFC64
from tensors import TYPES, bits, bytes_of, parts_of

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import combine as torch_combine
from frankenmerge.splicing.methods import native, sparse
from frankenmerge.splicing.methods.inputs import inputs_of
from frankenmerge.splicing.methods.native_chunks import CHUNK, extension
from frankenmerge.splicing.methods.select import DIGITS, LARGEST
from frankenmerge.splicing.methods.sums import LANES

# Where there is a compiler the extension must be there: what is missing then is a build, and these
# tests fail.
pytestmark = pytest.mark.skipif(
    extension is None and not shutil.which("cc"), reason="no compiler has built the extension"
)

METHODS = list(sparse.RULES)
CONSENSUS = ("ties", "breadcrumbs_ties", "dare_ties", "della")


def numbers(rng, name, size, spread=0.02) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(size) * spread).to(TYPES[name])


def described(method, tensors, own, parameters, shape, *, raw=True):
    """Inputs of the extension or of torch, the first tensor being the base's."""
    base, *parts = parts_of(tensors, [{}, *own], raw=raw)
    return parts, base, {"shape": shape, "parameters": parameters, "name": "t", "seed": 5}


def by_c(method, tensors, own, parameters, shape, dtype, *, allow_nan=False) -> bytes:
    parts, base, whole = described(method, tensors, own, parameters, shape)
    thinned = sparse.RULES[method](inputs_of(method, parts, base, **whole))
    return b"".join(
        bytes(content) for content, _ in native.rounded(thinned, dtype, allow_nan=allow_nan)
    )


def by_torch(method, tensors, own, parameters, shape, dtype) -> bytes:
    parts, base, whole = described(method, tensors, own, parameters, shape, raw=False)
    return b"".join(
        bytes_of(chunk.to(TYPES[dtype]))
        for chunk in torch_combine.combine(method, parts, base, **whole)
    )


def told_of(method, density, weight, gamma):
    """A model's parameters."""
    told = {"density": density, "weight": weight}
    if method.startswith("della"):
        return told | {"epsilon": min(density, 1 - density) / 2}
    return told | ({"gamma": gamma} if method.startswith("breadcrumbs") else {})


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
def test_any_tensors_give_torch_s_bits(method, types, dtype, shape, spread, switches, coarse, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tensors = [(name, numbers(rng, name, math.prod(shape), spread)) for name in types]
    if coarse:  # many equal magnitudes, and differences of 0
        tensors = [
            (name, (tensor.double() / spread).round().mul(spread).to(tensor.dtype))
            for name, tensor in tensors
        ]
    own = [
        told_of(
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
    made = by_c(method, tensors, own, parameters, shape, dtype, allow_nan=True)
    assert same_bytes(made, by_torch(method, tensors, own, parameters, shape, dtype), dtype)


def same_bytes(one: bytes, other: bytes, dtype: str) -> bool:
    first, second = (
        bits(torch.frombuffer(bytearray(content), dtype=TYPES[dtype])) for content in (one, other)
    )
    return torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [(2 * CHUNK + 1001,), (400, 1001), (2, CHUNK + 5)])
def test_tensors_of_several_chunks_give_torch_s_bits(method, rescale, shape):
    rng = np.random.default_rng(2)
    tensors = [("BF16", numbers(rng, "BF16", math.prod(shape))) for _ in range(3)]
    own = [told_of(method, density, weight, 0.01) for density, weight in ((0.3, 0.5), (0.7, 0.9))]
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
def test_what_is_not_finite_gives_torch_s_bits_and_stays_in_its_own_elements(
    method, rescale, name, values
):
    rng = np.random.default_rng(4)
    size = CHUNK + 3
    tensors = [(name, numbers(rng, name, size)) for _ in range(4)]
    for number, ((_, tensor), value) in enumerate(zip(tensors, values, strict=True)):
        tensor[[number, 5000, CHUNK + 1]] = value
    own = [
        told_of(method, density, weight, 0.001)
        for density, weight in ((0.4, 0.5), (0.8, 0.9), (0.6, 0.7))
    ]
    made = by_c(method, tensors, own, {"rescale": rescale}, (size,), name, allow_nan=True)
    assert same_bytes(
        made, by_torch(method, tensors, own, {"rescale": rescale}, (size,), name), name
    )
    spoiled = (
        (~torch.frombuffer(bytearray(made), dtype=TYPES[name]).isfinite())
        .nonzero()
        .flatten()
        .tolist()
    )
    assert set(spoiled) <= {0, 1, 2, 3, 5000, CHUNK + 1}


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_nan_ranks_alike_wherever_it_lies(name):
    """What makes float32 of a NaN gives its digits as it likes; all are one magnitude, of which the lower indices stay."""
    tensors = [
        (name, torch.zeros(19).to(TYPES[name])),
        (name, torch.full((19,), math.nan).to(TYPES[name])),
    ]
    own = [{"weight": 1.0, "density": 0.5}]
    made = by_c("ties", tensors, own, {}, (19,), "F32", allow_nan=True)
    assert torch.frombuffer(
        bytearray(made), dtype=torch.float32
    ).isnan().nonzero().flatten().tolist() == list(range(9))
    assert same_bytes(made, by_torch("ties", tensors, own, {}, (19,), "F32"), "F32")


@pytest.mark.parametrize("method", CONSENSUS)
@pytest.mark.parametrize("weights", [(0.3, 0.6, -0.9), (-0.8, 0.7, 0.1), (1e-9,), (1e-9, -1e-9)])
def test_what_is_divided_by_is_no_rounding_however_small_the_weights(method, weights):
    """Nothing is larger than the sum of what agrees over the least that agreeing weights come to."""
    rng = np.random.default_rng(6)
    tensors = [("F32", numbers(rng, "F32", 5000)) for _ in range(len(weights) + 1)]
    parameters = {"normalize": True, "rescale": False}
    made = by_c(
        method,
        tensors,
        [told_of(method, 1.0, weight, 0.0) for weight in weights],
        parameters,
        (5000,),
        "F32",
    )
    assert same_bytes(
        made,
        by_torch(
            method,
            tensors,
            [told_of(method, 1.0, w, 0.0) for w in weights],
            parameters,
            (5000,),
            "F32",
        ),
        "F32",
    )
    result, base = torch.frombuffer(bytearray(made), dtype=torch.float32), tensors[0][1]
    assert (result - base).abs().max() < 2
    if len(weights) == 1:
        torch.testing.assert_close(result, tensors[1][1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [0, 1])
def test_nan_in_an_input_is_refused_by_its_name(method, number):
    tensors = [("BF16", torch.ones(CHUNK + 3).bfloat16()) for _ in range(2)]
    tensors[number][1][CHUNK] = math.nan
    with pytest.raises(FrankenmergeError) as caught:
        by_c(method, tensors, [told_of(method, 0.5, 1.0, 0.01)], {}, (CHUNK + 3,), "BF16")
    assert [fault.place for fault in caught.value.faults] == [f"donor {number}"]


def test_a_tensor_of_no_elements_has_no_chunks():
    parts, base, whole = described(
        "ties", [("F32", torch.empty(0))] * 2, [{"weight": 1.0}], {}, (0,)
    )
    assert not list(
        native.rounded(sparse.ties(inputs_of("ties", parts, base, **whole)), "F32", allow_nan=False)
    )


# The passes by themselves


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, 1.0, -1.0]),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_what_lies_between_two_ranks_stays_however_calls_cut_the_tensor(values, data):
    array = np.array(values, np.float32)
    size = len(array)
    order = np.lexsort((np.arange(size), -np.abs(array).astype(np.float64)))
    first, end = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))

    def boundary(rank):
        return (
            (int(np.abs(array).view(np.int32)[order[rank]]), int(order[rank]))
            if rank < size
            else (0, size)
        )

    cut = data.draw(st.integers(0, size))
    pieces = []
    for start, stop in itertools.pairwise([0, cut, size]):
        piece, result = array[start:stop], bytearray(4 * (stop - start))
        keep = (*boundary(first), *boundary(end))
        extension.thin(
            [(np.zeros_like(piece), "F32"), (piece, "F32")],
            [(1.0, 1.0, keep)],
            start,
            False,
            -1.0,
            1.0,
            result,
            "F32",
        )
        pieces.append(np.frombuffer(result, np.float32))
    kept = np.zeros_like(array)
    kept[order[first:end]] = array[order[first:end]]
    assert (np.concatenate(pieces) == kept).all()


def test_counts_and_places_are_those_of_the_keys():
    rng = np.random.default_rng(8)
    base, model = (rng.standard_normal(5000).round(1).astype(np.float32) for _ in range(2))
    pair = [(base, "F32"), (model, "F32")]
    keys = np.abs(model - base).view(np.int32)
    counts = np.zeros(DIGITS, np.int64)
    assert extension.count(pair, None, counts) == -1
    assert (counts == np.bincount(keys >> 16, minlength=DIGITS)).all()
    upper = int(counts.argmax())
    counts[:] = 0
    extension.count(pair, upper, counts)
    assert (counts == np.bincount(keys[keys >> 16 == upper] & 0xFFFF, minlength=DIGITS)).all()
    key = int(keys[4321])
    places = np.flatnonzero(keys == key).tolist()
    assert [extension.find(pair, key, nth)[0] for nth in range(len(places))] == places
    assert extension.find(pair, key, len(places)) == (-1, len(places))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_limits_go_by_the_rank_in_the_row_of_a_stable_sort(width, rows, seed, coarse):
    rng = np.random.default_rng(seed)
    model = (
        rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-30, 30, (rows, width))
    ).astype(np.float32)
    if coarse:
        model = np.sign(model)
    limits, found = (
        rng.integers(0, 2**31, width).astype(np.uint32),
        np.zeros((rows, width), np.uint32),
    )
    assert (
        extension.row_limits([(np.zeros_like(model), "F32"), (model, "F32")], limits, found) == -1
    )
    ranks = np.abs(model).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    assert (found == limits[ranks]).all()


def test_the_sums_of_magnitudes_are_those_of_float64():
    rng = np.random.default_rng(9)
    base, model = (
        torch.from_numpy(rng.standard_normal(3 * LANES + 77).astype(np.float32)).bfloat16()
        for _ in range(2)
    )
    delta = np.abs(model.double().numpy() - base.double().numpy())
    sums = np.zeros((2, LANES))
    key = int(np.float32(0.5).view(np.int32))
    pair = [(bytes_of(base), "BF16"), (bytes_of(model), "BF16")]
    assert extension.sum_magnitudes(pair, (LARGEST, 0, key, len(delta)), 0, False, sums) == -1
    assert sums.sum(axis=1) == pytest.approx([delta.sum(), delta[delta >= 0.5].sum()], rel=1e-7)


def test_a_word_of_31_bits_below_the_limit_stays():
    size = 4097
    ones, result = np.ones(size, np.float32), bytearray(4 * size)
    limit = 2**30
    terms = [(1.0, 1.0, (SFC64(3), limit))]
    extension.thin(
        [(np.zeros_like(ones), "F32"), (ones, "F32")], terms, 0, False, -1.0, 1.0, result, "F32"
    )
    words = SFC64(3).random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size] & LARGEST
    assert (np.frombuffer(result, np.float32) == (words < limit)).all()


def test_a_generator_lives_as_long_as_it_is_drawn_from():
    class Terms:
        """Made as they are asked for, and held by nobody."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return 1.0, 1.0, (SFC64(3), 2**30)

    size = 200_000
    ones, made = np.ones(size, np.float32), []
    for terms in (Terms(), [(1.0, 1.0, (SFC64(3), 2**30))]):
        made.append(bytearray(4 * size))
        extension.thin(
            [(np.zeros_like(ones), "F32"), (ones, "F32")],
            terms,
            0,
            False,
            -1.0,
            1.0,
            made[-1],
            "F32",
        )
    assert made[0] == made[1]


# Nonsense


X = np.zeros(2, np.float32)
PAIR = [(X, "F32"), (X, "F32")]
TERM = (1.0, 1.0, None)


def counts_of(size=DIGITS):
    return np.zeros(size, np.int64)


def words_of(size):
    return np.zeros(size, np.uint32)


@pytest.mark.parametrize(
    "arguments",
    [
        (PAIR[:1], [], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [TERM, TERM], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, 3, 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0)], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, ["term"], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [("one", 1.0, None)], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, 3)], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (1, 2, 3))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (-1, 0, 0, 0))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (2**31, 0, 0, 0))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (1, -1, 0, 0))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (1, 1, 0, -1))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (object(), 5))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (SFC64(1), 5.0))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [(1.0, 1.0, (SFC64(1), 2**31))], 0, False, -1.0, 1.0, bytearray(8), "F32"),
        (
            PAIR,
            [(1.0, 1.0, (counts_of(2), counts_of(2)))],
            0,
            False,
            -1.0,
            1.0,
            bytearray(8),
            "F32",
        ),
        (
            PAIR,
            [(1.0, 1.0, (np.zeros(2, np.int32), np.zeros(1, np.int32)))],
            0,
            False,
            -1.0,
            1.0,
            bytearray(8),
            "F32",
        ),
        (
            PAIR,
            [(1.0, 1.0, (np.zeros(2, np.int32), None))],
            0,
            False,
            -1.0,
            1.0,
            bytearray(8),
            "F32",
        ),
        (PAIR, [TERM], -1, False, -1.0, 1.0, bytearray(8), "F32"),
        (PAIR, [TERM], 0, False, -1.0, "one", bytearray(8), "F32"),
        (PAIR, [TERM], 0, False, -1.0, 1.0, bytearray(4), "F32"),
        (PAIR, [TERM], 0, False, -1.0, 1.0, b"\x00" * 8, "F32"),
        (PAIR, [TERM], 0, False, -1.0, 1.0, X, "F32"),
        (PAIR, [TERM], 0, False, -1.0, 1.0, bytearray(8), "I32"),
    ],
)
def test_what_does_not_fit_is_refused(arguments):
    with pytest.raises((ValueError, TypeError, AttributeError, BufferError)):
        extension.thin(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda: extension.count(PAIR, -1, counts_of()),
        lambda: extension.count(PAIR, DIGITS, counts_of()),
        lambda: extension.count(PAIR, "upper", counts_of()),
        lambda: extension.count(PAIR, None, counts_of(DIGITS - 1)),
        lambda: extension.count(PAIR[:1], None, counts_of()),
        lambda: extension.count([*PAIR, PAIR[0]], None, counts_of()),
        lambda: extension.count(PAIR, None, memoryview(bytearray(8 * DIGITS + 1))[1:]),
        lambda: extension.count(PAIR, None, bytes(8 * DIGITS)),
        lambda: extension.row_limits(PAIR, words_of(3), words_of(2)),
        lambda: extension.row_limits(PAIR, words_of(0), words_of(2)),
        lambda: extension.row_limits(PAIR, words_of(2), words_of(1)),
        lambda: extension.row_limits(PAIR[:1], words_of(2), words_of(2)),
        lambda: extension.row_limits(PAIR, words_of(2), bytes(8)),
        lambda: extension.row_limits(PAIR, words_of(2), memoryview(bytearray(9))[1:]),
        lambda: extension.find(PAIR, -1, 0),
        lambda: extension.find(PAIR, 2**31, 0),
        lambda: extension.find(PAIR[:1], 0, 0),
        lambda: extension.sum_magnitudes(PAIR, None, -1, False, np.zeros((2, LANES))),
        lambda: extension.sum_magnitudes(PAIR, None, 0, False, np.zeros((1, LANES))),
        lambda: extension.sum_magnitudes(PAIR[:1], None, 0, False, np.zeros((2, LANES))),
        lambda: extension.sum_magnitudes(PAIR, (1, 2), 0, False, np.zeros((2, LANES))),
        lambda: extension.sum_magnitudes(PAIR, None, 0, False, bytes(16 * LANES)),
    ],
)
def test_what_does_not_fit_is_refused_by_the_other_passes(call):
    with pytest.raises((ValueError, TypeError, AttributeError, BufferError)):
        call()


def test_buffers_are_let_go_after_a_call_and_after_an_error():
    content, result = bytearray(8), bytearray(8)
    pair = [(content, "F32"), (content, "F32")]
    extension.thin(pair, [TERM], 0, True, 0.0, 1.0, result, "F32")
    extension.count(pair, None, counts_of())
    extension.find(pair, 0, 0)
    for call in (
        lambda: extension.thin(pair, [3], 0, True, 0.0, 1.0, result, "F32"),
        lambda: extension.count(pair, -1, counts_of()),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    content.extend(b"more")  # a BufferError while anyone holds it
    result.extend(b"more")
