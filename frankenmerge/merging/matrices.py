"""A difference of two weights, held in memory: the few products that its decomposition needs.

On the CPU numpy computes; on other devices torch multiplies by the large matrix, and everything
small comes back.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

_CHUNK = 1 << 20
"""Elements that are converted to float64 at a time."""


class Eigen(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric matrix, in float64."""

    values: "np.ndarray"
    """`[n]`, the largest first."""
    vectors: "np.ndarray"
    """`[n, n]`, one a column."""


class Matrix(Protocol):
    """A matrix `D [m, n]` in float32."""

    shape: tuple[int, int]

    def times(self, other: "np.ndarray") -> "np.ndarray":
        """`D @ other`, float32."""
        ...

    def transposed_times(self, other: "np.ndarray") -> "np.ndarray":
        """`D.T @ other`, float32."""
        ...

    def eigen(self) -> Eigen:
        """Of `D @ D.T`, or of `D.T @ D` where that is smaller; in float64."""
        ...

    def squared_distance(self, left: "np.ndarray", right: "np.ndarray") -> float:
        """The squared Frobenius norm of `D - left @ right`, summed in float64."""
        ...

    def squared_norm(self) -> float:
        """The squared Frobenius norm, summed in float64."""
        ...


def _spans(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with about `_CHUNK` elements each."""
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


class HostMatrix:
    """A matrix that numpy multiplies."""

    def __init__(self, values: "np.ndarray") -> None:
        self.values = values
        self.shape: tuple[int, int] = values.shape

    def times(self, other: "np.ndarray") -> "np.ndarray":
        """`D @ other`."""
        return self.values @ other

    def transposed_times(self, other: "np.ndarray") -> "np.ndarray":
        """`D.T @ other`."""
        return self.values.T @ other

    def eigen(self) -> Eigen:
        """Of the smaller Gram matrix, summed over chunks in float64."""
        import numpy as np

        long = self.values if self.shape[0] >= self.shape[1] else self.values.T
        gram = np.zeros((long.shape[1],) * 2)
        for span in _spans(*long.shape):
            rows = long[span].astype(np.float64)
            gram += rows.T @ rows
        values, vectors = np.linalg.eigh(gram)
        return Eigen(values[::-1], vectors[:, ::-1])

    def squared_distance(self, left: "np.ndarray", right: "np.ndarray") -> float:
        """Of rows by rows."""
        return sum(_squared(self.values[span] - left[span] @ right) for span in _spans(*self.shape))

    def squared_norm(self) -> float:
        """Of rows by rows."""
        return sum(_squared(self.values[span]) for span in _spans(*self.shape))


def _squared(values: "np.ndarray") -> float:
    import numpy as np

    return float(np.square(values, dtype=np.float64).sum())


class DeviceMatrix:
    """A matrix on a device of torch."""

    def __init__(self, values: "np.ndarray", device: str) -> None:
        import torch

        self.values = torch.from_numpy(values).to(device)
        self.shape: tuple[int, int] = values.shape

    def _moved(self, other: "np.ndarray") -> "torch.Tensor":
        import torch

        return torch.from_numpy(other).to(self.values.device)

    def times(self, other: "np.ndarray") -> "np.ndarray":
        """`D @ other`."""
        return (self.values @ self._moved(other)).cpu().numpy()

    def transposed_times(self, other: "np.ndarray") -> "np.ndarray":
        """`D.T @ other`."""
        return (self.values.T @ self._moved(other)).cpu().numpy()

    def eigen(self) -> Eigen:
        """Of the smaller Gram matrix."""
        import torch

        long = (self.values if self.shape[0] >= self.shape[1] else self.values.T).double()
        values, vectors = torch.linalg.eigh(long.T @ long)
        return Eigen(values.flip(0).cpu().numpy(), vectors.flip(1).cpu().numpy())

    def squared_distance(self, left: "np.ndarray", right: "np.ndarray") -> float:
        """In one piece."""
        rest = self.values - self._moved(left) @ self._moved(right)
        return float(rest.double().square().sum())

    def squared_norm(self) -> float:
        """In one piece."""
        return float(self.values.double().square().sum())
