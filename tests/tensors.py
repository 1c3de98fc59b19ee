"""Tensors as stored in files, for the tests of what reads them."""

import math

import torch

from frankenmerge.errors import Fault
from frankenmerge.splicing.methods.inputs import Operand, Raw
from frankenmerge.storage.dtypes import torch_dtype

TYPES = {name: torch_dtype(name) for name in ("F64", "F32", "F16", "BF16")}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if len(tensor) else b""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits as integers, with every NaN replaced by the same one."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).view(whole)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def operands_of(tensors, parameters, *, raw: bool) -> list[Operand]:
    """Return operands from (type, tensor) and parameters, for C (`raw`) or for torch."""

    def operand(number: int, name: str, tensor: torch.Tensor, own) -> Operand:
        fault = Fault(f"donor {number}", "finite numbers", "NaN or Inf", "none")

        def read(start: int, stop: int):
            piece = tensor[start:stop]
            return Raw(memoryview(bytes_of(piece)), name, fault) if raw else piece.float().clone()

        return Operand(read, own)

    return [
        operand(number, *tensor, own)
        for number, (tensor, own) in enumerate(zip(tensors, parameters, strict=True))
    ]
