"""Images that excite a neuron of a vision transformer, by gradient ascent on pixels.

The priors are those of feature visualization (Olah et al., 2017, doi:10.23915/distill.00007):
the image is shifted at random before a step, blurred less and less, and its total variation is
penalised. Without them the ascent ends in patterns of single pixels. The last quarter of the steps
has neither shifts nor blur: patches do not move with the image, and what excites a neuron on
average over the shifts may be what it likes least where it is.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import conv2d, pad
from transformers import PreTrainedModel

import frankenmerge
from frankenmerge.analysis.features import Feature, check_features
from frankenmerge.artefacts.atlas import Atlas, Pictures
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.images import ImageShape, image_shape
from frankenmerge.models.hooks import Site
from frankenmerge.models.images import noise_images, patch_states
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.progress import Advance, ignore
from frankenmerge.storage.arrays import read_arrays, write_arrays

_KIND = "frankenmerge.pictures/1"
BATCH = 16
"""Images that are optimised together."""
_REFERENCE = 256
"""Images of noise whose activations are the unit."""
_CALM = 1e-8
"""What a feature's standard deviation is at least."""


@dataclass(frozen=True)
class Ascent:
    """How pixels climb."""

    steps: int = 128
    rate: float = 0.05
    """Of Adam; pixels are from 0 to 1."""
    jitter: float = 0.5
    """The longest shift, in patches, within the first three quarters of the steps."""
    blur: float = 0.25
    """Standard deviation of the first blur, in patches; it falls to 0 over the same steps."""
    variation: float = 8.0
    """What a mean absolute difference of 1 between neighbouring pixels costs, in standard
    deviations of the activation.
    """
    seed: int = 0


class Climbed(NamedTuple):
    """The images that were found."""

    pixels: Tensor
    """`[m, c, h, w]` from 0 to 1."""
    activations: Tensor
    """`[m]`, float32: standard deviations above the mean of images of noise."""


def pixel_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    shape: ImageShape,
    ascent: Ascent = Ascent(),  # noqa: B008 - it is immutable
    *,
    site: Site = "block",
    isolated: bool = False,
    advance: Advance = ignore,
) -> Climbed:
    """Find an image with a high activation for every feature.

    A feature's activation is its mean over the patches (over those in `positions`), summed over its
    neurons. It is measured in standard deviations over images of noise, so that the priors weigh
    the same in every block.

    Args:
        model: a vision transformer.
        features: what to maximise.
        shape: of the donor's images.
        ascent: how.
        site: the output of blocks, or of their attention.
        isolated: whether every block gets the input of the first one.
        advance: called with the number of features done since its last call.
    """
    means, deviations = _noise_statistics(model, features, shape, site, isolated)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    found = []
    try:
        for start in range(0, len(features), BATCH):
            part = slice(start, start + BATCH)
            climb = _Climb(
                model, features[part], shape, site, isolated, means[part], deviations[part]
            )
            found.append(climb.run(ascent))
            advance(len(features[part]))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return Climbed(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def activations_of(states: Sequence[Tensor], features: Sequence[Feature]) -> Tensor:
    """Activations `[m, b]`, float32, of features by `b` images, from their patches' states."""
    rows = []
    for feature in features:
        state = states[feature.block][:, :, feature.neurons.start : feature.neurons.stop].float()
        if feature.positions is not None:
            state = state[:, feature.positions.start : feature.positions.stop]
        rows.append(state.mean(dim=1).sum(dim=1))
    return torch.stack(rows)


@torch.no_grad()
def _noise_statistics(
    model: PreTrainedModel,
    features: Sequence[Feature],
    shape: ImageShape,
    site: Site,
    isolated: bool,
) -> tuple[Tensor, Tensor]:
    parts = [
        activations_of(
            patch_states(model, pixels, shape, site=site, isolated=isolated), features
        ).cpu()
        for _, pixels in noise_images(_REFERENCE).batches(shape)
    ]
    deviations, means = torch.std_mean(torch.cat(parts, dim=1), dim=1)
    return means, deviations.clamp_min(_CALM)


class _Climb(NamedTuple):
    """One batch of features on its way."""

    model: PreTrainedModel
    features: Sequence[Feature]
    shape: ImageShape
    site: Site
    isolated: bool
    means: Tensor
    deviations: Tensor

    def run(self, ascent: Ascent) -> tuple[Tensor, Tensor]:
        """The images and their activations; each image depends on its own feature alone."""
        # The same start and the same shifts for every feature: nothing else tells images apart.
        random = torch.Generator().manual_seed(ascent.seed)
        size = (1, self.shape.channels, self.shape.height, self.shape.width)
        start = (0.5 + 0.01 * torch.randn(size, generator=random)).clamp(0, 1)
        pixels = start.repeat(len(self.features), 1, 1, 1).requires_grad_()
        optimiser = torch.optim.Adam([pixels], lr=ascent.rate)
        reach = int(ascent.jitter * self.shape.patch)
        for step in range(ascent.steps):
            left = 1 - step / (0.75 * ascent.steps)
            rows, columns = torch.randint(-reach, reach + 1, (2,), generator=random).tolist()
            shifted = torch.roll(pixels, (rows, columns), dims=(2, 3)) if left > 0 else pixels
            gain = self.activations(shifted) - ascent.variation * total_variation(pixels)
            optimiser.zero_grad()
            (-gain.sum()).backward()
            optimiser.step()
            with torch.no_grad():
                if ascent.blur and left > 0:
                    pixels.copy_(blurred(pixels, left * ascent.blur * self.shape.patch))
                pixels.clamp_(0, 1)
        with torch.no_grad():
            return pixels.detach(), self.activations(pixels)

    def activations(self, pixels: Tensor) -> Tensor:
        """Each feature's activation by its own image, `[m]`, in standard deviations."""
        states = patch_states(
            self.model, pixels, self.shape, site=self.site, isolated=self.isolated
        )
        own = activations_of(states, self.features).diagonal().cpu()
        return (own - self.means) / self.deviations


def total_variation(pixels: Tensor) -> Tensor:
    """The mean absolute difference between neighbouring pixels, `[b]`."""
    down = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    across = (pixels[:, :, :, 1:] - pixels[:, :, :, :-1]).abs().mean(dim=(1, 2, 3))
    return down + across


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Images `[b, c, h, w]` after a Gaussian filter; the border is repeated outwards."""
    reach = min(int(3 * deviation) + 1, *(length - 1 for length in pixels.shape[2:]))
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    line = (line / line.sum()).to(pixels)
    channels = pixels.shape[1]
    padded = pad(pixels, (reach,) * 4, mode="replicate")
    rows = conv2d(padded, line.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return conv2d(rows, line.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)


def bytes_of(pixels: Tensor) -> np.ndarray:
    """Pixels `[..., c, h, w]` from 0 to 1 as `[..., h, w, c]`, uint8."""
    return (255 * pixels.clamp(0, 1)).round().byte().movedim(-3, -1).contiguous().numpy()


def with_pictures(
    atlas: Atlas,
    checkpoint: Checkpoint,
    neurons: Sequence[int],
    *,
    cache: Path,
    untrained: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    advance: Advance = ignore,
) -> Atlas:
    """A vision transformer's atlas with an image for some neurons of every block.

    They come from `cache` or are searched now. `untrained`, `dtype` and `device` as for `analyze`.

    Raises:
        FrankenmergeError: if the donor lacks the neurons.
    """
    shape = image_shape(checkpoint)
    blocks = range(atlas.blocks + 1)
    features = [Feature.of(block, neuron) for block in blocks for neuron in neurons]
    check_features(features, blocks=atlas.blocks, width=atlas.width, tokens=shape.patches)
    settings = asdict(Ascent())
    key = [checkpoint.fingerprint, asdict(shape), untrained, dtype, settings, list(neurons)]
    key += [frankenmerge.__version__, torch.__version__, transformers.__version__]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache / f"{name}.pictures.safetensors"
    if path.exists():
        pictures = Pictures(**read_arrays(path, _KIND, "images saved by an earlier command")[0])
    else:
        model = load_model(checkpoint, Placement(dtype, device), untrained=untrained)
        found = pixel_search(model, features, shape, advance=advance)
        pixels = bytes_of(found.pixels)
        pictures = Pictures(
            np.array(neurons, dtype=np.int32),
            pixels.reshape(len(blocks), len(neurons), *pixels.shape[1:]),
            found.activations.reshape(len(blocks), len(neurons)).numpy(),
        )
        write_arrays(path, _KIND, pictures._asdict(), {"key": key})
    return replace(atlas, pictures=pictures, provenance=atlas.provenance | {"pixels": settings})
