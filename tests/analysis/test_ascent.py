"""Ascent and fluent inputs, compared with all inputs of a model of 64 tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import write_donor

from frankenmerge.analysis import ascent
from frankenmerge.analysis.ascent import ascent_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.fluent import fluent_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import block_outputs, forward
from frankenmerge.models.loading import load_model

TOKENS = 64
FEATURES = [Feature.of(block, neuron) for block in (1, 2) for neuron in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ascent") / "donor"
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    return load_model(open_checkpoint(str(write_donor(folder, vocab_size=TOKENS, **shape))))


@torch.no_grad()
def every_input(model, n, *, start=(), positions="last", features=FEATURES, **where):
    """Scores of the features for all inputs of `n` tokens, `[features, TOKENS, ...]`."""
    inputs = torch.cartesian_prod(*[torch.arange(TOKENS)] * n).view(-1, n)
    scores = []
    for rows in inputs.split(1 << 15):
        ids = torch.cat([torch.tensor(start, dtype=torch.long).expand(len(rows), -1), rows], dim=1)
        with block_outputs(model, **where) as states:
            forward(model, input_ids=ids)
        own = torch.stack([states[each.block][:, :, each.neuron] for each in features])
        scores.append(own[..., -1] if positions == "last" else own.sum(dim=2))
    return torch.cat(scores, dim=1).view(-1, *[TOKENS] * n).numpy()


def assert_no_exchange_is_better(found, table):
    for tokens, scores in zip(found.tokens.tolist(), table, strict=True):
        own = scores[tuple(tokens)]
        for position in range(len(tokens)):
            place = tuple(slice(None) if p == position else t for p, t in enumerate(tokens))
            assert scores[place].max() <= own + 1e-5 * (1 + abs(own))


def test_comes_within_two_percent_of_the_best_of_all_inputs(model):
    table = every_input(model, 3)
    found = ascent_search(model, FEATURES, n=3)
    assert_no_exchange_is_better(found, table)
    scores = [own[tuple(tokens)] for own, tokens in zip(table, found.tokens, strict=True)]
    np.testing.assert_allclose(found.values[:, -1], scores, rtol=1e-4, atol=1e-5)
    best, mean = table.max(axis=(1, 2, 3)), table.mean(axis=(1, 2, 3))
    short = (best - scores) / (best - mean)
    assert (short > 0.02).sum() == MISSES, short
    greedy = greedy_search(model, FEATURES, n=3)
    assert (found.values[:, -1] >= greedy.values[:, -1] - 1e-5).all()
    assert found.recall is None


MISSES = 0
"""Features of which ascent ends lower than that."""


@pytest.mark.parametrize(
    "options",
    [
        {"site": "attention"},
        {"isolated": True},
        {"start": (0,)},
        {"start": (0, 9), "positions": "all"},
        {"positions": "all"},
    ],
    ids=str,
)
def test_options(model, options):
    found = ascent_search(model, FEATURES, n=2, **options)
    assert_no_exchange_is_better(found, every_input(model, 2, **options))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_model_that_caches_nothing_finds_the_same(model, monkeypatch, positions):
    cached = ascent_search(model, FEATURES, n=3, positions=positions)
    monkeypatch.setattr(ascent, "caches_keys", lambda _model: False)
    plain = ascent_search(model, FEATURES, n=3, positions=positions)
    assert np.array_equal(cached.tokens, plain.tokens)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_other_families_climb_too(tmp_path, family):
    donor = write_donor(tmp_path / family, family, seed=3, vocab_size=TOKENS)
    model, features = load_model(open_checkpoint(str(donor))), FEATURES[::4]
    found = ascent_search(model, features, n=2)
    assert_no_exchange_is_better(found, every_input(model, 2, features=features))


def test_inputs_are_counted(model):
    ran, reported = {"forward": 0, "gradient": 0}, []

    def count(_module, args):
        ran["gradient" if torch.is_grad_enabled() else "forward"] += len(args[0])

    hook = model.model.layers[0].register_forward_pre_hook(count)
    # Inputs of one token: there are no prefixes to run.
    found = ascent_search(model, FEATURES, n=1, candidates=5, advance=reported.append)
    hook.remove()
    counted = sum(reported)
    # What was found is run once more for its values, and recall is measured apart.
    sample = ascent.RECALL_SAMPLE
    assert counted == ran["forward"] + 3 * ran["gradient"] - len(FEATURES)
    assert sample * ascent.GRADIENT_COST < counted - found.inputs <= sample * (TOKENS + 3)
    assert found.passes == found.inputs / TOKENS


def test_a_screen_of_all_tokens_misses_nothing(model):
    found = ascent_search(model, FEATURES, n=2, candidates=TOKENS)
    assert found.recall == 1
    assert_no_exchange_is_better(found, every_input(model, 2))


def test_a_narrow_screen_reports_what_it_misses(model):
    found = ascent_search(model, FEATURES, n=2, candidates=1)
    assert found.recall is not None and 0 <= found.recall < 1


def test_the_model_is_left_as_it_was(model):
    ascent_search(model, FEATURES[:2], n=2, candidates=4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        ([], {}, "at least one"),
        ([Feature(1, range(0, 2))], {}, "several neurons"),
        (FEATURES, {"starts": 0}, "starts\n"),
        (FEATURES, {"candidates": 0}, "candidates\n"),
        (FEATURES, {"n": 65}, "at most 64 tokens"),
    ],
)
def test_mistakes_are_reported(model, features, options, words):
    with pytest.raises(FrankenmergeError, match=words):
        ascent_search(model, features, **options)


@torch.no_grad()
def every_loss(model, start=()):
    """The library's own loss of every input of two tokens, `[TOKENS, TOKENS]`."""
    inputs = torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOKENS))
    begun = torch.tensor(start, dtype=torch.long).expand(len(inputs), -1)
    ids = torch.cat([begun, inputs], dim=1)
    likely = model(input_ids=ids).logits[:, :-1].log_softmax(dim=2)
    own = -likely.gather(2, ids[:, 1:, None])[..., 0]
    return own[:, max(0, len(start) - 1) :].mean(dim=1).view(TOKENS, TOKENS).numpy()


@pytest.mark.parametrize("start", [(), (0,)])
def test_the_front_of_fluent_inputs(model, start):
    features = FEATURES[8:10]
    table, losses = every_input(model, 2, start=start, features=features), every_loss(model, start)
    found = ascent_search(model, features, n=2, start=start).tokens
    result = fluent_search(model, features, torch.from_numpy(found).long(), start=start)
    for front, own, tokens in zip(result.fronts, table, found.tolist(), strict=True):
        for point in front:
            assert point.activation == pytest.approx(own[point.tokens], rel=1e-4, abs=1e-5)
            assert point.cross_entropy == pytest.approx(losses[point.tokens], rel=1e-4)
        values = [(point.activation, point.cross_entropy) for point in front]
        assert all(one > two for pair in pairwise(values) for one, two in zip(*pair, strict=True))
        assert front[0].activation >= own[tuple(tokens)] - 1e-5
        every = zip(own.flatten().tolist(), losses.flatten().tolist(), strict=True)
        assert area(values, own, losses) > 0.9 * area(every, own, losses)
    assert result.inputs > 0


def area(points, own, losses) -> float:
    """What is dominated by points, between the lowest activation and the highest loss of all."""
    total, low, worst = 0.0, float(own.min()), float(losses.max())
    for activation, loss in sorted(points, key=lambda point: point[1]):
        if activation > low:
            total += (activation - low) * (worst - loss)
            low = activation
    return total


def test_nothing_is_predicted_of_a_single_token(model):
    with pytest.raises(FrankenmergeError, match="none of a single token is predicted"):
        fluent_search(model, FEATURES[:1], torch.tensor([[3]]))
