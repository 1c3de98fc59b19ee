"""The k cheapest ways through the donors' blocks: exact dynamic programming, then best-first enumeration.

A path is a sequence of slices (donor, start, stop) that begins at a donor's block 0 and ends with a donor's last block.
`cost_to_go` is exact, so the enumeration (A*) expands only what belongs to one of the k cheapest paths.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep to."""

    depth: int
    """Blocks of the result."""
    max_seams: int = 4
    min_slice: int = 2
    """Fewest blocks of a slice."""
    protect_first: int = 1
    """Blocks at a donor's beginning that stay together at the beginning: no seam before or among them."""
    protect_last: int = 1
    """Likewise at a donor's end."""


class Piece(NamedTuple):
    """One slice of a path."""

    donor: int
    start: int
    stop: int


class Path(NamedTuple):
    """One way through the blocks, and the sum of its seams' costs."""

    cost: float
    pieces: tuple[Piece, ...]


class _State(NamedTuple):
    """About to begin a slice: blocks and seams left, donors used, where it begins."""

    blocks: int
    seams: int
    used: int
    donor: int
    start: int


class _Problem(NamedTuple):
    lengths: list[int]
    costs: Mapping[tuple[int, int], np.ndarray]
    constraints: Constraints
    to_go: np.ndarray
    """The cheapest rest when beginning a slice, `[blocks left, seams left, donors used, donor, start]`."""


def cheapest_paths(lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints) -> Iterator[Path]:
    """Yield paths that use every donor at least once, the cheapest first.

    Args:
        lengths: blocks of each donor.
        costs: for (donor left, donor entered) the seam costs `[l_left+1, l_entered+1]`; pairs that are absent are not used.
        constraints: what every path keeps to.
    """
    costs = {pair: _allowed(matrix, pair, constraints) for pair, matrix in costs.items()}
    problem = _Problem(lengths, costs, constraints, _cost_to_go(lengths, costs, constraints))
    order = count()
    heap: list[tuple[float, int, float, tuple[Piece, ...], _State | None]] = []
    for donor in range(len(lengths)):
        state = _State(constraints.depth, constraints.max_seams, 1 << donor, donor, 0)
        if np.isfinite(rest := problem.to_go[state]):
            heapq.heappush(heap, (float(rest), next(order), 0.0, (), state))
    while heap:
        _, _, cost, pieces, state = heapq.heappop(heap)
        if state is None:
            yield Path(cost, pieces)
            continue
        for piece, step, rest, follower in _continuations(problem, state):
            heapq.heappush(heap, (cost + step + rest, next(order), cost + step, (*pieces, piece), follower))


def _continuations(problem: _Problem, state: _State) -> Iterator[tuple[Piece, float, float, _State | None]]:
    """Every slice that may begin at `state`, with its seam's cost, the cheapest rest, and what comes after it."""
    length = problem.lengths[state.donor]
    for stop in range(state.start + problem.constraints.min_slice, min(length, state.start + state.blocks) + 1):
        piece = Piece(state.donor, state.start, stop)
        left = state.blocks - (stop - state.start)
        if left == 0:
            if stop == length and state.used == problem.to_go.shape[2] - 1:
                yield piece, 0.0, 0.0, None
            continue
        if state.seams == 0:
            continue
        for (source, entered), matrix in problem.costs.items():
            if source != state.donor:
                continue
            used = state.used | 1 << entered
            rests = problem.to_go[left, state.seams - 1, used, entered, : matrix.shape[1]]
            for start in np.flatnonzero(np.isfinite(matrix[stop] + rests)):
                follower = _State(left, state.seams - 1, used, entered, int(start))
                yield piece, float(matrix[stop, start]), float(rests[start]), follower


def _allowed(costs: np.ndarray, pair: tuple[int, int], constraints: Constraints) -> np.ndarray:
    """Forbid seams among protected blocks, those after no block or before none, and those that are none."""
    left, entered = np.indices(costs.shape)
    first, last = constraints.protect_first, constraints.protect_last
    inside = (left >= max(1, first)) & (entered >= first)
    inside &= (left <= costs.shape[0] - 1 - last) & (entered <= costs.shape[1] - 1 - max(1, last))
    if pair[0] == pair[1]:
        inside &= left != entered
    return np.where(inside, costs, np.inf)


def _cost_to_go(lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints) -> np.ndarray:
    """Fill `_Problem.to_go` for every number of blocks left, from one upwards."""
    donors, longest, depth = len(lengths), max(lengths), constraints.depth
    shape = (depth + 1, constraints.max_seams + 1, 1 << donors, donors, longest + 1)
    leaving = np.full(shape, np.inf)  # likewise, when leaving a donor after so many of its blocks
    starting = np.full(shape, np.inf)
    for blocks in range(1, depth + 1):
        for donor, length in enumerate(lengths):
            for taken in range(constraints.min_slice, min(length, blocks) + 1):
                best = starting[blocks, :, :, donor, : length + 1 - taken]
                np.minimum(best, leaving[blocks - taken, :, :, donor, taken : length + 1], out=best)
            if constraints.min_slice <= blocks <= length:
                starting[blocks, :, -1, donor, length - blocks] = 0.0
        for (left, entered), cost in costs.items():
            for used in range(1 << donors):
                rest = starting[blocks, :-1, used | 1 << entered, entered, : lengths[entered] + 1]
                target = leaving[blocks, 1:, used, left, : lengths[left] + 1]
                np.minimum(target, (cost[None] + rest[:, None, :]).min(axis=2), out=target)
    return starting
