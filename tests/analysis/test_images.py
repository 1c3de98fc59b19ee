"""Top-activating images and activations, beside transformers' own hidden states."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from vision import CLASSES, write_images, write_vision

from frankenmerge.analysis.images import analyze_images, top_images
from frankenmerge.artefacts.atlas import load_atlas, save_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.images import image_shape
from frankenmerge.models.images import images_in, noise_images
from frankenmerge.models.loading import load_model
from frankenmerge.workflows.atlases import atlas_of


def activations(folder, kind: str, files) -> torch.Tensor:
    """`[l+1, n, d]`: the mean over patches of transformers' hidden states, image by image."""
    model = getattr(transformers, CLASSES[kind]).from_pretrained(folder).eval()
    rows = []
    for file in files:
        pixels = (np.asarray(Image.open(file), dtype=np.float32) / 255 - 0.3) / 0.6
        with torch.no_grad():
            found = model(torch.from_numpy(pixels)[None, None], output_hidden_states=True)
        rows.append(torch.stack([state[0, 1:].mean(dim=0) for state in found.hidden_states]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("kind", CLASSES)
def test_top_images_are_those_of_a_loop_over_hidden_states(kind, tmp_path):
    folder, images = write_vision(tmp_path / "donor", kind), write_images(tmp_path / "images")
    checkpoint = open_checkpoint(str(folder))
    expected = activations(folder, kind, sorted(images.iterdir()))
    top, probes = top_images(
        load_model(checkpoint),
        images_in(images),
        image_shape(checkpoint),
        k=3,
        probes=[0, 5],
    )
    values, indices = expected.topk(3, dim=1)
    np.testing.assert_array_equal(top.tokens, indices.transpose(1, 2))
    np.testing.assert_allclose(top.values, values.transpose(1, 2), atol=1e-5)
    np.testing.assert_allclose(probes, expected[:, [0, 5]], atol=1e-5)


def test_an_atlas_of_images_is_the_same_when_loaded(tmp_path):
    checkpoint = open_checkpoint(str(write_vision(tmp_path / "donor")))
    atlas = analyze_images(checkpoint, images_in(write_images(tmp_path / "images")), k=2)
    save_atlas(atlas, tmp_path / "a.atlas.safetensors")
    loaded = load_atlas(tmp_path / "a.atlas.safetensors")
    assert loaded.of_images and loaded.vocabulary == [f"{index:02}.png" for index in range(12)]
    np.testing.assert_array_equal(loaded.probes, atlas.probes)
    np.testing.assert_array_equal(loaded.thumbnails.pixels, atlas.thumbnails.pixels)
    shown = loaded.thumbnails.images.tolist().index(loaded.top["plain"].tokens[2, 3, 0])
    name = loaded.vocabulary[loaded.top["plain"].tokens[2, 3, 0]]
    image = np.asarray(Image.open(tmp_path / "images" / name))
    np.testing.assert_array_equal(loaded.thumbnails.pixels[shown, :, :, 0], image)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": 8},
        {"size": {"height": 8, "width": 8}},
        {"size": {"shortest_edge": 6}, "do_center_crop": True, "crop_size": 8, "resample": 3},
    ],
)
def test_images_are_prepared_as_transformers_does(settings, tmp_path):
    import json

    from transformers import ViTImageProcessorPil

    folder = write_vision(tmp_path / "donor")
    written = {"image_mean": [0.3], "image_std": [0.6], **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    shape = image_shape(open_checkpoint(str(folder)))
    images = write_images(tmp_path / "images", 2, (11, 14))
    ours = images_in(images).read(1, shape)
    assert ours.shape == (1, 8, 8)
    processor = ViTImageProcessorPil(**written)
    theirs = processor(Image.open(images / "01.png"), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose((ours - 0.3) / 0.6, theirs, atol=1e-5)


def test_noise_is_the_same_in_every_size(tmp_path):
    small = image_shape(open_checkpoint(str(write_vision(tmp_path / "small"))))
    folder = write_vision(tmp_path / "large", image_size=16)
    (folder / "preprocessor_config.json").unlink()
    large = image_shape(open_checkpoint(str(folder)))
    assert (large.height, large.mean, large.deviation) == (16, (0.5,), (0.5,))
    noise = noise_images(3)
    halves = torch.nn.functional.avg_pool2d(noise.read(2, large)[None], 2)[0]
    together = torch.corrcoef(torch.stack([halves.ravel(), noise.read(2, small).ravel()]))
    assert together[0, 1] > 0.9
    assert not torch.equal(noise.read(0, small), noise.read(1, small))


def test_other_preprocessing_is_another_atlas(tmp_path):
    folder, images = write_vision(tmp_path / "donor"), write_images(tmp_path / "images")
    arguments = {"images": images, "cache": tmp_path / "cache"}
    first = atlas_of(str(folder), **arguments)
    assert np.array_equal(atlas_of(str(folder), **arguments).probes, first.probes)
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.6", "0.2"))
    assert not np.array_equal(atlas_of(str(folder), **arguments).probes, first.probes)
