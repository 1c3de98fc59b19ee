"""The search for cheapest routes, compared with an enumeration of all of them."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmerge.planning.search import Constraints, Route, Run, cheapest_routes


def respects(
    runs: tuple[Run, ...], lengths: list[int], pairs: set, constraints: Constraints
) -> bool:
    """Whether a route satisfies its constraints, checked block by block."""
    c = constraints
    slices = [[(donor, block) for block in range(start, stop)] for donor, start, stop in runs]
    blocks = [block for part in slices for block in part]
    for (donor, start, stop), part in zip(runs, slices, strict=True):
        if not 0 <= start < stop <= lengths[donor] or len(part) < c.min_slice:
            return False
    if len(blocks) != c.depth or len(slices) - 1 > c.max_seams:
        return False
    if (
        blocks[0][1] != 0
        or blocks[-1][1] != lengths[blocks[-1][0]] - 1
        or {donor for donor, _ in blocks} != set(range(len(lengths)))
    ):
        return False
    for before, after in zip(slices, slices[1:], strict=False):
        (left, last), (entered, first) = before[-1], after[0]
        if (left, entered) not in pairs or (left == entered and first == last + 1):
            return False
        # Protected blocks: none is left out or cut off at a donor's beginning, where a slice
        # starts, nor at its end.
        if last + 1 < c.protect_first or first < c.protect_first:
            return False
        if last >= lengths[left] - c.protect_last or first > lengths[entered] - c.protect_last:
            return False
    return True


def all_paths(
    lengths: list[int], pairs: set, constraints: Constraints
) -> Iterator[tuple[Run, ...]]:
    """All sequences of slices of the right depth, filtered by the constraints."""
    every = [
        Run(d, start, stop)
        for d, length in enumerate(lengths)
        for start in range(length)
        for stop in range(start + 1, length + 1)
    ]

    def grown(runs: tuple[Run, ...], left: int) -> Iterator[tuple[Run, ...]]:
        if left == 0:
            yield runs
        elif len(runs) <= constraints.max_seams:
            for run in every:
                if run.stop - run.start <= left and (
                    not runs or (runs[-1].donor, run.donor) in pairs
                ):
                    yield from grown((*runs, run), left - (run.stop - run.start))

    return (
        runs for runs in grown((), constraints.depth) if respects(runs, lengths, pairs, constraints)
    )


def cost_of(runs: tuple[Run, ...], costs: dict) -> float:
    return sum(
        costs[a.donor, b.donor][a.stop, b.start] for a, b in zip(runs, runs[1:], strict=False)
    )


@st.composite
def problems(draw):
    donors = draw(st.integers(2, 3))
    lengths = draw(
        st.lists(st.integers(2, 5 if donors == 2 else 4), min_size=donors, max_size=donors)
    )
    across = [(a, b) for a in range(donors) for b in range(donors) if a != b]
    missing = draw(st.lists(st.sampled_from(across), max_size=1))
    within = draw(st.lists(st.integers(0, donors - 1), max_size=2, unique=True))
    pairs = [pair for pair in across if pair not in missing] + [(donor, donor) for donor in within]
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([2, 5, None]))  # few levels make many ties

    def matrix(a, b):
        shape = lengths[a] + 1, lengths[b] + 1
        return (
            generator.random(shape)
            if levels is None
            else generator.integers(0, levels, shape).astype(float)
        )

    constraints = Constraints(
        depth=draw(st.integers(max(lengths), min(8, sum(lengths)))),
        max_seams=draw(st.integers(donors - 1, 3)),
        min_slice=draw(st.integers(1, 2)),
        protect_first=draw(st.integers(0, min(lengths) // 2)),
        protect_last=draw(st.integers(0, min(lengths) // 2)),
    )
    return lengths, {pair: matrix(*pair) for pair in pairs}, constraints


@settings(max_examples=100, deadline=None)
@given(problems())
def test_all_paths_are_found_the_cheapest_first(problem):
    lengths, costs, constraints = problem
    expected = {runs: cost_of(runs, costs) for runs in all_paths(lengths, set(costs), constraints)}
    found = list(cheapest_routes(lengths, costs, constraints))
    assert len(found) == len({route.runs for route in found})
    assert {route.runs for route in found} == set(expected)
    assert [route.cost for route in found] == pytest.approx(sorted(expected.values()), abs=1e-9)
    assert [route.cost for route in found] == pytest.approx(
        [expected[route.runs] for route in found], abs=1e-9
    )


def both_ways(lengths: list[int], seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    there = generator.random((lengths[0] + 1, lengths[1] + 1))
    return {(0, 1): there, (1, 0): there.T}


def test_the_first_paths_are_those_of_a_longer_list():
    costs, constraints = both_ways([5, 5]), Constraints(8, 4, 1)
    everything = list(cheapest_routes([5, 5], costs, constraints))
    assert len(everything) > 100
    for count in (1, 2, 16):
        assert (
            list(islice(cheapest_routes([5, 5], costs, constraints), count)) == everything[:count]
        )


def test_a_single_seam_goes_where_it_costs_least():
    costs = np.ones((5, 5))
    costs[3, 2] = 0.25
    found = next(cheapest_routes([4, 4], {(0, 1): costs}, Constraints(5, 1, 1)))
    assert found == Route(0.25, (Run(0, 0, 3), Run(1, 2, 4)))


def test_the_planner_s_defaults_leave_first_and_last_blocks_alone():
    for route in cheapest_routes([4, 4], both_ways([4, 4]), Constraints(8)):
        blocks = [
            (donor, block) for donor, start, stop in route.runs for block in range(start, stop)
        ]
        assert (
            [block for _, block in blocks].count(0) == [block for _, block in blocks].count(3) == 1
        )
        assert blocks[0][1] == 0 and blocks[-1][1] == 3


@pytest.mark.parametrize("first, last", [(0, 0), (1, 1), (2, 0), (0, 2), (2, 2), (3, 1)])
def test_no_seam_lies_before_among_or_behind_protected_blocks(first, last):
    lengths = [6, 5]
    costs = both_ways(lengths) | {(0, 0): np.ones((7, 7)), (1, 1): np.ones((6, 6))}
    constraints = Constraints(9, 3, 1, first, last)
    found = list(cheapest_routes(lengths, costs, constraints))
    assert found
    for route in found:
        assert respects(route.runs, lengths, set(costs), constraints)
        inner = route.runs[1:-1]
        assert all(run.start >= first and run.stop <= lengths[run.donor] - last for run in inner)


def test_protecting_more_only_takes_paths_away():
    lengths, costs = [6, 6], both_ways([6, 6])
    found = [
        {route.runs for route in cheapest_routes(lengths, costs, Constraints(9, 3, 2, n, n))}
        for n in range(4)
    ]
    assert found[0] > found[1] > found[2] > found[3]


def test_without_protection_a_path_may_begin_anew():
    routes = cheapest_routes([3, 3], {(0, 1): np.zeros((4, 4))}, Constraints(6, 1, 1, 0, 0))
    assert [route.runs for route in routes] == [(Run(0, 0, 3), Run(1, 0, 3))]


def test_a_donor_s_own_blocks_may_repeat_but_not_merely_go_on():
    constraints = Constraints(6, 2, 1, 1, 1)
    found = {route.runs for route in cheapest_routes([4], {(0, 0): np.zeros((5, 5))}, constraints)}
    assert (Run(0, 0, 3), Run(0, 1, 4)) in found
    assert not any(
        a.stop == b.start for runs in found for a, b in zip(runs, runs[1:], strict=False)
    )


def test_a_donor_is_left_whole_where_its_depth_is_asked_for():
    found = list(cheapest_routes([4], {(0, 0): np.ones((5, 5))}, Constraints(4, 2, 2)))
    assert found[0] == Route(0, (Run(0, 0, 4),))


def test_every_donor_is_used():
    generator = np.random.default_rng(0)
    costs = {(a, b): generator.random((5, 5)) for a in range(3) for b in range(3) if a != b}
    costs[0, 1][:] = costs[1, 0][:] = 0.0  # two of them fit perfectly, the third does not
    costs[1, 2] += 10
    costs[0, 2] += 10
    found = list(islice(cheapest_routes([4, 4, 4], costs, Constraints(8, 3)), 20))
    assert len(found) == 20
    assert all({run.donor for run in route.runs} == {0, 1, 2} for route in found)


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(1),
        Constraints(3),
        Constraints(13, 2),
        Constraints(8, 0),
        Constraints(8, 4, 4),
        Constraints(8, 4, 2, 5, 5),
    ],
)
def test_what_cannot_be_kept_to_yields_nothing(constraints):
    assert list(cheapest_routes([4, 4], both_ways([4, 4]), constraints)) == []


def test_seams_of_infinite_cost_are_never_taken():
    costs = {(0, 1): np.full((5, 5), np.inf)}
    assert list(cheapest_routes([4, 4], costs, Constraints(5, 1, 1))) == []
    costs[0, 1][2, 1] = 3.0
    assert [route.runs for route in cheapest_routes([4, 4], costs, Constraints(5, 1, 1))] == [
        (Run(0, 0, 2), Run(1, 1, 4))
    ]


def test_the_costs_given_are_left_as_they_were():
    costs = both_ways([4, 4])
    before = {pair: matrix.copy() for pair, matrix in costs.items()}
    list(cheapest_routes([4, 4], costs, Constraints(6)))
    assert all((costs[pair] == matrix).all() for pair, matrix in before.items())


def test_a_pair_of_eighty_blocks_is_planned():
    lengths, constraints = [80, 80], Constraints(120, 4, 4, 8, 8)
    costs = both_ways(lengths)
    found = list(islice(cheapest_routes(lengths, costs, constraints), 16))
    assert len({route.runs for route in found}) == 16
    assert [route.cost for route in found] == sorted(route.cost for route in found)
    for route in found:
        assert respects(route.runs, lengths, set(costs), constraints)
        assert route.cost == pytest.approx(cost_of(route.runs, costs))


def test_the_cheapest_of_eighty_blocks_with_one_seam_is_the_smallest_entry():
    costs, constraints = both_ways([80, 80]), Constraints(100, 1, 1, 8, 8)
    possible = {
        cost_of((Run(a, 0, i), Run(1 - a, i - 20, 80)), costs): (a, i)
        for a in (0, 1)
        for i in range(8, 73)
        if 8 <= i - 20 <= 72
    }
    route = next(cheapest_routes([80, 80], costs, constraints))
    assert route.cost == min(possible)
    assert (route.runs[0].donor, route.runs[0].stop) == possible[route.cost]
