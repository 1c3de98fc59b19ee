"""The atlas: one donor's features; `analyze` writes it, `align` reads it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from frankenmerge.errors import fail
from frankenmerge.storage.arrays import read_arrays, write_arrays

SUFFIX = ".atlas.safetensors"
_KIND = "frankenmerge.atlas/1"
_Part = TypeVar("_Part", "Pictures", "Thumbnails")


class TopTokens(NamedTuple):
    """The top-activating tokens of every feature, best first."""

    tokens: np.ndarray
    """Token ids `[l+1, d, k]`, int32; block 0 is the embedding as it enters the first block."""
    values: np.ndarray
    """Their activations `[l+1, d, k]`, float32."""


class Inputs(NamedTuple):
    """Inputs of several tokens with a high activation of some neurons of every block."""

    neurons: np.ndarray
    """Which neurons were searched `[m]`, int32."""
    tokens: np.ndarray
    """Token ids `[l+1, m, n]`, int32: the `n` tokens found for each of them in every block."""


class Pictures(NamedTuple):
    """Images that were optimised for some neurons of every block of a vision transformer."""

    neurons: np.ndarray
    """Which neurons `[m]`, int32."""
    pixels: np.ndarray
    """`[l+1, m, h, w, c]`, uint8."""
    activations: np.ndarray
    """`[l+1, m]`, float32: standard deviations above the mean of images of noise."""


class Thumbnails(NamedTuple):
    """Small copies of some of the images that a vision transformer was shown."""

    images: np.ndarray
    """Their indices in the vocabulary, ascending `[t]`, int32."""
    pixels: np.ndarray
    """`[t, h, w, c]`, uint8."""


@dataclass(frozen=True)
class Atlas:
    """One donor's features, and its activations on the probes, which all donors share."""

    donor: str
    """The name of the donor as the user gave it."""
    fingerprint: str
    top: dict[str, TopTokens]
    """Complete search by context: `plain` (the token alone) and, if the donor has a BOS, `bos`
    (the token after it).
    """
    probes: np.ndarray
    """Activations `[l+1, n, d]`, float16 after division by `probe_scale`: the residual stream at
    every probed position.
    """
    probe_scale: np.ndarray
    """`[l+1, d]`, float32: each neuron's largest absolute activation on the probes, so that float16
    keeps 11 bits of all.
    """
    vocabulary: list[str]
    """The text of every token; the name of every image, for a vision transformer, whose tokens are
    images.
    """
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, dtype, seed, probe hash, tokenizer hash, blocks that text skips (1-based)."""
    inputs: dict[str, Inputs] = field(default_factory=dict)
    """The inputs of other searches by method: `greedy`, `ascent`, `gradient`."""
    pictures: Pictures | None = None
    """A vision transformer's optimised images, if they were searched."""
    thumbnails: Thumbnails | None = None
    """A vision transformer's top-activating images, of its first neurons."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.probes) - 1

    @property
    def width(self) -> int:
        """Neurons of its residual stream."""
        return self.probes.shape[2]

    @property
    def of_images(self) -> bool:
        """Whether it is a vision transformer's."""
        return self.thumbnails is not None

    def activations(self, block: int) -> np.ndarray:
        """The residual stream after `block` on the probes, `[n, d]` float32."""
        return self.probes[block].astype(np.float32) * self.probe_scale[block]


def save_atlas(atlas: Atlas, path: str | Path) -> None:
    """Write an atlas, complete or not at all."""
    path = Path(path)
    arrays = {"probes": atlas.probes, "probe_scale": atlas.probe_scale}
    for context, top in atlas.top.items():
        arrays |= {f"{context}.tokens": top.tokens, f"{context}.values": top.values}
    for method, inputs in atlas.inputs.items():
        arrays |= {
            f"inputs.{method}.neurons": inputs.neurons,
            f"inputs.{method}.tokens": inputs.tokens,
        }
    for name, part in (("pictures", atlas.pictures), ("thumbnails", atlas.thumbnails)):
        arrays |= {f"{name}.{key}": value for key, value in part._asdict().items()} if part else {}
    arrays["vocabulary"] = np.frombuffer(json.dumps(atlas.vocabulary).encode(), dtype=np.uint8)
    metadata = {
        "donor": atlas.donor,
        "fingerprint": atlas.fingerprint,
        "provenance": atlas.provenance,
    }
    metadata |= {"contexts": list(atlas.top), "inputs": list(atlas.inputs)}
    write_arrays(path, _KIND, arrays, metadata)


def load_atlas(path: str | Path) -> Atlas:
    """Read an atlas. Raises FrankenmergeError for a file that is not one."""
    path = Path(path)
    arrays, metadata = read_arrays(
        path, _KIND, f"an atlas, as `frankenmerge analyze DONOR -o NAME{SUFFIX}` writes it"
    )
    try:
        return Atlas(
            donor=metadata["donor"],
            fingerprint=metadata["fingerprint"],
            top={
                context: TopTokens(arrays[f"{context}.tokens"], arrays[f"{context}.values"])
                for context in metadata["contexts"]
            },
            probes=arrays["probes"],
            probe_scale=arrays["probe_scale"],
            vocabulary=json.loads(arrays["vocabulary"].tobytes()),
            provenance=metadata["provenance"],
            inputs={
                method: Inputs(
                    arrays[f"inputs.{method}.neurons"], arrays[f"inputs.{method}.tokens"]
                )
                for method in metadata.get("inputs", [])  # earlier atlases have none
            },
            pictures=_part(Pictures, "pictures", arrays),
            thumbnails=_part(Thumbnails, "thumbnails", arrays),
        )
    except (KeyError, ValueError) as error:
        raise fail(
            str(path),
            "an atlas with all its parts",
            f"{error} missing or broken",
            "analyze the donor again",
        ) from error


def _part(kind: type[_Part], name: str, arrays: dict[str, np.ndarray]) -> _Part | None:
    """A part that only a vision transformer's atlas has."""
    if not any(key.startswith(f"{name}.") for key in arrays):
        return None
    return kind(**{key: arrays[f"{name}.{key}"] for key in kind._fields})
