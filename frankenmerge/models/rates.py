"""How fast a device computes: a short measurement of one product of matrices."""

from time import perf_counter
from typing import NamedTuple

import torch

from frankenmerge.models.loading import one_device
from frankenmerge.storage.dtypes import torch_dtype

ROWS, LARGEST = 1024, 4096
"""Rows of the product, as many as inputs in a batch; larger matrices are no faster."""
_SECONDS = 0.2
"""How long is measured at least."""


class Rate(NamedTuple):
    """Operations per second in the product `[rows, width] x [width, inner]`."""

    operations: float
    rows: int
    width: int
    inner: int
    dtype: str
    device: str

    def __str__(self) -> str:
        product = f"[{self.rows}, {self.width}] x [{self.width}, {self.inner}]"
        return f"{self.operations / 1e9:,.3g} Gflop/s, {product} in {self.dtype} on {self.device}"


def measured_rate(width: int, inner: int, *, dtype: str, device: str) -> Rate:
    """Measure a product of the size of a model's feed-forward maps.

    Args:
        width: of the model; at most `LARGEST` is used.
        inner: of its feed-forward maps; the same.
        dtype: in which it computes.
        device: a torch device, or `auto` for the first that there is.

    Raises:
        FrankenmergeError: for a device that is not available.
    """
    place = one_device(device)
    width, inner = min(width, LARGEST), min(inner, LARGEST)
    generator = torch.Generator().manual_seed(0)
    rows, matrix = (
        torch.randn(shape, generator=generator).to(place, torch_dtype(dtype))
        for shape in ((ROWS, width), (width, inner))
    )
    _synchronised(rows @ matrix)  # the first call allocates
    count, started = 0, perf_counter()
    while (taken := perf_counter() - started) < _SECONDS or not count:
        _synchronised(rows @ matrix)
        count += 1
    operations = 2 * ROWS * width * inner * count / taken
    return Rate(operations, ROWS, width, inner, dtype, str(place))


def _synchronised(product: torch.Tensor) -> None:
    """Wait until a product is computed."""
    product[:1, :1].cpu()
