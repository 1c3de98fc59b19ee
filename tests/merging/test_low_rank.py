"""Low-rank approximations compared with numpy's singular value decomposition in float64."""

import math

import numpy as np
import pytest
import torch

from frankenmerge.merging.low_rank import Goal, approximation, relative_error
from frankenmerge.merging.matrices import DeviceMatrix, HostMatrix

RANDOM = np.random.default_rng(3)


def low_rank_and_noise(rows: int, columns: int, rank: int, noise: float) -> np.ndarray:
    product = RANDOM.standard_normal((rows, rank)) @ RANDOM.standard_normal((rank, columns))
    return (product + noise * RANDOM.standard_normal((rows, columns))).astype(np.float32)


def decaying(rows: int, columns: int) -> np.ndarray:
    left = np.linalg.qr(RANDOM.standard_normal((rows, min(rows, columns))))[0]
    right = np.linalg.qr(RANDOM.standard_normal((columns, min(rows, columns))))[0]
    sizes = 1 / np.arange(1, left.shape[1] + 1)
    return (left * sizes @ right.T).astype(np.float32)


MATRICES = {
    "tall": RANDOM.standard_normal((70, 20)).astype(np.float32),
    "wide": RANDOM.standard_normal((20, 70)).astype(np.float32),
    "exact rank": low_rank_and_noise(40, 60, 5, 0.0),
    "large, low rank": low_rank_and_noise(500, 300, 8, 0.3),
    "large, decaying": decaying(300, 500),
    "large, white": RANDOM.standard_normal((300, 400)).astype(np.float32),
}
LARGE = [name for name in MATRICES if name.startswith("large")]


def left_out(matrix: np.ndarray) -> np.ndarray:
    """The smallest share of the squared norm that each rank leaves out, from rank 0."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum()


def smallest(matrix: np.ndarray, allowed: float) -> int:
    return int(np.argmax(left_out(matrix) <= allowed + 1e-12))


def distance(matrix: np.ndarray, found) -> float:
    rest = matrix.astype(np.float64) - found.left.astype(np.float64) @ found.right
    return float(np.linalg.norm(rest) / np.linalg.norm(matrix.astype(np.float64)))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_a_rank_gives_the_optimum_of_eckart_and_young(name, rank):
    matrix = MATRICES[name]
    found = approximation(HostMatrix(matrix), Goal(rank), (0,))
    assert found.left.shape == (len(matrix), rank) and found.right.shape == (rank, matrix.shape[1])
    best = math.sqrt(left_out(matrix)[rank])
    # A sampled subspace is slightly worse where the next singular values are as large: noise.
    above = 1e-2 if name in LARGE else 1e-6
    assert best - 1e-6 <= distance(matrix, found) <= best * (1 + above) + 1e-6


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_share_gives_the_smallest_rank_that_keeps_it(name, share):
    matrix = MATRICES[name]
    found = approximation(HostMatrix(matrix), Goal(left_out=1 - share), (0,))
    assert found.rank == smallest(matrix, 1 - share)
    assert distance(matrix, found) <= math.sqrt(1 - share) + 1e-5


def test_all_of_a_matrix_of_low_rank_needs_its_rank_alone():
    found = approximation(HostMatrix(MATRICES["exact rank"]), Goal(left_out=0.0), (0,))
    assert found.rank == 5
    assert distance(MATRICES["exact rank"], found) < 1e-6


def test_a_rank_above_the_matrix_is_its_own():
    found = approximation(HostMatrix(MATRICES["tall"]), Goal(64), (0,))
    assert found.rank == 20
    assert distance(MATRICES["tall"], found) < 1e-6


@pytest.mark.parametrize("name", MATRICES)
def test_the_error_is_that_of_the_factors(name):
    matrix = MATRICES[name]
    found = approximation(HostMatrix(matrix), Goal(4), (0,))
    rough = found._replace(left=found.left.astype(np.float16).astype(np.float32))
    for factors in (found, rough):
        error = relative_error(HostMatrix(matrix), factors.left, factors.right)
        assert error == pytest.approx(distance(matrix, factors), rel=1e-6, abs=1e-8)


def test_both_factors_have_the_same_scale():
    found = approximation(HostMatrix(MATRICES["tall"]), Goal(8), (0,))
    assert np.linalg.norm(found.left, axis=0) == pytest.approx(
        np.linalg.norm(found.right, axis=1), rel=1e-4
    )


@pytest.mark.parametrize("name", LARGE)
def test_a_seed_decides_the_bytes(name):
    one, same, other = (
        approximation(HostMatrix(MATRICES[name]), Goal(8), (seed,)) for seed in (0, 0, 1)
    )
    assert np.array_equal(one.left, same.left) and np.array_equal(one.right, same.right)
    assert not np.array_equal(one.left, other.left)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("goal", [Goal(6), Goal(left_out=0.2)])
def test_a_device_of_torch_gives_the_same_product(name, goal):
    matrix = MATRICES[name]
    host, device = HostMatrix(matrix), DeviceMatrix(matrix, "cpu")
    one, two = (approximation(each, goal, (0,)) for each in (host, device))
    assert one.rank == two.rank
    np.testing.assert_allclose(one.left @ one.right, two.left @ two.right, atol=2e-4)
    assert device.squared_norm() == pytest.approx(host.squared_norm())
    error = relative_error(device, two.left, two.right)
    assert error == pytest.approx(distance(matrix, two), rel=1e-6, abs=1e-7)


def test_torchs_decomposition_agrees():
    matrix = MATRICES["wide"]
    left, sizes, right = torch.linalg.svd(torch.from_numpy(matrix).double(), full_matrices=False)
    best = (left[:, :5] * sizes[:5] @ right[:5]).numpy()
    found = approximation(HostMatrix(matrix), Goal(5), (0,))
    np.testing.assert_allclose(found.left @ found.right, best, atol=1e-5)
