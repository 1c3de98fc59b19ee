"""The k cheapest routes through the donors' blocks.

A route is a sequence of slices (donor, start, stop) from block 0 of a donor to the last block of a
donor. Dynamic programming computes the exact cost to go; a best-first enumeration (A*) then expands
only nodes of the k cheapest routes. Shares of donors are enforced in the enumeration alone. With
them the cost to go is a lower bound, so that the search stays exact and takes longer.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.errors import FrankenmergeError, fail

REQUIRED_LIMIT = 8
"""Number of blocks that may be required; each doubles the states of the search."""
STEP_LIMIT = 200_000
"""Nodes that are expanded before a search fails; only with shares of donors are there so many."""


@dataclass(frozen=True)
class Constraints:
    """The constraints of a plan. Donors have the alignments' names; the search numbers them."""

    depth: int
    """Number of blocks of the result."""
    max_seams: int = 4
    min_slice: int = 2
    """Minimum number of blocks of a slice."""
    protect_first: int = 1
    """Number of first blocks of a donor that stay together at the start of the result: no seam
    before or between them.
    """
    protect_last: int = 1
    """The same for a donor's last blocks, at the end of the result."""
    max_back: int | None = None
    """Maximum number of blocks that a seam may repeat."""
    required: frozenset[tuple[Any, int]] = frozenset()
    """Blocks (donor, index) that must be used, at most `REQUIRED_LIMIT`."""
    avoided: frozenset[tuple[Any, int]] = frozenset()
    """Blocks that must not be used."""
    shares: Mapping[Any, tuple[float, float]] = field(default_factory=dict)
    """For a donor, the minimum and maximum of its share of the result's blocks, from 0 to 1."""

    def as_json(self) -> dict[str, Any]:
        """The constraints that are set, as JSON."""
        blocks = {
            key: sorted([donor, block] for donor, block in getattr(self, key))
            for key in ("required", "avoided")
        }
        shares = {donor: list(share) for donor, share in self.shares.items()}
        values = vars(self) | blocks | {"shares": shares}
        return {key: value for key, value in values.items() if value not in (None, [], {})}


class Run(NamedTuple):
    """One slice of a route."""

    donor: int
    start: int
    stop: int


class Route(NamedTuple):
    """Slices from the first to the last block of a result, and the sum of their seams' costs."""

    cost: float
    runs: tuple[Run, ...]


class _State(NamedTuple):
    """Before a slice: blocks and seams left, donors and blocks used, and where the slice begins."""

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
    """For each donor and block, the bits that it sets in `_State.used`; -1 if it is avoided."""
    everything: int
    """`_State.used` when all donors and all required blocks are used."""


class _Node(NamedTuple):
    """The beginning of a route."""

    bound: float
    """Lower bound of the cost of all routes that begin like this."""
    order: int
    cost: float
    runs: tuple[Run, ...]
    state: _State | None
    """None if the route is complete."""


def cheapest_routes(
    lengths: list[int],
    costs: Mapping[tuple[int, int], np.ndarray],
    constraints: Constraints,
    *,
    most: int | None = None,
) -> Iterator[Route]:
    """Iterate over the routes that use every donor at least once, the cheapest first.

    Args:
        lengths: blocks of each donor.
        costs: for (donor left, donor entered) the seam costs `[l_left+1, l_entered+1]`; there are
            no seams for pairs that are absent.
        constraints: what every route must satisfy.
        most: maximum number of routes, which makes the search shorter; all routes if None.

    Raises:
        FrankenmergeError: if more blocks are required than `REQUIRED_LIMIT`, or if shares make the
            search longer than `STEP_LIMIT`.
    """
    problem = _problem(lengths, costs, constraints)
    return islice(_cheapest(problem, _cost_to_go(problem), most), most)


def cheapest_by_depth(
    lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints
) -> dict[int, Route]:
    """The cheapest route of every depth up to that of `constraints`, if there is one."""
    problem = _problem(lengths, costs, constraints)
    to_go = _cost_to_go(problem)  # for every number of blocks left, so for every depth
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
    """The best-first enumeration."""
    lengths, constraints = problem.lengths, problem.constraints
    # Without shares every node's bound is the cost of a distinct route, so that only the `most`
    # nodes with the smallest bounds are needed.
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
        if next(steps) > STEP_LIMIT:
            raise _too_long(constraints)
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


def _too_long(constraints: Constraints) -> FrankenmergeError:
    shares = ", ".join(
        f"{donor} {low:.0%} to {high:.0%}" for donor, (low, high) in constraints.shares.items()
    )
    return fail(
        "plan",
        f"plans of low cost with these shares: {shares}",
        f"none in {STEP_LIMIT:,} steps",
        "widen the shares",
    )


def _problem(
    lengths: list[int], costs: Mapping[tuple[int, int], np.ndarray], constraints: Constraints
) -> _Problem:
    if len(constraints.required) > REQUIRED_LIMIT:
        raise fail(
            "plan",
            f"at most {REQUIRED_LIMIT} required blocks",
            str(len(constraints.required)),
            "require fewer blocks",
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
    """Every slice that may begin at `state`, if the cost of the rest is at most `limit`.

    With each slice: the cost of the seam after it, the cheapest rest after that, and the next
    state, None at the end of the route.
    """
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
            total = matrix[stop] + rests
            for start in np.flatnonzero(np.isfinite(total) & (total <= limit + 1e-12)):
                yield (
                    run,
                    float(matrix[stop, start]),
                    float(rests[start]),
                    _State(left, state.seams - 1, used, entered, int(start)),
                )


def _keeps_shares(problem: _Problem, runs: tuple[Run, ...], left: int) -> bool:
    """Whether every donor's share is still possible with `left` blocks to come."""
    depth = problem.constraints.depth
    for donor, (low, high) in problem.constraints.shares.items():
        taken = sum(run.stop - run.start for run in runs if run.donor == donor)
        if taken > high * depth + 1e-9 or taken + left < low * depth - 1e-9:
            return False
    return True


def _allowed(costs: np.ndarray, pair: tuple[int, int], constraints: Constraints) -> np.ndarray:
    """The costs with infinity for forbidden seams.

    Forbidden are seams between protected blocks, before a first or after a last block of the
    result, too far back, and from a block to its successor in the same donor.
    """
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
    """The cheapest rest at the start of a slice, `[blocks left, seams left, used, donor, start]`.

    It is exact except for shares. Computed for every number of blocks left, from 0 upwards: a slice
    of at least the minimum length ends, or continues by one block.
    """
    donors, constraints = len(problem.lengths), problem.constraints
    shape = (
        constraints.depth + 1,
        constraints.max_seams + 1,
        problem.everything + 1,
        donors,
        max(problem.lengths) + 1,
    )
    # Within a slice of at least the minimum length, by the number of its donor's blocks so far.
    within = np.full(shape, np.inf)
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
    """The cheapest rest before one more block, given that after it, `[seams, used, block]`."""
    bits, before = problem.bits[donor], np.full_like(rest, np.inf)
    allowed = np.flatnonzero(bits >= 0)
    used = np.arange(rest.shape[1])[:, None] | bits[allowed]
    before[:, :, allowed] = rest[:, used, allowed + 1]
    return before
