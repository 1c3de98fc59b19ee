import pytest
import torch
from conftest import write_donor

from frankenmerge.analysis.features import Feature, parse_features
from frankenmerge.analysis.gradient import RATES, gradient_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model

FAMILIES = ["llama", "gpt2", "qwen2", "phi3", "olmo2", "gpt_neox"]
MIXED = [
    Feature(3, range(2, 3)),
    Feature(1, range(5, 6)),
    Feature(3, range(7, 8), range(1, 2)),
    Feature(2, range(0, 4)),
    Feature(1, range(16), range(0, 2)),
    Feature(0, range(9, 10)),
]
"""Of several blocks, out of order; every kind of feature."""
START = [3, 14, 15, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    models = {}

    def get(family="llama"):
        if family not in models:
            folder = write_donor(tmp_path_factory.mktemp("gradient") / family, family, seed=3)
            models[family] = load_model(open_checkpoint(str(folder)))
        return models[family]

    return get


def hooks(model):
    return [
        (list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()
    ]


def by_hand(model, feature, steps):
    """The source document's loop for one feature, through the library's own hidden states."""
    embeddings = model.get_input_embeddings()(torch.tensor([START])).detach()
    positions = feature.positions or range(len(START))
    for eta in torch.linspace(*RATES, steps).tolist():
        embeddings.requires_grad_()
        output = model(
            inputs_embeds=embeddings, output_hidden_states=True, use_cache=False
        ).hidden_states[feature.block]
        chosen = output[:, list(positions)][:, :, list(feature.neurons)]
        loss = 0.1 * torch.sum(torch.abs(100.0 - chosen))
        embeddings = (embeddings - eta * torch.autograd.grad(loss, embeddings)[0]).detach()
    return embeddings[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_the_documents_loop_for_each_feature(family, model):
    found = gradient_search(model(family), MIXED, start=START, steps=4, batch=4)
    for feature, embeddings in zip(MIXED, found.embeddings, strict=True):
        torch.testing.assert_close(
            embeddings, by_hand(model(family), feature, 4), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("optimizer", ["descent", "adam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_at_a_time_gives_the_same(family, optimizer, model):
    together, alone = (
        gradient_search(model(family), MIXED, start=START, steps=4, optimizer=optimizer, batch=size)
        for size in (64, 1)
    )
    torch.testing.assert_close(together.embeddings, alone.embeddings, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adam"}, {"site": "attention"}, {"isolated": True}]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_falls(family, options, model):
    features = parse_features("[:, :, 0-7]", 3, 16)
    losses = gradient_search(model(family), features, steps=20, **options).losses
    assert losses.shape == (21, 8)
    assert (losses[-1] < losses[0]).all()


def test_an_isolated_block_is_fed_the_embeddings(model):
    deep, first = (Feature(block, range(4, 5)) for block in (3, 1))
    donor = model("llama")
    apart, inside = (
        gradient_search(donor, [deep], start=START, steps=1, isolated=isolated).losses[0]
        for isolated in (True, False)
    )
    blocks = donor.model.layers
    blocks[0], blocks[2] = blocks[2], blocks[0]
    try:
        swapped = gradient_search(donor, [first], start=START, steps=1).losses[0]
    finally:
        blocks[0], blocks[2] = blocks[2], blocks[0]
    torch.testing.assert_close(apart, swapped)
    assert not torch.allclose(apart, inside)


def test_descent_stops_at_the_target(model):
    near = gradient_search(
        model(), [Feature(0, range(4, 5))], steps=100, target=1.0, rates=(0.5, 0.05)
    )
    torch.testing.assert_close(near.embeddings[0, :, 4], torch.ones(5), rtol=0, atol=0.05)


def test_the_hidden_decode_of_a_random_model_tells_its_neurons_and_is_marked(model):
    features = parse_features("[:, :, 0-15]", 1, 16)
    hidden, real = (
        gradient_search(model(), features, decode=decode) for decode in ("hidden", "pinv")
    )
    assert hidden.artefact and hidden.artefact_share > 0.7
    assert not real.artefact and real.artefact_share < 0.15
    assert torch.equal(hidden.embeddings, real.embeddings)


def test_features_of_several_neurons_have_no_artefact_share(model):
    assert gradient_search(model(), [Feature(1, range(4))], steps=1).artefact_share is None


def test_the_model_is_left_as_it_was(model):
    donor = model("llama")
    parameters = list(donor.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    before, hooked = [parameter.detach().clone() for parameter in parameters], hooks(donor)
    try:
        gradient_search(donor, [Feature(2, range(1))], steps=2)
        assert [parameter.requires_grad for parameter in parameters] == [
            index != 1 for index in range(len(parameters))
        ]
        assert [
            index for index, parameter in enumerate(parameters) if parameter.grad is not None
        ] == [2]
        assert torch.equal(parameters[2].grad, torch.ones_like(parameters[2]))
        assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
        assert hooks(donor) == hooked
    finally:
        parameters[1].requires_grad_(True)
        parameters[2].grad = None


def test_the_seed_decides(model):
    first, again, other = (
        gradient_search(model(), MIXED, steps=3, seed=seed) for seed in (1, 1, 2)
    )
    assert first.start == again.start != other.start
    assert torch.equal(first.embeddings, again.embeddings) and torch.equal(
        first.tokens, again.tokens
    )
    assert not torch.equal(first.embeddings, other.embeddings)


@pytest.mark.parametrize(
    ("feature", "options", "place"),
    [
        (Feature(1, range(16, 17)), {}, "neuron"),
        (Feature(1, range(1), range(5, 6)), {}, "position"),
        (Feature(5, range(1)), {}, "block"),
        (Feature(1, range(1)), {"start": [48]}, "start"),
        (Feature(1, range(1)), {"start": []}, "tokens"),
        (Feature(1, range(1)), {"tokens": 65}, "tokens"),
    ],
)
def test_what_cannot_be_is_told(feature, options, place, model):
    with pytest.raises(FrankenmergeError) as caught:
        gradient_search(model("gpt2"), [feature], **options)
    (fault,) = caught.value.faults
    assert place in fault.place and all(fault)
