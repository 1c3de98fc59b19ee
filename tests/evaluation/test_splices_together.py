"""Splices of every kind that share what they begin with are measured as each is alone."""

import numpy as np
import pytest
import torch
from conftest import resolved, written

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_schema import Gauge
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.domains import text_domain
from frankenmerge.evaluation.gains import losses_together, mean_loss
from frankenmerge.evaluation.prefix_sharing import splices_together
from frankenmerge.planning.damping import damped

STACKS = ("a0 a1 a2 a3", "a0 a1 b2 b3", "a0 a1 a1 a2 a3", "a0 a1", "b0 b1 b2 b3", "b0 a1 a3")
WRITES = {"a": ("self_attn.o_proj", "mlp.down_proj"), "g": ("attn.c_proj", "mlp.c_proj")}


def stack(names: dict[str, str], text: str) -> Recipe:
    return recipe_of([Block(names[part[0]], int(part[1])) for part in text.split()])


def average(names: dict[str, str], weight: object, **fields: str) -> Recipe:
    models = [
        {"model": names["a"], "parameters": {"weight": 1}},
        {"model": names["b"], "parameters": {"weight": weight}},
    ]
    return Recipe.model_validate({"merge_method": "linear", "models": models} | fields)


def recipes_of_every_kind(names: dict[str, str], first: str) -> list[Recipe]:
    part = "attn" if first == "g" else "self_attn"
    plain = stack(names, "a0 a1 a1 a2 a3")
    return [
        *(stack(names, text) for text in STACKS),
        damped(plain, [1, 1, 0.5, 1, 1], WRITES[first]),
        damped(plain, [1, 1, 0.1, 1, 1], WRITES[first]),
        average(names, 1),
        average(names, [1, 1, 1, 0]),
        average(names, [{"filter": part, "value": 0.5}, {"value": 0}]),
        average(names, [{"filter": part, "value": [0.5, 0.5, 0.1, 0.1]}, {"value": 0}]),
    ]


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(48, (3, 12 + each), generator=generator) for each in range(count)]


@pytest.mark.parametrize("pair", [("a", "b"), ("b", "a"), ("g", "h")])
def test_together_is_what_transformers_computes_alone(donors, pair, tmp_path):
    # Donor b of the Llamas is tied, a is not.
    names = {"a": str(donors[pair[0]]), "b": str(donors[pair[1]])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    recipes = recipes_of_every_kind(names, "g" if pair[0] == "g" else "a")
    splices = [resolved(recipe, checkpoints) for recipe in recipes]
    bench, ids = Bench((), checkpoints), batches()
    outputs = list(splices_together(splices, bench.assemble, ids))
    assert sorted((each.splice, each.batch) for each in outputs) == [
        (splice, batch) for splice in range(len(splices)) for batch in range(2)
    ]
    alone = sum(len(splice.blocks) for splice in splices) * len(ids)
    assert sum(each.blocks for each in outputs) < 0.75 * alone
    for each in outputs:
        model = bench.assemble(splices[each.splice])
        with torch.no_grad():
            expected = model(input_ids=ids[each.batch], use_cache=False).logits
        torch.testing.assert_close(each.logits, expected, atol=2e-5, rtol=1e-4)
    # And what a merge of it would write, loaded by transformers itself.
    from transformers import AutoModelForCausalLM

    last = len(splices) - 1
    written(recipes[last], tmp_path / "merged", donors=checkpoints)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    (found,) = [each for each in outputs if (each.splice, each.batch) == (last, 0)]
    with torch.no_grad():
        expected = loaded(input_ids=ids[0]).logits
    torch.testing.assert_close(found.logits, expected, atol=2e-5, rtol=1e-4)


def test_blocks_that_two_begin_with_are_run_once(donors):
    names = {"a": str(donors["a"]), "b": str(donors["b"])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    bench = Bench((), checkpoints)

    def run(*texts: str) -> int:
        splices = [resolved(stack(names, text), checkpoints) for text in texts]
        return sum(each.blocks for each in splices_together(splices, bench.assemble, batches()))

    assert run("a0 a1 a2 a3") == 2 * 4
    assert run("a0 a1 a2 a3", "a0 a1 b2 b3") == 2 * (4 + 2)
    assert run("a0 a1 a2 a3", "b0 b1 b2 b3", "a0 a1 b2 b3") == 2 * (4 + 4 + 2)
    assert run("a0 a1 a2", "a0 a1 a2 a3", "a0 a1") == 2 * 4
    assert run("a0 a1 a2 a3", "a0 a1 a2 a3") == 2 * 4
    assert run("a0 a1 a2 a3", "a1 a2 a3") == 2 * 7


def test_nothing_is_shared_after_another_embedding_or_with_another_base(donors):
    names = {"a": str(donors["a"]), "b": str(donors["b"])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    bench, ids = Bench((), checkpoints), batches()
    plain = stack(names, "a0 a1 a2 b3")
    others = [
        plain.model_copy(update={"embedding": names["b"]}),
        plain.model_copy(update={"base_model": names["b"], "embedding": names["a"]}),
    ]
    for other in others:
        splices = [resolved(recipe, checkpoints) for recipe in (plain, other)]
        outputs = list(splices_together(splices, bench.assemble, ids))
        assert [each.blocks for each in outputs] == [4] * 4
        for each in outputs:
            model = bench.assemble(splices[each.splice])
            with torch.no_grad():
                expected = model(input_ids=ids[each.batch]).logits
            torch.testing.assert_close(each.logits, expected, atol=2e-5, rtol=1e-4)


def test_rotated_recipes_share_nothing_and_are_as_alone(donors):
    names = {"a": str(donors["a"]), "b": str(donors["b"])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    plain = stack(names, "a0 a1 b2 b3")
    assert plain.slices
    first, last = plain.slices
    rotated = plain.model_copy(
        update={"slices": [first, last.model_copy(update={"gauge": Gauge(to="previous")})]}
    )
    splices = [resolved(recipe, checkpoints) for recipe in (plain, rotated)]
    bench, ids = Bench((), checkpoints), batches(1)
    outputs = {each.splice: each for each in splices_together(splices, bench.assemble, ids)}
    assert [outputs[number].blocks for number in (0, 1)] == [4, 4]
    with torch.no_grad():
        expected = bench.assemble(splices[1])(input_ids=ids[0]).logits
    torch.testing.assert_close(outputs[1].logits, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-2)


def test_losses_together_are_the_mean_cross_entropies(donors, monkeypatch):
    monkeypatch.setattr("frankenmerge.evaluation.domains.POSITIONS", 40)  # several batches
    names = {"a": str(donors["a"]), "b": str(donors["b"])}
    checkpoints = {name: open_checkpoint(name) for name in names.values()}
    bench = Bench((), checkpoints)
    letters = np.random.default_rng(0).integers(1, 48, 100)
    domains = [text_domain("long", letters, 0, 12), text_domain("short", letters[:30], 0, 12)]
    recipes = [stack(names, "a0 a1 a2 a3"), average(names, 1), stack(names, "a0 a1 b2 b3")]
    splices = [resolved(recipe, checkpoints) for recipe in recipes]
    steps: list[int] = []
    measured = losses_together(splices, bench.assemble, domains, advance=steps.append)
    assert steps == [1, 1, 1]
    for splice, sums in zip(splices, measured.sums, strict=True):
        model, total, count = bench.assemble(splice), 0.0, 0
        for domain in domains:
            nats = 0.0
            for row, counted in zip(domain.ids, domain.counted, strict=True):
                length = int(counted.sum()) + 1
                labels = row[None, :length]
                with torch.no_grad():
                    loss = model(input_ids=labels, labels=labels).loss
                nats += float(loss) * (length - 1)
            assert sums[domain.name][0].sum() == pytest.approx(nats, rel=1e-5)
            assert sums[domain.name][1].sum() == domain.counted.sum()
            total, count = total + nats, count + int(domain.counted.sum())
        assert mean_loss(sums) == pytest.approx(total / count, rel=1e-5)
