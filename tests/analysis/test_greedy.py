"""Greedy search, compared with the source document's listing: no cache, one feature at a time."""

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, write_donor

from frankenmerge.analysis import greedy
from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import block_outputs, embedding_of, forward
from frankenmerge.models.loading import load_model

FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gpt_neox"]
FEATURES = [
    Feature.of(*place)
    for place in ((0, 3), (1, 0), (2, 5), (4, 5), (4, 15), (3, 7), (4, 7), (1, 0))
]


def loaded(path):
    return load_model(open_checkpoint(str(path)))


@pytest.fixture(scope="module")
def model(donors):
    return loaded(donors["a"])


@torch.no_grad()
def listing(model, feature, n, *, site="block", isolated=False, positions="last", start=()):
    """The source document's `search_maximal`: the tokens, and the activation at each."""
    found, values = list(start), []
    for _ in range(n):
        inputs = torch.tensor([[*found, token] for token in range(VOCABULARY)])
        with block_outputs(model, site=site, isolated=isolated) as states:
            forward(model, input_ids=inputs)
        focus = states[feature.block][:, :, feature.neuron]
        best = int(torch.argmax(focus[:, -1] if positions == "last" else focus.sum(dim=1)))
        found.append(best)
        values.append(float(focus[best, -1]))
    return found[len(start) :], values


def assert_as_listed(result, model, n=4, **options):
    for feature, tokens, values in zip(FEATURES, result.tokens, result.values, strict=True):
        expected, activations = listing(model, feature, n, **options)
        assert tokens.tolist() == expected, feature
        assert values == pytest.approx(activations, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_what_the_listing_finds(tmp_path, family, positions):
    model = loaded(write_donor(tmp_path / family, family, seed=11))
    result = greedy_search(model, FEATURES, positions=positions)
    assert result.tokens.dtype == np.int32
    assert result.values.dtype == np.float32
    assert result.recall is None
    assert_as_listed(result, model, positions=positions)


@pytest.mark.parametrize("donor", ["a", "g"])
@pytest.mark.parametrize(
    "options",
    [
        {"site": "attention"},
        {"isolated": True},
        {"start": (0,)},
        {"start": (0, 9, 9), "positions": "all"},
    ],
    ids=str,
)
def test_options(donors, donor, options):
    model = loaded(donors[donor])
    assert_as_listed(greedy_search(model, FEATURES, **options), model, **options)


def test_sliding_window_shorter_than_the_input(tmp_path):
    model = loaded(write_donor(tmp_path / "donor", "mistral", seed=12, sliding_window=2))
    assert_as_listed(greedy_search(model, FEATURES), model)


def test_last_and_all_positions_agree(model):
    last, total = greedy_search(model, FEATURES), greedy_search(model, FEATURES, positions="all")
    assert np.array_equal(last.tokens, total.tokens)
    assert np.array_equal(last.values, total.values)


def test_one_token_is_the_complete_search(model):
    complete = complete_search(model, k=1)
    result = greedy_search(model, FEATURES, n=1)
    assert [
        complete.tokens[feature.block, feature.neuron, 0] for feature in FEATURES
    ] == result.tokens[:, 0].tolist()
    assert result.passes == 1


def test_a_shared_prefix_runs_once(model):
    features = [Feature.of(block, neuron) for block in range(1, 5) for neuron in range(16)]
    ran = []
    result = greedy_search(model, features, advance=ran.append)
    distinct = [
        len({tuple(tokens[:step]) for tokens in result.tokens.tolist()}) for step in range(4)
    ]
    assert list(result.prefixes) == distinct
    assert distinct[1] < len(features)
    assert result.passes == sum(distinct)
    assert sum(ran) == sum(distinct) * VOCABULARY


def test_a_prefix_is_computed_once_and_ends_at_the_deepest_block(model, monkeypatch):
    monkeypatch.setattr(greedy, "BATCH", 16)
    blocks = [[] for _ in range(4)]
    layers = zip(model.model.layers, blocks, strict=True)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, shapes=shapes: shapes.append(tuple(args[0].shape[:2]))
        )
        for layer, shapes in layers
    ]
    greedy_search(model, [Feature.of(2, 1)], n=3)
    for hook in hooks:
        hook.remove()
    candidates = [(16, 1)] * 3
    values = (1, 3)
    assert blocks[0] == [*candidates, (1, 1), *candidates, (1, 2), *candidates, values]
    assert blocks[1] == blocks[0]
    assert blocks[2] == blocks[3] == []


@pytest.mark.parametrize("batch", [1, 7, 47])
def test_no_batch_border_shows(model, monkeypatch, batch):
    whole = greedy_search(model, FEATURES)
    monkeypatch.setattr(greedy, "BATCH", batch)
    split = greedy_search(model, FEATURES)
    assert np.array_equal(whole.tokens, split.tokens)
    assert split.values == pytest.approx(whole.values, rel=1e-5)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("batch", [16, 32, 1024])
@pytest.mark.parametrize("vocabulary", [48, 53])
def test_of_equal_activations_the_lowest_id_wins(tmp_path, monkeypatch, vocabulary, batch, beam):
    model = loaded(write_donor(tmp_path / "donor", seed=13, vocab_size=vocabulary))
    with torch.no_grad():
        embedding_of(model)[:] = embedding_of(model)[torch.arange(vocabulary) % 4]
    monkeypatch.setattr(greedy, "BATCH", batch)
    assert greedy_search(model, FEATURES, beam=beam).tokens.max() < 4


@torch.no_grad()
def test_a_beam_keeps_the_best_inputs(model):
    feature, width = Feature.of(3, 2), 3
    paths = [(0.0, ())]
    for _ in range(3):
        inputs = [(*tokens, token) for _, tokens in paths for token in range(VOCABULARY)]
        with block_outputs(model) as states:
            forward(model, input_ids=torch.tensor(inputs))
        scores = states[feature.block][:, -1, feature.neuron].tolist()
        paths = sorted(zip(scores, inputs, strict=True), key=lambda path: (-path[0], path[1]))[
            :width
        ]
    result = greedy_search(model, [feature], n=3, beam=width)
    assert tuple(result.tokens[0]) == paths[0][1]
    assert result.values[0, -1] == pytest.approx(paths[0][0], rel=1e-5)
    assert result.prefixes[0] == 1
    assert result.passes == sum(result.prefixes)


def test_a_beam_wider_than_the_vocabulary(model):
    narrow = greedy_search(model, [Feature.of(4, 2)], n=2)
    wide = greedy_search(model, [Feature.of(4, 2)], n=2, beam=1000)
    assert wide.prefixes == (1, VOCABULARY)
    assert wide.values[0, -1] >= narrow.values[0, -1]


def test_a_screen_of_the_whole_vocabulary_misses_nothing(model):
    exact, screened = (
        greedy_search(model, FEATURES),
        greedy_search(model, FEATURES, candidates=2 * VOCABULARY),
    )
    assert np.array_equal(screened.tokens, exact.tokens)
    assert screened.recall == 1
    assert (screened.prefixes, screened.passes) == (exact.prefixes, 2)


def test_a_screen_tells_what_it_misses(model):
    features = [Feature.of(4, neuron) for neuron in range(8)]
    exact, screened = greedy_search(model, features), greedy_search(model, features, candidates=1)
    assert np.array_equal(screened.tokens[:, 0], exact.tokens[:, 0])
    together = same = 0
    for ours, theirs in zip(screened.tokens.tolist(), exact.tokens.tolist(), strict=True):
        for step in range(1, 4):
            together += ours[:step] == theirs[:step]
            same += ours[: step + 1] == theirs[: step + 1]
    assert screened.recall == same / together < 1


def test_the_model_is_left_as_it_was(model):
    greedy_search(model, FEATURES, candidates=4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        ([], {}, "at least one"),
        ([Feature.of(5, 0)], {}, "features: block"),
        ([Feature.of(1, 16)], {}, "within 0 to 15"),
        ([Feature.of(1, -1)], {}, r"\[:, :, -1\]: neuron"),
        ([Feature(1, range(0, 2))], {}, "several neurons"),
        ([Feature(1, range(0, 1), range(1, 2))], {}, "chosen positions"),
        (FEATURES, {"n": 0}, "n\n"),
        (FEATURES, {"beam": 0}, "beam\n"),
        (FEATURES, {"candidates": 0}, "candidates\n"),
        (FEATURES, {"start": (VOCABULARY,)}, "start\n"),
        (FEATURES, {"n": 60, "start": (0,) * 5}, "at most 64 tokens"),
    ],
)
def test_mistakes_are_reported(model, features, options, words):
    with pytest.raises(FrankenmergeError, match=words):
        greedy_search(model, features, **options)


def test_activations_that_are_no_numbers_are_told(tmp_path):
    model = loaded(write_donor(tmp_path / "donor", seed=14))
    with torch.no_grad():
        embedding_of(model)[7] = torch.nan
    with pytest.raises(FrankenmergeError, match="finite activations"):
        greedy_search(model, FEATURES)
