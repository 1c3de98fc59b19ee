"""Recipes measured together: bit for bit what each is alone."""

import pytest

from frankenmerge.evaluation.compare import Bench, Text
from frankenmerge.recipe import Block, recipe_of

SPLICES = ["a0 a1 a2 a3", "a0 a1 b2 b3", "a0 a1 b1 b2 b3", "a0 a0 a1 b2 a3", "b0 a1 a3", "a0"]


@pytest.mark.parametrize("pair", [("a", "b"), ("g", "h")])
@pytest.mark.parametrize("context", [16, 64])
def test_together_is_as_alone(donors, pair, context):
    names = {"a": str(donors[pair[0]]), "b": str(donors[pair[1]])}
    recipes = [recipe_of([Block(names[part[0]], int(part[1])) for part in splice.split()]) for splice in SPLICES]
    texts = [Text("long", "the quick brown fox jumps " * 9), Text("short", "over the dog")]
    bench = Bench(texts, names.values(), context=context)
    seen = []
    for recipe, result in zip(recipes, bench.recipes(recipes, progress=seen.append), strict=True):
        alone = bench.recipe("alone", recipe)
        assert result.losses.keys() == alone.losses.keys()
        for text, loss in result.losses.items():
            assert loss.bytes == alone.losses[text].bytes
            assert loss.nats == pytest.approx(alone.losses[text].nats, abs=1e-5)
    assert sum(seen) == len(recipes) * len(texts)
