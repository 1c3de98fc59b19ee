"""The table of types compared with safetensors' and torch's own."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from frankenmerge.storage.dtypes import (
    BYTES_OF,
    COMPUTED,
    DTYPES,
    EXACT_IN_FLOAT32,
    STORED_NAMES,
    torch_dtype,
)


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_is_that_of_torch(name):
    dtype = torch_dtype(name)
    assert str(dtype) == f"torch.{DTYPES[name].torch_name}"
    assert dtype.itemsize == DTYPES[name].bytes == BYTES_OF[name]
    assert dtype.is_floating_point == DTYPES[name].floating
    assert torch_dtype(DTYPES[name].torch_name) == dtype
    assert STORED_NAMES[DTYPES[name].torch_name] == name


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F8_E8M0"])
def test_safetensors_uses_that_name(name):
    content = save({"x": torch.zeros(3, dtype=torch_dtype(name))})
    assert f'"dtype":"{name}"'.encode() in content
    assert load(content)["x"].dtype == torch_dtype(name)


@pytest.mark.parametrize(
    "name", [name for name, dtype in DTYPES.items() if dtype.exponent and dtype.bytes <= 2]
)
def test_all_bits_of_the_exponent_are_set_in_nan_and_inf_only(name):
    size = DTYPES[name].bytes
    patterns = np.arange(256**size, dtype=f"<u{size}")
    values = torch.frombuffer(bytearray(patterns.tobytes()), dtype=torch_dtype(name))
    mask = DTYPES[name].exponent
    assert (((patterns & mask) == mask) == ~values.float().isfinite().numpy()).all()


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_the_exponent_of_a_wide_type_is_that_of_inf(name):
    inf = np.array([np.inf], DTYPES[name].torch_name).view(f"<u{DTYPES[name].bytes}")
    assert inf[0] == DTYPES[name].exponent


def test_the_computed_types_and_no_others_have_an_exponent():
    assert {name for name, dtype in DTYPES.items() if dtype.exponent} == {*COMPUTED}
    assert all(DTYPES[name].floating for name in COMPUTED)
    assert {*COMPUTED} - {*EXACT_IN_FLOAT32} == {"F64"}


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        torch_dtype("F7")


def test_the_table_is_read_without_torch():
    code = "import sys, frankenmerge.storage.dtypes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
