"""Conversion of elements in C, and detection of NaN and Inf."""

import math

import numpy as np
import pytest
import torch
from native_calls import combined, needs_extension
from tensors import TYPES, bytes_of, same

from frankenmerge.splicing.methods.native_chunks import extension

pytestmark = needs_extension


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
    """Return the nearest 16-bit number, ties to even, computed with Python's float and int."""
    digits, lowest, top = (10, -14, 65504.0) if name == "F16" else (7, -126, 3.3895313892515355e38)
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, lowest)
    step = math.ldexp(1.0, exponent - digits)
    rounded = round(value / step) * step  # exact except for round, which rounds ties to even
    return math.copysign(math.inf, value) if abs(rounded) > top else math.copysign(rounded, value)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_ties_and_their_neighbours_round_to_the_nearest_and_even(name):
    """Midpoints between neighbours, the float32 numbers next to them, tiny and large numbers."""
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
def test_nan_and_inf_are_detected_at_any_index_and_attributed_to_an_input(dtype, value, place):
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


def test_overflow_of_the_result_is_distinguished_from_nonfinite_inputs():
    assert combined([("F32", torch.tensor([1e6]))], [1.0], False, "F16")[1:] == (-1, False)
    assert combined([("F32", torch.tensor([3.4e38]))], [1.0], False, "BF16")[1:] == (-1, False)
    assert combined([("F32", torch.tensor([3.4e38]))], [2.0], False, "F64")[1:] == (-1, False)
