"""The passes over a task vector in C, each compared with NumPy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import needs_extension
from numpy.random import SFC64
from tensors import bytes_of

from frankenmerge.splicing.methods.native_chunks import extension
from frankenmerge.splicing.methods.select import DIGITS, LARGEST
from frankenmerge.splicing.methods.sums import LANES

pytestmark = needs_extension


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
def test_elements_between_two_ranks_are_kept_however_calls_split_the_tensor(values, data):
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


def test_counts_and_indices_are_those_of_the_keys():
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
    indices = np.flatnonzero(keys == key).tolist()
    assert [extension.find(pair, key, nth)[0] for nth in range(len(indices))] == indices
    assert extension.find(pair, key, len(indices)) == (-1, len(indices))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_row_limits_follow_the_ranks_of_a_stable_sort(width, rows, seed, coarse):
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


def test_elements_whose_word_of_31_bits_is_below_the_limit_are_kept():
    size = 4097
    ones, result = np.ones(size, np.float32), bytearray(4 * size)
    limit = 2**30
    terms = [(1.0, 1.0, (SFC64(3), limit))]
    extension.thin(
        [(np.zeros_like(ones), "F32"), (ones, "F32")], terms, 0, False, -1.0, 1.0, result, "F32"
    )
    words = SFC64(3).random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size] & LARGEST
    assert (np.frombuffer(result, np.float32) == (words < limit)).all()


def test_a_generator_is_kept_alive_during_the_call():
    class Terms:
        """Creates its items on request and keeps no reference to them."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return 1.0, 1.0, (SFC64(3), 2**30)

    size = 200_000
    ones, results = np.ones(size, np.float32), []
    for terms in (Terms(), [(1.0, 1.0, (SFC64(3), 2**30))]):
        results.append(bytearray(4 * size))
        extension.thin(
            [(np.zeros_like(ones), "F32"), (ones, "F32")],
            terms,
            0,
            False,
            -1.0,
            1.0,
            results[-1],
            "F32",
        )
    assert results[0] == results[1]
