"""Images as a vision transformer takes them, and what its blocks make of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from frankenmerge.donors.images import ImageShape
from frankenmerge.errors import fail
from frankenmerge.models.hooks import Site, backbone, block_outputs

BATCH = 32
NOISE, SEED = 1024, 0
"""How many images of noise there are, and their seed."""
_SUFFIXES = (".png", ".jpg", ".jpeg")
_SIDE = 64
"""Pixels along one side of an image of noise, before it is scaled."""


@dataclass(frozen=True)
class ImageSet:
    """Images that several donors are shown, each in its own size."""

    names: tuple[str, ...]
    identity: str
    """A hash of their content."""
    read: Callable[[int, ImageShape], Tensor]
    """The image of an index as pixels `[c, h, w]` from 0 to 1."""

    def batches(self, shape: ImageShape) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices `[b]` and their pixels `[b, c, h, w]`, all images in order."""
        for indices in torch.arange(len(self.names)).split(BATCH):
            yield indices, torch.stack([self.read(index, shape) for index in indices.tolist()])


def images_in(folder: Path) -> ImageSet:
    """All PNG and JPEG files of a folder and the folders in it, by name.

    Raises:
        FrankenmergeError: if there are fewer than two, or without Pillow.
    """
    files = sorted(
        path
        for path in (folder.rglob("*") if folder.is_dir() else ())
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    if len(files) < 2:
        found = f"{len(files)} of them" if folder.is_dir() else "no such folder"
        expected = f"a folder of images ({', '.join(_SUFFIXES)}), two at least"
        raise fail(str(folder), expected, found, "give another folder")
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    names = tuple(path.relative_to(folder).as_posix() for path in files)
    return ImageSet(names, digest.hexdigest()[:16], lambda i, shape: _opened(files[i], shape))


def _opened(path: Path, shape: ImageShape) -> Tensor:
    """An image as pixels `[c, h, w]` from 0 to 1, scaled as transformers' processors do."""
    try:
        from PIL import Image
    except ImportError as error:
        remedy = "pip install 'frankenmerge[vision]'"
        raise fail(str(path), "Pillow, to read it", "not installed", remedy) from error
    try:
        with Image.open(path) as file:
            image = file.convert("L" if shape.channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise fail(str(path), "an image", str(error), "remove it from the folder") from error
    if shape.resize is not None:
        height, width = _scaled(image.height, image.width, shape.resize)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling(shape.resample))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return _middle(pixels, shape)


def _scaled(height: int, width: int, to: tuple[int, int] | int) -> tuple[int, int]:
    if isinstance(to, tuple):
        return to
    short = min(height, width)
    return int(to * height / short), int(to * width / short)


def _middle(pixels: Tensor, shape: ImageShape) -> Tensor:
    """The middle of an image, with a black border where it is too small."""
    height, width = pixels.shape[1:]
    whole = pixels.new_zeros(len(pixels), max(height, shape.height), max(width, shape.width))
    top, left = (whole.shape[1] - height + 1) // 2, (whole.shape[2] - width + 1) // 2
    whole[:, top : top + height, left : left + width] = pixels
    top, left = (whole.shape[1] - shape.height) // 2, (whole.shape[2] - shape.width) // 2
    return whole[:, top : top + shape.height, left : left + shape.width]


def noise_images(count: int = NOISE) -> ImageSet:
    """Random images whose amplitudes fall with the frequency, as those of photographs do.

    The same for donors of all sizes, each scaled to its own.
    """
    identity = f"noise {count}, seed {SEED}"
    return ImageSet(tuple(f"noise {index}" for index in range(count)), identity, _noise)


def _noise(index: int, shape: ImageShape) -> Tensor:
    random = torch.Generator().manual_seed(SEED * NOISE + index)
    white = torch.randn(3, _SIDE, _SIDE, generator=random)[: shape.channels]
    rows, columns = torch.fft.fftfreq(_SIDE)[:, None], torch.fft.rfftfreq(_SIDE)[None]
    frequency = (rows**2 + columns**2).sqrt().clamp_min(1 / _SIDE)
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(_SIDE, _SIDE))
    deviation, mean = torch.std_mean(pink)
    size = (shape.height, shape.width)
    scaled = interpolate(
        (0.5 + 0.25 * (pink - mean) / deviation)[None], size, mode="bilinear", antialias=True
    )
    return scaled[0].clamp(0, 1)


def normalised(pixels: Tensor, shape: ImageShape) -> Tensor:
    """Pixels `[b, c, h, w]` from 0 to 1 as the model takes them."""
    mean, deviation = (
        pixels.new_tensor(values)[:, None, None] for values in (shape.mean, shape.deviation)
    )
    return (pixels * shape.scale - mean) / deviation


def patch_states(
    model: PreTrainedModel,
    pixels: Tensor,
    shape: ImageShape,
    *,
    site: Site = "block",
    isolated: bool = False,
) -> list[Tensor]:
    """The states of all patches: what enters the first block, then every block's output.

    Args:
        model: a vision transformer.
        pixels: `[b, c, h, w]` from 0 to 1.
        shape: of the donor.
        site: the output of blocks, or of their attention.
        isolated: whether every block gets the input of the first one.

    Returns:
        `l + 1` tensors `[b, patches, d]`; special tokens, which come first, are left out.

    Raises:
        FrankenmergeError: for images of a size that the model does not take.
    """
    device = next(model.parameters()).device
    values = normalised(pixels.to(device), shape).to(model.dtype)
    with block_outputs(model, site=site, isolated=isolated) as states:
        try:
            body: Any = backbone(model)
            body(pixel_values=values)
        except ValueError as error:
            place, remedy = "preprocessor_config.json", "correct the sizes there"
            raise fail(place, "images that the model takes", str(error), remedy) from error
        return [state[:, -shape.patches :] for state in states]


def patch_means(states: Sequence[Tensor]) -> Tensor:
    """Activations of all neurons `[l+1, b, d]`, float32: the mean over an image's patches."""
    return torch.stack([state.float().mean(dim=1) for state in states])
