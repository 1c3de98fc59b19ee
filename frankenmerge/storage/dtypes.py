"""The element types of tensors: one table of their names in safetensors and torch, and their sizes.

Importing it does not import torch.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """An element type."""

    name: str
    """In the header of a safetensors file: `BF16`, `F32`, ..."""
    torch_name: str
    """In torch and in config.json: `bfloat16`, `float32`, ..."""
    bytes: int
    """Size of one element."""
    floating: bool
    exponent: int | None = None
    """Mask of the exponent's bits, which only NaN and Inf have all set. None for types that are
    only copied (see `COMPUTED`).
    """


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", "float64", 8, True, exponent=0x7FF << 52),
        Dtype("I64", "int64", 8, False),
        Dtype("U64", "uint64", 8, False),
        Dtype("F32", "float32", 4, True, exponent=0xFF << 23),
        Dtype("I32", "int32", 4, False),
        Dtype("U32", "uint32", 4, False),
        Dtype("F16", "float16", 2, True, exponent=0x1F << 10),
        Dtype("BF16", "bfloat16", 2, True, exponent=0xFF << 7),
        Dtype("I16", "int16", 2, False),
        Dtype("U16", "uint16", 2, False),
        Dtype("F8_E4M3", "float8_e4m3fn", 1, True),
        Dtype("F8_E5M2", "float8_e5m2", 1, True),
        Dtype("F8_E8M0", "float8_e8m0fnu", 1, True),
        Dtype("I8", "int8", 1, False),
        Dtype("U8", "uint8", 1, False),
        Dtype("BOOL", "bool", 1, False),
    )
}
"""Every supported type by its name in safetensors."""

BYTES_OF: dict[str, int] = {name: dtype.bytes for name, dtype in DTYPES.items()}
"""Bytes per element, by the type's name in safetensors."""

STORED_NAMES: dict[str, str] = {dtype.torch_name: name for name, dtype in DTYPES.items()}
"""Names in safetensors by the names in torch and config.json."""

COMPUTED = ("F32", "F16", "BF16", "F64")
"""Types that a merge method reads and writes. Tensors of other types are only copied."""

EXACT_IN_FLOAT32 = ("F32", "F16", "BF16")
"""Floating types whose values float32 represents without loss; types of 8 bits are left out."""


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's type by its name in safetensors or in torch. Raises KeyError if unknown."""
    import torch

    return getattr(torch, DTYPES[STORED_NAMES.get(name, name)].torch_name)
