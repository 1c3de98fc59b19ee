"""The k cheapest ways through the donors' blocks: exact dynamic programming, then best-first enumeration.

A route is a sequence of slices (donor, start, stop) that begins at a donor's block 0 and ends with a
donor's last block. The cost to go is exact, so the enumeration (A*) expands only what belongs to
one of the k cheapest routes; shares of donors are kept to in the enumeration alone, for which the
cost to go is a lower bound, so that it stays exact and takes longer.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.errors import fail

MOST_REQUIRED = 8
"""Blocks that may be required: the states of the search double with every one."""
MOST_STEPS = 200_000
"""Slices that are looked at before a search gives up; only shares of donors can take so many."""


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep to. Donors are named as in the alignments; the search itself numbers them."""

    depth: int
    """Blocks of the result."""
    max_seams: int = 4
    min_slice: int = 2
    """Fewest blocks of a slice."""
    protect_first: int = 1
    """Blocks at a donor's beginning that stay together at the beginning: no seam before or among
    them.
    """
    protect_last: int = 1
    """Likewise at a donor's end."""
    max_back: int | None = None
    """Most blocks that are gone through again at one seam."""
    required: frozenset[tuple[Any, int]] = frozenset()
    """Blocks (donor, index) that must be used, `MOST_REQUIRED` at most."""
    avoided: frozenset[tuple[Any, int]] = frozenset()
    """Blocks that must not be used."""
    shares: Mapping[Any, tuple[float, float]] = field(default_factory=dict)
    """By donor, the least and the largest part of the result's blocks that may be its own, from 0
    to 1.
    """

    def as_json(self) -> dict[str, Any]:
        """The constraints that are set, as JSON."""
        blocks = {
            key: sorted([donor, block] for donor, block in getattr(self, key))
            for key in ("required", "avoided")
        }
        told = (
            vars(self)
            | blocks
            | {"shares": {donor: list(share) for donor, share in self.shares.items()}}
        )
        return {key: value for key, value in told.items() if value not in (None, [], {})}


class Run(NamedTuple):
    """One slice of a route."""

    donor: int
    start: int
    stop: int


class Route(NamedTuple):
    """One way through the blocks, and the sum of its seams' costs."""

    cost: float
    runs: tuple[Run, ...]


class _State(NamedTuple):
    """About to begin a slice: blocks and seams left, what was used, the donor, where it begins."""

    blocks: int
    seams: int
    used: int
    """One bit for every donor, then one for every required block."""
    donor: int
    start: int


class _Problem(NamedTuple):
    lengths: list[int]
    costs: Mapping[tuple[int, int], np.ndarray]
    constraints: Constraints
    bits: list[np.ndarray]
    """By donor and block: what using it adds to `_State.used`; -1 for a block that must not be
    used.
    """
    everything: int
    """`_State.used` when all is used that must be."""


class _Node(NamedTuple):
    """Part of a route."""

    bound: float
    """The least that a route which begins so can cost."""
    order: int
    cost: float
    runs: tuple[Run, ...]
    state: _State | None
    """None when the route is whole."""


def cheapest_routes(
    lengths: list[int],
    costs: Mapping[tuple[int, int], np.ndarray],
    constraints: Constraints,
    *,
    most: int | None = None,
) -> Iterator[Route]:
    """Give routes that use every donor at least once, the cheapest first.

    Args:
        lengths: blocks of each donor.
        costs: for (donor left, donor entered) the seam costs `[l_left+1, l_entered+1]`; pairs that
            are absent are not used.
        constraints: what every route keeps to.
        most: how many are wanted, which spares looking at others; all that there are without it.

    Raises:
        FrankenmergeError: when more blocks are required than the search can keep in mind, or shares
            make it too long.
    """
    problem = _problem(lengths, costs, constraints)
    return islice(_cheapest(problem, _cost_to_go(problem), most), most)


def cheapest_by_depth(
    lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints
) -> dict[int, Route]:
    """The cheapest route of every depth up to the one that is asked for, where there is one."""
    problem = _problem(lengths, costs, constraints)
    to_go = _cost_to_go(problem)  # of every number of blocks left, so of every depth
    depths = range(1, constraints.depth + 1)
    first = {
        depth: next(
            _cheapest(problem._replace(constraints=replace(constraints, depth=depth)), to_go, 1),
            None,
        )
        for depth in depths
    }
    return {depth: route for depth, route in first.items() if route}


def _cheapest(problem: _Problem, to_go: np.ndarray, most: int | None) -> Iterator[Route]:
    """The enumeration, best first."""
    lengths, constraints = problem.lengths, problem.constraints
    # Without shares every node's bound is the cost of a route of its own: beyond the `most` least of
    # them nothing is wanted.
    kept, limit = None if constraints.shares else most, np.inf
    order, steps = count(), count()
    heap: list[_Node] = []
    for donor in range(len(lengths)):
        state = _State(constraints.depth, constraints.max_seams, 0, donor, 0)
        if np.isfinite(rest := to_go[state]):
            heapq.heappush(heap, _Node(float(rest), next(order), 0.0, (), state))
    while heap:
        node = heapq.heappop(heap)
        if node.state is None:
            yield Route(node.cost, node.runs)
            continue
        if next(steps) > MOST_STEPS:
            told = ", ".join(
                f"{donor} {low:.0%} to {high:.0%}"
                for donor, (low, high) in constraints.shares.items()
            )
            raise fail(
                "plan",
                f"shares that good plans can keep to: {told}",
                f"none in {MOST_STEPS:,} steps",
                "widen the shares",
            )
        for run, step, rest, follower in _continuations(
            problem, to_go, node.state, limit - node.cost
        ):
            runs = (*node.runs, run)
            if _keeps_shares(problem, runs, 0 if follower is None else follower.blocks):
                heapq.heappush(
                    heap,
                    _Node(node.cost + step + rest, next(order), node.cost + step, runs, follower),
                )
        if kept and len(heap) > 4 * kept:
            heap = heapq.nsmallest(kept, heap)  # sorted, and so a heap
            limit = heap[-1].bound


def _problem(
    lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints
) -> _Problem:
    if len(constraints.required) > MOST_REQUIRED:
        raise fail(
            "plan",
            f"at most {MOST_REQUIRED} required blocks",
            str(len(constraints.required)),
            "require fewer; seams move little",
        )
    bits = [np.full(length, 1 << donor) for donor, length in enumerate(lengths)]
    for number, (donor, block) in enumerate(sorted(constraints.required), len(lengths)):
        bits[donor][block] |= 1 << number
    for donor, block in constraints.avoided:
        bits[donor][block] = -1
    everything = (1 << len(lengths) + len(constraints.required)) - 1
    allowed = {pair: _allowed(matrix, pair, constraints) for pair, matrix in costs.items()}
    return _Problem(lengths, allowed, constraints, bits, everything)


def _continuations(
    problem: _Problem, to_go: np.ndarray, state: _State, limit: float
) -> Iterator[tuple[Run, float, float, _State | None]]:
    """Every slice that may begin at `state`, with its seam's cost, the cheapest rest, and what comes after it; no more than `limit`."""
    length, used = problem.lengths[state.donor], state.used
    for stop in range(state.start + 1, min(length, state.start + state.blocks) + 1):
        if (bit := int(problem.bits[state.donor][stop - 1])) < 0:
            return
        used |= bit
        run, left = Run(state.donor, state.start, stop), state.blocks - (stop - state.start)
        if stop - state.start < problem.constraints.min_slice:
            continue
        if left == 0:
            if stop == length and used == problem.everything:
                yield run, 0.0, 0.0, None
            continue
        if state.seams == 0:
            continue
        for (source, entered), matrix in problem.costs.items():
            if source != state.donor:
                continue
            rests = to_go[left, state.seams - 1, used, entered, : matrix.shape[1]]
            whole = matrix[stop] + rests
            for start in np.flatnonzero(np.isfinite(whole) & (whole <= limit + 1e-12)):
                yield (
                    run,
                    float(matrix[stop, start]),
                    float(rests[start]),
                    _State(left, state.seams - 1, used, entered, int(start)),
                )


def _keeps_shares(problem: _Problem, runs: tuple[Run, ...], left: int) -> bool:
    """Whether every donor's share can still be kept to when `left` blocks are to come."""
    depth = problem.constraints.depth
    for donor, (low, high) in problem.constraints.shares.items():
        taken = sum(run.stop - run.start for run in runs if run.donor == donor)
        if taken > high * depth + 1e-9 or taken + left < low * depth - 1e-9:
            return False
    return True


def _allowed(costs: np.ndarray, pair: tuple[int, int], constraints: Constraints) -> np.ndarray:
    """Forbid seams among protected blocks, those after no block or before none, those too far back, and those that are none."""
    left, entered = np.indices(costs.shape)
    first, last = constraints.protect_first, constraints.protect_last
    inside = (left >= max(1, first)) & (entered >= first)
    inside &= (left <= costs.shape[0] - 1 - last) & (entered <= costs.shape[1] - 1 - max(1, last))
    if constraints.max_back is not None:
        inside &= left - entered <= constraints.max_back
    if pair[0] == pair[1]:
        inside &= left != entered
    return np.where(inside, costs, np.inf)


def _cost_to_go(problem: _Problem) -> np.ndarray:
    """The cheapest rest when beginning a slice, `[blocks left, seams left, used, donor, start]`: exact but for shares.

    Block by block, for every number of blocks left from none upwards: a slice that is long enough
    is left, or goes on by a block.
    """
    donors, constraints = len(problem.lengths), problem.constraints
    shape = (
        constraints.depth + 1,
        constraints.max_seams + 1,
        problem.everything + 1,
        donors,
        max(problem.lengths) + 1,
    )
    within = np.full(
        shape, np.inf
    )  # in a slice that is long enough, behind so many of its donor's blocks
    starting = np.full(shape, np.inf)
    within[0, :, -1, range(donors), problem.lengths] = 0.0
    for blocks in range(1, constraints.depth + 1):
        for donor in range(donors):
            if blocks >= constraints.min_slice:
                rest = within[blocks - constraints.min_slice, :, :, donor]
                for _ in range(constraints.min_slice):
                    rest = _one_more(problem, donor, rest)
                starting[blocks, :, :, donor] = rest
        for (left, entered), cost in problem.costs.items():
            rest = starting[blocks, :-1, :, entered, : cost.shape[1]]
            target = within[blocks, 1:, :, left, : cost.shape[0]]
            np.minimum(target, (cost + rest[:, :, None]).min(axis=3), out=target)
        for donor in range(donors):
            target = within[blocks, :, :, donor]
            np.minimum(
                target, _one_more(problem, donor, within[blocks - 1, :, :, donor]), out=target
            )
    return starting


def _one_more(problem: _Problem, donor: int, rest: np.ndarray) -> np.ndarray:
    """From the cheapest rest behind a donor's blocks `[seams, used, place]` that before taking one more of them."""
    bits, taken = problem.bits[donor], np.full_like(rest, np.inf)
    places = np.flatnonzero(bits >= 0)
    used = np.arange(rest.shape[1])[:, None] | bits[places]
    taken[:, :, places] = rest[:, used, places + 1]
    return taken
