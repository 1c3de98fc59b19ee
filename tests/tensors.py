"""Tensors as files hold them, for the tests of what reads them."""

import math

import torch

from frankenmerge.errors import Fault
from frankenmerge.splicing.methods.inputs import Operand, Raw

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if len(tensor) else b""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, every NaN the same one: its payload means nothing."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).view(whole)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def parts_of(tensors, parameters, *, raw: bool) -> list[Operand]:
    """Models of (type, tensor) and their parameters: as the extension takes them, or as torch does."""

    def part(number: int, name: str, tensor: torch.Tensor, own) -> Operand:
        told = Fault(f"donor {number}", "finite numbers", "NaN or Inf", "none")

        def read(start: int, stop: int):
            piece = tensor[start:stop]
            return Raw(memoryview(bytes_of(piece)), name, told) if raw else piece.float().clone()

        return Operand(read, own)

    return [
        part(number, *tensor, own)
        for number, (tensor, own) in enumerate(zip(tensors, parameters, strict=True))
    ]
