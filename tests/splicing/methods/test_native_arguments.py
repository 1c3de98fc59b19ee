"""Arguments that the extension rejects, and buffers that it releases."""

import numpy as np
import pytest
import torch
from native_calls import needs_extension
from numpy.random import SFC64
from tensors import bytes_of

from frankenmerge.splicing.methods.native_chunks import extension
from frankenmerge.splicing.methods.select import DIGITS
from frankenmerge.splicing.methods.sums import LANES

pytestmark = needs_extension


EIGHT = b"\x00" * 8


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], [], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], [1.0], True, bytearray(8), "F32"),
        ([(EIGHT, "F32"), (EIGHT[:4], "F32")], [1.0, 1.0], False, bytearray(8), "F32"),
        ([(EIGHT, "F32"), (EIGHT, "BF16")], [1.0, 1.0], False, bytearray(8), "F32"),
        ([(EIGHT[:7], "F32")], [1.0], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], [1.0], False, bytearray(4), "F32"),
        ([(EIGHT, "F32")], [1.0], False, bytearray(12), "F32"),
        ([(EIGHT, "F32")], [1.0], False, bytearray(9), "F32"),
        ([(EIGHT, "I32")], [1.0], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], [1.0], False, bytearray(8), "F8_E4M3"),
        ([(EIGHT, "F32")], [1.0], False, bytearray(8), 3),
        ([(EIGHT, None)], [1.0], False, bytearray(8), "F32"),
        ([(EIGHT,)], [1.0], False, bytearray(8), "F32"),
        ([EIGHT], [1.0], False, bytearray(8), "F32"),
        ([("text", "F32")], [1.0], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], ["one"], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], 1.0, False, bytearray(8), "F32"),
        (3, [1.0], False, bytearray(8), "F32"),
        ([(EIGHT, "F32")], [1.0], False, EIGHT, "F32"),
        ([(np.zeros((4, 4), np.float32)[:, :2], "F32")], [1.0], False, bytearray(32), "F32"),
    ],
)
def test_invalid_arguments_of_combine_are_rejected(arguments):
    with pytest.raises((ValueError, TypeError, BufferError)):
        extension.combine(*arguments)


def test_invalid_sums_are_rejected():
    lanes = extension.LANES
    for sums in (
        np.zeros((2, lanes)),
        np.zeros((3, lanes - 1)),
        np.zeros((4, lanes)),
        np.zeros((0, lanes)),
        bytearray(3 * lanes * 8 + 1),
    ):
        with pytest.raises(ValueError):
            extension.products([(EIGHT, "F32"), (EIGHT, "F32")], False, False, sums)
    with pytest.raises(ValueError):
        extension.products([(EIGHT, "F32")], True, False, np.zeros((1, lanes)))
    read_only = np.zeros((1, lanes))
    read_only.flags.writeable = False
    with pytest.raises((ValueError, TypeError, BufferError)):
        extension.products([(EIGHT, "F32")], False, False, read_only)
    shifted = memoryview(bytearray(lanes * 8 + 1))[1:]
    with pytest.raises(ValueError):
        extension.products([(EIGHT, "F32")], False, False, shifted)


def test_a_result_that_overlaps_an_input_is_rejected():
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


def test_combine_releases_buffers_after_a_call_and_after_an_error():
    content, result = bytearray(8), bytearray(8)
    extension.combine([(content, "F32")], [1.0], False, result, "F32")
    with pytest.raises(ValueError):
        extension.combine([(content, "F32"), (content, "F16")], [1.0, 1.0], False, result, "F32")
    content.extend(b"more")  # a BufferError while the buffer is in use
    result.extend(b"more")


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
def test_invalid_arguments_of_thin_are_rejected(arguments):
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
def test_invalid_arguments_of_the_other_passes_are_rejected(call):
    with pytest.raises((ValueError, TypeError, AttributeError, BufferError)):
        call()


def test_the_passes_release_buffers_after_a_call_and_after_an_error():
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
    content.extend(b"more")  # a BufferError while the buffer is in use
    result.extend(b"more")
