"""Atlases of donors: from a file, from the cache, or computed now and cached."""

from collections.abc import Sequence
from pathlib import Path

from frankenmerge.analysis.analyze import cached_analyze, cached_path, work
from frankenmerge.analysis.inputs import TOKENS, even_neurons, with_inputs
from frankenmerge.analysis.pixels import with_pictures
from frankenmerge.artefacts.atlas import Atlas, load_atlas
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.images import is_vision, need_language, need_vision
from frankenmerge.models.images import images_in, noise_images
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.storage.atomic import cache_folder


def atlas_of(
    donor: str | Checkpoint,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    download: bool = False,
    allow_pickle: bool = False,
    untrained: int | None = None,
    images: Path | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Atlas:
    """The atlas in a file, or that of a donor: from the cache, or analyzed now.

    Args:
        donor: an atlas file, a donor as recipes name it, or a donor that is open.
        device: a torch device.
        dtype: the type to compute in.
        download: whether the donor may be fetched from the hub.
        allow_pickle: whether a donor without safetensors is converted.
        untrained: a seed: analyze random weights of the same config, the control.
        images: a folder of images that a vision transformer is shown; images of noise by default.
        cache: where finished atlases are kept; the package's cache folder by default.
        progress: reports inputs times blocks.

    Raises:
        FrankenmergeError: if the file is not an atlas, or the donor cannot be opened or analyzed.
    """
    if not isinstance(donor, Checkpoint):
        if Path(donor).is_file():
            return load_atlas(Path(donor))
        donor = open_donor(donor, download=download, allow_pickle=allow_pickle)
    shown, total, unit = None, 0, "images"
    if images or is_vision(donor.config):
        need_vision(donor, "--images")
        shown = images_in(images) if images else noise_images()
        total = len(shown.names)
    else:
        total, unit = work(donor), "inputs x blocks"
    with progress(f"analyzing {Path(donor.name).name}", total, unit) as advance:
        return cached_analyze(
            donor,
            cache=cache or cache_folder(),
            images=shown,
            untrained=untrained,
            device=device,
            dtype=dtype,
            advance=advance,
        )


def is_cached(donor: Checkpoint, *, dtype: str) -> bool:
    """Whether the donor's atlas is in the package's cache folder."""
    return donor.whole and cached_path(donor, cache_folder(), untrained=None, dtype=dtype).exists()


def add_inputs(
    donor: str | Checkpoint,
    atlas: Atlas,
    method: str,
    neurons: Sequence[int] | None = None,
    tokens: int | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    download: bool = False,
    allow_pickle: bool = False,
    untrained: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Atlas:
    """A donor's atlas with inputs of several tokens: from the cache, or searched now.

    Args:
        donor: the donor, by name or open.
        atlas: its atlas.
        method: `greedy`, `ascent` or `gradient`; for vision transformers `pixels`.
        neurons: which neurons, the same in every block; by default 16, evenly spaced.
        tokens: the length of the inputs; 4 by default.
        device: as for `atlas_of`, like the remaining arguments.
        dtype: see `device`.
        download: see `device`.
        allow_pickle: see `device`.
        untrained: see `device`.
        cache: see `device`.
        progress: reports inputs (greedy, ascent) or features (gradient).

    Raises:
        FrankenmergeError: if the donor cannot be opened, or lacks the neurons or positions.
    """
    if not isinstance(donor, Checkpoint):
        donor = open_donor(donor, download=download, allow_pickle=allow_pickle)
    neurons = neurons or even_neurons(atlas.width)
    if method == "pixels":
        need_vision(donor, "--method pixels")
        total = (atlas.blocks + 1) * len(neurons)
        with progress(f"ascent in {Path(donor.name).name}", total, "features") as advance:
            return with_pictures(
                atlas,
                donor,
                neurons,
                cache=cache or cache_folder(),
                untrained=untrained,
                dtype=dtype,
                device=device,
                advance=advance,
            )
    need_language(donor)
    total, unit = (
        ((atlas.blocks + 1) * len(neurons), "features")
        if method == "gradient"
        else (None, "inputs")
    )
    with progress(f"{method} search in {Path(donor.name).name}", total, unit) as advance:
        return with_inputs(
            atlas,
            donor,
            method,
            neurons,
            cache=cache or cache_folder(),
            tokens=tokens or TOKENS,
            untrained=untrained,
            dtype=dtype,
            device=device,
            advance=advance,
        )
