"""Which blocks are at a seam, and which take their place in a control."""

import pytest

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.healing.scopes import seam_blocks, spread_blocks


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("a0 a1 a2 a3", []),
        ("a0 a1 b2 b3", [1, 2]),
        ("a0 a1 a2 a1 a2 a3", [2, 3]),
        ("a0 a3", [0, 1]),
        ("a0 b1 a2 a3", [0, 1, 2]),
        ("a1 a2 a3", [0]),
        ("a0 a1 a2", [2]),
    ],
)
def test_seams(blocks, expected):
    recipe = recipe_of([Block(each[0], int(each[1])) for each in blocks.split()])
    assert seam_blocks(recipe, {"a": 4, "b": 4}) == expected


@pytest.mark.parametrize(
    ("count", "depth", "expected"),
    [(2, 8, [2, 6]), (4, 8, [1, 3, 5, 7]), (8, 8, list(range(8))), (9, 4, [0, 1, 2, 3])],
)
def test_a_control_has_as_many_blocks_evenly_placed(count, depth, expected):
    assert spread_blocks(count, depth) == expected
