"""Damage on sampled tokens and exchanged blocks, compared with models run one by one."""

import numpy as np
import pytest
import torch
from conftest import resolved

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.block_swaps import exchange
from frankenmerge.evaluation.sampled_damage import damage_on_sampled
from frankenmerge.models.hooks import block_outputs
from frankenmerge.models.loading import load_model
from frankenmerge.models.sampling import LENGTH, ROWS, sample_unprompted, states_on_sampled
from frankenmerge.planning.damping import damped
from frankenmerge.splicing.assemble import assemble


@pytest.fixture(scope="module")
def pair(donors) -> tuple[dict, dict]:
    """Checkpoints and models by name."""
    opened = {str(donors[name]): open_checkpoint(str(donors[name])) for name in ("a", "b")}
    return opened, {name: load_model(donor) for name, donor in opened.items()}


def assembled(recipe, pair):
    opened, models = pair
    splice = resolved(recipe, {name: opened[name] for name in recipe.donors})
    return assemble(splice, {name: models[name] for name in recipe.donors})


def stack(donors, text: str) -> list[Block]:
    return [Block(str(donors[part[0]]), int(part[1])) for part in text.split()]


@torch.no_grad()
def divergence(host, other, ids) -> float:
    said, found = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (host, other))
    return float((said.exp() * (said - found)).sum(-1).mean())


@torch.no_grad()
def expected_loss(source, model, ids) -> float:
    said, found = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (source, model))
    return float(-(said.exp() * found).sum(-1).mean())


def test_damage_is_the_loss_above_the_donors_on_what_all_of_them_sampled(donors, pair):
    opened, models = pair
    recipes = [
        recipe_of(stack(donors, text))
        for text in ("a0 a1 b2 b3", "a0 a1 b1 b2 b3", "a0 a1 a2 a3", "b0 b1 b1 b2 b3")
    ]
    recipes.append(damped(recipes[1], [1, 0.5, 0.5, 1, 1], ("o_proj", "down_proj")))
    splices = [resolved(each, {name: opened[name] for name in each.donors}) for each in recipes]
    asked = []

    def counted(splice):
        asked.append(splice)
        return assemble(splice, models)

    done = []
    found = damage_on_sampled(splices, models, counted, advance=done.append)
    assert set(map(id, asked)) == {id(splices[4])}  # the others are stacks of the donors' blocks
    assert sum(done) == len(splices) * len(models)
    texts = {name: sample_unprompted(model) for name, model in models.items()}

    def loss(model) -> float:
        return float(
            np.mean([expected_loss(models[name], model, ids) for name, ids in texts.items()])
        )

    for recipe, damage in zip(recipes, found, strict=True):
        own = np.mean([loss(models[block.model]) for block in recipe.blocks])
        assert damage == pytest.approx(loss(assembled(recipe, pair)) - own, rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(0, abs=1e-6) and found[1] != pytest.approx(found[4])


def test_the_damage_of_one_donor_s_recipe_is_its_divergence(donors, pair):
    name, model = next(iter(pair[1].items()))
    recipe = recipe_of(stack(donors, "a0 a1 a1 a2 a3"))
    (found,) = damage_on_sampled([resolved(recipe)], {name: model}, assemble)
    expected = divergence(model, assembled(recipe, pair), sample_unprompted(model))
    assert found == pytest.approx(expected, rel=1e-4)


def test_sampled_tokens_follow_the_model_s_predictions(pair):
    """Of many samples after BOS, each token's share is its probability, within four sigmas."""
    from frankenmerge.models.sampling import sample_tokens

    model = next(iter(pair[1].values()))
    count = 4000
    ids = sample_tokens(model, count, 2, 0, 0)
    expected = (
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        .logits[0, -1]
        .softmax(-1)
        .detach()
        .numpy()
    )
    seen = np.bincount(ids[:, 1], minlength=len(expected)) / count
    assert (np.abs(seen - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()
    assert sample_unprompted(model).shape == (ROWS, LENGTH)
    assert torch.equal(sample_unprompted(model), sample_unprompted(model))


def test_the_states_are_both_donors_on_the_tokens_of_both(pair):
    models = pair[1]
    found = states_on_sampled(models)
    ids = torch.cat([sample_unprompted(model) for model in models.values()])
    for name, model in models.items():
        with block_outputs(model) as states, torch.no_grad():
            model(input_ids=ids)
        expected = np.stack([state[:, 1:].flatten(0, 1).numpy() for state in states])
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def test_both_tests_of_exchange_are_the_divergence_of_the_changed_donor(donors, pair):
    models = pair[1]
    a, b = models
    found = exchange((a, 4), (b, 4), models)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 48, (16, 32)))

    def run(text: str):
        return assembled(recipe_of(stack(donors, text)), pair)

    expected = {
        ("replacement", 0, 1, 2): "a0 b2 a2 a3",
        ("replacement", 1, 3, 0): "b0 b1 b2 a0",
        ("interchange", 0, 1, 3): "a0 a3 a2 a1",
        ("interchange", 1, 0, 2): "b2 b1 b0 b3",
    }
    for (kind, host, i, j), text in expected.items():
        value = divergence(list(models.values())[host], run(text), ids)
        assert getattr(found, kind)[host][i, j] == pytest.approx(value, rel=1e-3, abs=1e-6)
    for matrix in found.interchange:
        np.testing.assert_allclose(matrix.diagonal(), 0, atol=1e-6)
        np.testing.assert_allclose(matrix, matrix.T)
