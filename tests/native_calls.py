"""Calls of the extension, for its tests."""

import shutil

import pytest
import torch
from tensors import TYPES, bytes_of

from frankenmerge.splicing.methods.native_chunks import extension

needs_extension = pytest.mark.skipif(
    extension is None and not shutil.which("cc"), reason="there is no compiler"
)
"""If there is a compiler, a missing extension is a failed build, and the tests fail."""


def combined(tensors, coefficients, relative, dtype):
    """Combine by the extension; return the result, the first bad input and whether it is finite."""
    inputs = [(bytes_of(tensor), name) for name, tensor in tensors]
    result = bytearray(len(tensors[0][1]) * torch.empty(0, dtype=TYPES[dtype]).element_size())
    status = extension.combine(inputs, coefficients, relative, result, dtype)
    return torch.frombuffer(result, dtype=TYPES[dtype]) if result else torch.empty(
        0, dtype=TYPES[dtype]
    ), *status
