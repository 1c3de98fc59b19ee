"""Recipes measured together: bit for bit what each is alone."""

import pytest

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_schema import Gauge
from frankenmerge.evaluation.compare import Bench, Text

SPLICES = ["a0 a1 a2 a3", "a0 a1 b2 b3", "a0 a1 b1 b2 b3", "a0 a0 a1 b2 a3", "b0 a1 a3", "a0"]


@pytest.mark.parametrize("pair", [("a", "b"), ("g", "h")])
@pytest.mark.parametrize("context", [16, 64])
def test_together_is_as_alone(donors, pair, context):
    names = {"a": str(donors[pair[0]]), "b": str(donors[pair[1]])}
    recipes = [
        recipe_of([Block(names[part[0]], int(part[1])) for part in splice.split()])
        for splice in SPLICES
    ]
    texts = [Text("long", "the quick brown fox jumps " * 9), Text("short", "over the dog")]
    bench = Bench(texts, names.values(), context=context)
    seen = []
    for recipe, result in zip(recipes, bench.recipes(recipes, advance=seen.append), strict=True):
        alone = bench.recipe("alone", recipe)
        assert result.losses.keys() == alone.losses.keys()
        for text, loss in result.losses.items():
            assert loss.bytes == alone.losses[text].bytes
            assert loss.nats == pytest.approx(alone.losses[text].nats, abs=1e-5)
    assert sum(seen) == len(recipes) * len(texts)


def test_what_is_turned_or_scaled_is_measured_as_it_is_alone(donors):
    names = [str(donors["a"]), str(donors["b"])]
    blocks = [Block(names[0], 0), Block(names[0], 1), Block(names[1], 2), Block(names[1], 3)]
    plain = recipe_of(blocks)
    first, last = plain.slices
    rotated = plain.model_copy(
        update={"slices": [first, last.model_copy(update={"gauge": Gauge(to="previous")})]}
    )
    scaled = plain.model_copy(
        update={"parameters": {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}}
    )
    bench = Bench([Text("one", "the quick brown fox jumps " * 3)], names)
    together = [result.total.nats_per_token for result in bench.recipes([plain, rotated, scaled])]
    assert together == pytest.approx(
        [bench.recipe("alone", recipe).total.nats_per_token for recipe in (plain, rotated, scaled)]
    )
    assert len({round(nats, 4) for nats in together}) == 3
