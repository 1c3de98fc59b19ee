"""Candidates for a gain: of every kind, for related donors alone, and all can be made."""

from collections import Counter
from itertools import combinations

import pytest
from conftest import resolved, write_donor
from relatives import aligned, noisy, opened

from frankenmerge.planning.candidates import (
    REPEATED,
    SCALES,
    WEIGHTS,
    Candidate,
    candidates,
    repeated_window,
    uniform_average,
    windows,
    with_weight,
)
from frankenmerge.planning.search import Constraints
from frankenmerge.workflows.gaining import parts_of

SAME_DEPTH = {"average", "exchange", "transition", "modules", "task arithmetic", "ties"}
DEEP = Constraints(6, protect_first=1, protect_last=1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    """A base and two donors that were fine-tuned from it, with the donors' alignment."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_donor(root / "base", request.param, seed=11)
    first, second = (
        noisy(base, root / name, 0.02, seed=seed) for seed, name in ((1, "x"), (2, "y"))
    )
    return base, first, second, aligned(first, second)


def kinds(found: list[Candidate]) -> set[str]:
    return {each.kind for each in found}


def depth_of(each: Candidate) -> int:
    return 4 if each.recipe.models else len(each.recipe.blocks)


def test_a_related_pair_has_every_kind_and_all_resolve(family):
    base, first, second, alignment = family
    donors = opened(first, second, base)
    parts = parts_of(donors, str(base))
    assert parts.blocks == {str(first): 4, str(second): 4}
    found = candidates([alignment], parts, DEEP, any_depth=True)
    assert kinds(found) == SAME_DEPTH | {"stack", "damped stack"}
    for each in found:
        splice = resolved(each.recipe, donors)
        assert len(splice.blocks) == depth_of(each), each
    assert len({each.recipe.key for each in found}) == len(found)
    count = Counter(each.kind for each in found)
    assert count["average"] == len(WEIGHTS)
    assert count["task arithmetic"] == len(SCALES)
    # Both donors begin: three places for one change, three pairs of places for two.
    assert count["exchange"] == 2 * (3 + 3)
    # Either module averaged, all else of either donor.
    assert count["modules"] == len(WEIGHTS) * 2 * 2


def test_without_a_known_base_nothing_is_added_to_one(family):
    _, first, second, alignment = family
    found = candidates([alignment], parts_of(opened(first, second), None), DEEP, any_depth=True)
    assert kinds(found) == SAME_DEPTH - {"task arithmetic", "ties"} | {"stack", "damped stack"}


def test_strangers_are_only_stacked(alignments, donors):
    for names in ("ab", ("a", "deep")):
        checkpoints = opened(*(donors[name] for name in names))
        pair = alignments["-".join(names)]
        parts = parts_of(checkpoints, None)
        depth = max(parts.blocks.values()) + 2
        found = candidates([pair], parts, Constraints(depth), any_depth=True)
        assert kinds(found) <= {"stack", "damped stack"} and found


def test_recipes_have_the_depth_that_is_asked_for(family):
    _, first, second, alignment = family
    parts = parts_of(opened(first, second), None)
    deeper = candidates([alignment], parts, DEEP)
    assert {depth_of(each) for each in deeper} == {6}
    assert kinds(deeper) == {"stack", "damped stack"}
    own = candidates([alignment], parts, Constraints(4))
    assert {depth_of(each) for each in own} == {4}
    assert SAME_DEPTH - {"task arithmetic", "ties"} <= kinds(own)
    up_to = candidates([alignment], parts, Constraints(5), any_depth=True)
    assert {depth_of(each) for each in up_to} == {4, 5}


def test_a_single_donor_repeats_every_window(donors):
    checkpoints = opened(donors["a"])
    ((name, checkpoint),) = checkpoints.items()
    alignment = aligned(donors["a"], donors["a"])
    found = candidates([alignment], parts_of(checkpoints, None), Constraints(6), any_depth=True)
    repeats = [each for each in found if each.kind == "repeat"]
    assert kinds(found) <= {"repeat", "stack", "damped stack"}
    expected = {
        tuple([*range(stop), *range(start, 4)]) for start, stop in combinations(range(5), 2)
    }
    stacks = [tuple(block.index for block in each.recipe.blocks) for each in repeats]
    assert (
        set(stacks) | {tuple(block.index for block in each.recipe.blocks) for each in found}
        >= expected
    )
    assert len(expected) == len(windows(checkpoint.blocks)) == 10
    # Stacks of the least damage may be windows too; each recipe is listed once.
    assert 10 * len(REPEATED) - len(found) <= len(repeats) <= 10 * len(REPEATED)
    for each in found:
        resolved(each.recipe, checkpoints)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_repeated_window_runs_twice_and_writes_less_the_second_time(donors, scale):
    writes = ("self_attn.o_proj", "mlp.down_proj")
    recipe = repeated_window(str(donors["a"]), 4, 1, 3, scale, writes)
    assert [block.index for block in recipe.blocks] == [0, 1, 2, 1, 2, 3]
    splice = resolved(recipe)
    scaled = {
        operation.name: operation.inputs[0].parameters["scale"]
        for operation in splice.operations
        if hasattr(operation, "inputs") and operation.inputs[0].parameters["scale"] != 1
    }
    expected = {f"model.layers.{at}.{name}.weight" for at in (3, 4) for name in writes}
    assert scaled == ({} if scale == 1 else dict.fromkeys(expected, scale))


def test_averages():
    even = uniform_average(["x", "y", "z"])
    assert even.models and [whole.parameters for whole in even.models] == [{"weight": 0.3333}] * 3
    moved = with_weight(uniform_average(["x", "y"]), 0.1234)
    assert moved.models
    assert [(each.model, each.parameters) for each in moved.models] == [
        ("x", {"weight": 0.877}),
        ("y", {"weight": 0.123}),
    ]
