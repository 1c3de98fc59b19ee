"""Order statistics compared with sorting."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmerge.splicing.methods.select import boundaries, kth_largest
from frankenmerge.splicing.methods.torch_select import before, magnitudes, order_of


def spans_of(size, step):
    return lambda: ((start, min(start + step, size)) for start in range(0, size, step))


VALUES = st.lists(
    st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001]),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=80)
@given(VALUES, st.integers(1, 9), st.data())
def test_boundaries_rank_as_a_stable_sort_does(values, step, data):
    array = np.array(values, dtype=np.float32)
    size = len(array)
    bits = magnitudes(torch.from_numpy(array.copy()))
    order = np.lexsort((np.arange(size), -np.abs(array).astype(np.float64)))
    ranks = data.draw(st.lists(st.integers(0, size), min_size=1, max_size=3))
    found = boundaries(
        order_of(lambda start, stop: bits[start:stop].clone(), spans_of(size, step)), size, ranks
    )
    for rank, boundary in zip(ranks, found, strict=True):
        mask = torch.cat(
            [before(bits[a:b].clone(), a, boundary) for a, b in spans_of(size, step)()]
        ).numpy()
        assert set(mask.tolist()) <= {0, -1}
        assert sorted(np.flatnonzero(mask)) == sorted(order[:rank])


@settings(deadline=None, max_examples=40)
@given(VALUES, st.data())
def test_kth_largest_is_the_sorted_element(values, data):
    array = np.abs(np.array(values, dtype=np.float32))
    bits = magnitudes(torch.from_numpy(array.copy()))
    rank = data.draw(st.integers(0, len(array) - 1))
    ((key, ties_before),) = kth_largest(
        order_of(lambda start, stop: bits[start:stop].clone(), spans_of(len(array), 7)), [rank]
    )
    ordered = np.sort(array)[::-1]
    value = np.array([key], dtype=np.int32).view(np.float32)[0]
    assert value == ordered[rank]
    assert ties_before == rank - (array > value).sum()
