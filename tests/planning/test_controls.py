"""Baseline recipes: of the given depth, within their donors, and deterministic."""

import pytest

from frankenmerge.artefacts.recipe import Block
from frankenmerge.planning.controls import (
    goliath,
    naive_interleave,
    random_recipe,
    solar,
    uniform_repetition,
)

PAIR = {"a": 8, "b": 8}


def assert_within(recipe, donors) -> None:
    for source in recipe.sources:
        start, stop = source.layer_range
        assert 0 <= start < stop <= donors[source.model]


def assert_begins_and_ends_like_a_donor(recipe, donors) -> None:
    assert recipe.blocks[0].index == 0
    assert recipe.blocks[-1].index == donors[recipe.blocks[-1].model] - 1


def test_the_naive_interleave_of_eight_and_eight_to_twelve():
    # position * 8 // 12 for positions 0..11, donors in turn
    indices = [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    expected = [Block("ab"[position % 2], index) for position, index in enumerate(indices)]
    assert naive_interleave(PAIR, 12).blocks == expected


def test_the_naive_interleave_at_a_donor_s_own_depth_keeps_every_place():
    assert naive_interleave(PAIR, 8).blocks == [Block("ab"[index % 2], index) for index in range(8)]


def test_the_naive_interleave_of_unequal_donors_keeps_relative_depth():
    blocks = naive_interleave({"a": 4, "b": 8}, 8).blocks
    assert blocks == [
        Block("ab"[place % 2], index) for place, index in enumerate([0, 1, 1, 3, 2, 5, 3, 7])
    ]


@pytest.mark.parametrize("donors", [{"a": 8, "b": 8}, {"a": 4, "b": 7}, {"a": 5, "b": 6, "c": 9}])
@pytest.mark.parametrize("depth", [2, 5, 8, 12, 13, 24])
def test_the_naive_interleave_has_the_depth_and_stays_within(donors, depth):
    recipe = naive_interleave(donors, depth)
    assert len(recipe.blocks) == depth
    assert_within(recipe, donors)
    assert [block.model for block in recipe.blocks[: len(donors)]] == list(donors)[:depth]


def test_goliath_of_its_own_donors_is_goliath_s_shape():
    """Goliath-120b: 137 blocks in nine runs of two donors of 80; neighbours overlap by half."""
    recipe = goliath({"xwin": 80, "euryale": 80}, 137)
    ranges = [source.layer_range for source in recipe.sources]
    assert [source.model for source in recipe.sources] == ["xwin", "euryale"] * 4 + ["xwin"]
    assert all(15 <= stop - start <= 16 for start, stop in ranges)
    assert ranges[0][0] == 0 and ranges[-1][1] == 80
    assert all(
        7 <= later[0] - earlier[0] <= 9 for earlier, later in zip(ranges, ranges[1:], strict=False)
    )


@pytest.mark.parametrize(
    "donors, depths",
    [
        (PAIR, range(4, 25)),
        ({"a": 80, "b": 80}, [100, 120, 137]),
        ({"a": 6, "b": 6, "c": 6}, range(6, 20)),
        ({"a": 24, "b": 12}, range(20, 37)),
        ({"a": 20, "b": 3}, range(12, 24)),
    ],
)
def test_goliath_has_the_depth_and_stays_within(donors, depths):
    for depth in depths:
        recipe = goliath(donors, depth)
        assert len(recipe.blocks) == depth
        assert_within(recipe, donors)
        assert_begins_and_ends_like_a_donor(recipe, donors)
        assert set(recipe.donors) == set(donors)


@pytest.mark.parametrize("depth", [12, 24])
def test_goliath_s_runs_differ_in_length_by_one_at_most(depth):
    lengths = [
        stop - start
        for start, stop in (
            source.layer_range for source in goliath({"a": 20, "b": 20}, depth).sources
        )
    ]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "donors, depth",
    [(PAIR, 12), (PAIR, 4), (PAIR, 16), ({"a": 4, "b": 6}, 9), ({"a": 8, "b": 8, "c": 5}, 14)],
)
def test_random_recipes_keep_to_a_plan_s_constraints(donors, depth):
    for seed in range(200):
        recipe = random_recipe(donors, depth, seed)
        assert len(recipe.blocks) == depth
        assert_within(recipe, donors)
        assert_begins_and_ends_like_a_donor(recipe, donors)
        assert 1 <= len(recipe.seams) <= 4
        assert all(source.layer_range[1] - source.layer_range[0] >= 2 for source in recipe.sources)
        assert all(seam.after.model != seam.before.model for seam in recipe.seams)


def test_random_recipes_are_the_same_for_the_same_seed():
    assert [random_recipe(PAIR, 12, seed) for seed in range(20)] == [
        random_recipe(PAIR, 12, seed) for seed in range(20)
    ]


def test_random_recipes_of_other_seeds_are_other_recipes():
    recipes = [random_recipe(PAIR, 12, seed) for seed in range(200)]
    assert len({str(recipe) for recipe in recipes}) > 150
    assert {len(recipe.seams) for recipe in recipes} == {1, 2, 3, 4}
    assert {recipe.sources[0].model for recipe in recipes} == {"a", "b"}


@pytest.mark.parametrize("max_seams, min_slice", [(1, 2), (2, 4), (3, 1)])
def test_random_recipes_keep_to_the_limits_given(max_seams, min_slice):
    for seed in range(50):
        recipe = random_recipe(PAIR, 12, seed, max_seams=max_seams, min_slice=min_slice)
        assert len(recipe.seams) <= max_seams
        assert all(
            source.layer_range[1] - source.layer_range[0] >= min_slice for source in recipe.sources
        )


def test_solar_of_its_own_donor_is_solar():
    """Two copies of 32 blocks, each without eight: 48."""
    assert [source.layer_range for source in solar({"mistral": 32}, 48).sources] == [
        [0, 24],
        [8, 32],
    ]


def test_solar_of_two_donors_takes_the_first_s_beginning_and_the_second_s_end():
    assert str(solar(PAIR, 12)) == "a[0:6] b[2:8]"


def test_uniform_repetition_repeats_every_other_block():
    assert [block.index for block in uniform_repetition({"a": 4}, 6).blocks] == [0, 0, 1, 2, 2, 3]
