"""The features of vision transformers: which of a set of images excite a neuron most.

A neuron is one index of the residual stream, and its activation by an image is the mean over the
image's patches; special tokens such as CLS are left out.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from frankenmerge.analysis.provenance import analysis_provenance, analyzed_name
from frankenmerge.analysis.ranking import merge, pack, top_tokens
from frankenmerge.artefacts.atlas import Atlas, Thumbnails, TopTokens
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.images import ImageShape, image_shape
from frankenmerge.models.hooks import Site
from frankenmerge.models.images import ImageSet, patch_means, patch_states
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.progress import Advance, ignore

MOST_PROBES = 1024
"""Images whose activations an atlas keeps; of more, as many evenly spaced ones."""
SHOWN_NEURONS, SHOWN_IMAGES, SIDE = 16, 5, 64
"""First neurons of which an atlas keeps so many top-activating images, and their longest side."""


@torch.no_grad()
def top_images(
    model: PreTrainedModel,
    images: ImageSet,
    shape: ImageShape,
    *,
    k: int,
    site: Site = "block",
    isolated: bool = False,
    bottom: bool = False,
    probes: Sequence[int] = (),
    advance: Advance = ignore,
) -> tuple[TopTokens, np.ndarray]:
    """Rank all images by every neuron's activation, in every block.

    Args:
        model: a vision transformer.
        images: what to rank.
        shape: of the donor's images.
        k: how many images to keep for every neuron.
        site: the output of blocks, or of their attention.
        isolated: whether every block gets the input of the first one.
        bottom: whether to keep the images with the lowest activations.
        probes: ascending indices of images whose activations are returned.
        advance: called with the number of images done since its last call.

    Returns:
        The best images, indices `[l+1, d, k]`; of equal ones the first. And activations of `probes`
        `[l+1, n, d]`, float32.

    Raises:
        FrankenmergeError: if an activation is not finite.
    """
    sign = -1.0 if bottom else 1.0
    best: list[Tensor] = []
    kept: list[Tensor] = []
    wanted = torch.tensor(probes, dtype=torch.long)
    for indices, pixels in images.batches(shape):
        means = patch_means(patch_states(model, pixels, shape, site=site, isolated=isolated)).cpu()
        places = range(len(means))
        keys = [pack(sign * means[i].T, indices, f"block {i}") for i in places]
        best = [merge(best[i] if best else None, keys[i], k) for i in places]
        kept.append(means[:, torch.isin(indices, wanted)])
        advance(len(indices))
    return top_tokens(torch.stack(best), sign), torch.cat(kept, dim=1).numpy()


def analyze_images(
    checkpoint: Checkpoint,
    images: ImageSet,
    *,
    k: int,
    untrained: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    advance: Advance = ignore,
) -> Atlas:
    """Rank images by a vision transformer's features, and record its activations.

    The atlas has images in the place of tokens: those of `images` are its vocabulary and its
    probes. The donor must fit into memory.

    Args:
        checkpoint: the donor.
        images: the images, the same for all donors to be aligned.
        k: how many images to keep for every neuron.
        untrained: a seed: analyze a random model of the same config, the control.
        dtype: the type to compute in.
        device: a torch device.
        advance: called with the number of images done since its last call.

    Raises:
        FrankenmergeError: for sizes of images that do not fit the donor, or activations that are
            not finite.
    """
    shape = image_shape(checkpoint)
    model = load_model(checkpoint, Placement(dtype, device), untrained=untrained)
    count = len(images.names)
    probes = [count * index // min(count, MOST_PROBES) for index in range(min(count, MOST_PROBES))]
    top, states = top_images(model, images, shape, k=k, probes=probes, advance=advance)
    scales = np.maximum(np.abs(states).max(axis=1), np.finfo(np.float32).tiny)
    shown = np.unique(top.tokens[:, :SHOWN_NEURONS, :SHOWN_IMAGES])
    small = [thumbnail(images.read(index, shape)) for index in shown.tolist()]
    return Atlas(
        donor=analyzed_name(checkpoint, untrained),
        fingerprint=checkpoint.fingerprint,
        top={"plain": top},
        probes=(states / scales[:, None]).astype(np.float16),
        probe_scale=scales,
        vocabulary=list(images.names),
        provenance=analysis_provenance(
            dtype=dtype,
            untrained=untrained,
            k=k,
            probes={"images": count, "content": images.identity},
            image_shape=asdict(shape),
        ),
        thumbnails=Thumbnails(shown.astype(np.int32), np.stack(small)),
    )


def thumbnail(pixels: Tensor) -> np.ndarray:
    """Pixels `[c, h, w]` from 0 to 1 as `[h, w, c]`, uint8, with `SIDE` pixels at most a side."""
    longest = max(pixels.shape[1:])
    if longest > SIDE:
        size = tuple(max(1, length * SIDE // longest) for length in pixels.shape[1:])
        pixels = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
