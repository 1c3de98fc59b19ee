"""Recipes that share their first blocks are measured together as each is alone."""

import pytest
from conftest import resolved

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_schema import Gauge
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text

SPLICES = ["a0 a1 a2 a3", "a0 a1 b2 b3", "a0 a1 b1 b2 b3", "a0 a0 a1 b2 a3", "b0 a1 a3", "a0"]


@pytest.mark.parametrize("pair", [("a", "b"), ("g", "h")])
@pytest.mark.parametrize("context", [16, 64])
def test_together_is_as_alone(donors, pair, context):
    names = {"a": str(donors[pair[0]]), "b": str(donors[pair[1]])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    splices = [
        resolved(recipe_of([Block(names[part[0]], int(part[1])) for part in stack.split()]))
        for stack in SPLICES
    ]
    texts = [Text("long", "the quick brown fox jumps " * 9), Text("short", "over the dog")]
    bench = Bench(texts, checkpoints, context=context)
    seen = []
    for splice, result in zip(splices, bench.splices(splices, advance=seen.append), strict=True):
        alone = bench.splice("alone", splice)
        assert result.losses.keys() == alone.losses.keys()
        for text, loss in result.losses.items():
            assert loss.bytes == alone.losses[text].bytes
            assert loss.nats == pytest.approx(alone.losses[text].nats, abs=1e-5)
    assert sum(seen) == len(splices) * len(texts)


def test_rotated_and_scaled_recipes_are_measured_as_each_is_alone(donors):
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
    splices = [resolved(recipe) for recipe in (plain, rotated, scaled)]
    checkpoints = {name: open_checkpoint(name) for name in names}
    bench = Bench([Text("one", "the quick brown fox jumps " * 3)], checkpoints)
    together = [result.total.nats_per_token for result in bench.splices(splices)]
    assert together == pytest.approx(
        [bench.splice("alone", splice).total.nats_per_token for splice in splices]
    )
    assert len({round(nats, 4) for nats in together}) == 3
