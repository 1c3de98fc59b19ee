"""Every recipe that is shipped parses, and makes the depth its makers published."""

from pathlib import Path

import pytest

from frankenmerge.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PUBLISHED_DEPTHS = {"goliath-120b": 137, "meta-llama-3-120b-instruct": 140, "solar-10.7b": 48, "psyonic-cetacean-20b": 62}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_has_its_published_depth(path):
    assert len(load_recipe(path).blocks) == PUBLISHED_DEPTHS[path.stem]
