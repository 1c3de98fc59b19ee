"""Gradient ascent on pixels: beside its closed form, and what the priors change."""

import pytest
import torch
from torch.nn.functional import conv2d
from vision import CLASSES, write_images, write_vision

from frankenmerge.analysis.align import align
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.images import analyze_images
from frankenmerge.analysis.pixels import (
    Ascent,
    blurred,
    pixel_search,
    total_variation,
    with_pictures,
)
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.images import image_shape
from frankenmerge.models.images import images_in
from frankenmerge.models.loading import load_model

PLAIN = Ascent(steps=40, jitter=0, blur=0, variation=0)
"""Without any prior."""


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    root = tmp_path_factory.mktemp("pixels")
    return {
        name: open_checkpoint(str(write_vision(root / name, "vit", seed)))
        for seed, name in enumerate("ab")
    }


def best_patches(model: torch.nn.Module, neuron: int) -> torch.Tensor:
    """What maximises a neuron before the first block: white where its weight is positive."""
    (weight,) = (p for n, p in model.named_parameters() if n.endswith("projection.weight"))
    return (weight[neuron] > 0).float().repeat(1, 4, 4)


@pytest.mark.parametrize("kind", CLASSES)
def test_before_the_first_block_ascent_finds_the_closed_form(kind, tmp_path):
    # There a neuron is linear in every pixel, so that pixels end at 0 or 1.
    checkpoint = open_checkpoint(str(write_vision(tmp_path / "donor", kind)))
    model = load_model(checkpoint)
    features = [Feature.of(0, neuron) for neuron in (0, 3, 7)]
    found = pixel_search(model, features, image_shape(checkpoint), PLAIN)
    expected = torch.stack([best_patches(model, neuron) for neuron in (0, 3, 7)])
    torch.testing.assert_close(found.pixels, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_image_does_not_depend_on_the_others_and_excites_its_neuron(donors):
    model, shape = load_model(donors["a"]), image_shape(donors["a"])
    features = [Feature.of(2, neuron) for neuron in range(3)]
    ascent = Ascent(steps=24)
    together = pixel_search(model, features, shape, ascent)
    alone = pixel_search(model, features[1:2], shape, ascent)
    torch.testing.assert_close(alone.pixels[0], together.pixels[1], atol=1e-3, rtol=0)
    assert (together.activations > 3).all()  # far beyond what images of noise reach


def test_priors_make_images_smoother(donors):
    model, shape = load_model(donors["a"]), image_shape(donors["a"])
    features = [Feature.of(3, neuron) for neuron in range(4)]
    with_priors = pixel_search(model, features, shape, Ascent(steps=40, variation=20)).pixels
    without = pixel_search(model, features, shape, PLAIN).pixels
    assert (total_variation(with_priors) < total_variation(without)).all()


def test_a_position_is_one_patch(donors):
    model, shape = load_model(donors["a"]), image_shape(donors["a"])
    feature = Feature(0, range(5, 6), range(6, 7))  # the second row, the third patch
    found = pixel_search(model, [feature], shape, PLAIN).pixels[0]
    patch = best_patches(model, 5)[:, :2, :2]
    torch.testing.assert_close(found[:, 2:4, 4:6], patch)
    found[:, 2:4, 4:6] = 0.5
    assert (found - 0.5).abs().max() < 0.1  # no other pixel has moved from the start


def test_total_variation_and_blur_are_those_of_their_formulas():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1.0
    assert total_variation(image).item() == pytest.approx(2 * 2 / 20)
    line = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * 0.5**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    inside = conv2d(torch.nn.functional.pad(image, (2,) * 4), kernel[None, None])
    torch.testing.assert_close(blurred(image, 0.5), inside)
    torch.testing.assert_close(
        blurred(torch.full((1, 3, 5, 5), 0.7), 2.0), torch.full((1, 3, 5, 5), 0.7)
    )


def test_the_score_of_pixels_is_their_correlation(donors, tmp_path):
    images = images_in(write_images(tmp_path / "images"))
    one, other = (
        with_pictures(
            analyze_images(donor, images, k=2), donor, [1, 4, 9], cache=tmp_path / "cache"
        )
        for donor in donors.values()
    )
    score = align(one, other, method="pixels").scores["pixels"]
    pair = [
        torch.from_numpy(atlas.pictures.pixels[block, 1].ravel() / 255)
        for atlas, block in ((one, 2), (other, 3))
    ]
    expected = torch.corrcoef(torch.stack(pair))[0, 1].item()
    assert score.detail[2, 3, 4] == pytest.approx(expected, abs=1e-3)
    assert list(score.nulls) == ["permuted_neurons"]
    same = align(one, one, method="pixels").scores["pixels"]
    assert same.matrix.diagonal()[1:] == pytest.approx(1)  # before them one image is white
