"""Donors whose tensors say whose they are, and recipes of them."""

from pathlib import Path

import pytest
from coded import encoded
from conftest import written
from killed import tree

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of


@pytest.fixture(scope="session")
def coded(donors, tmp_path_factory) -> dict[str, Path]:
    """Encoded Llamas `a`, `c`, tied `b`, `t`, `deep` (6 blocks, 3 files), and GPT-2s `g`, `h`."""
    root = tmp_path_factory.mktemp("coded")
    sources = {"a": "a", "b": "b", "c": "a", "t": "b", "deep": "deep", "g": "g", "h": "h"}
    return {
        name: encoded(donors[source], root / name, number, 3 if name == "deep" else 1)
        for number, (name, source) in enumerate(sources.items(), 1)
    }


@pytest.fixture
def order(coded):
    return [
        (coded["a"], 0),
        (coded["a"], 1),
        (coded["deep"], 1),
        (coded["deep"], 5),
        (coded["c"], 3),
    ]


@pytest.fixture
def room(tmp_path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture
def recipe(donors, tmp_path) -> Recipe:
    made = recipe_of(
        [
            Block(str(donors[name]), index)
            for name, index in (("a", 0), ("a", 1), ("deep", 1), ("deep", 5), ("a", 3))
        ]
    )
    (tmp_path / "recipe.yaml").write_text(made.dump())
    return made


@pytest.fixture
def whole(recipe, tmp_path) -> dict[str, bytes]:
    """The undisturbed result."""
    written(recipe, tmp_path / "whole", shard_size=6000)
    return tree(tmp_path / "whole")
