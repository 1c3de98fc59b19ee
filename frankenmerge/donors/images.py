"""Vision transformers: whether a donor is one, and which images it takes. Nothing imports torch."""

from dataclasses import dataclass
from typing import Any

from frankenmerge.donors.architecture import Config
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.storage.safetensors_header import read_json

FAMILIES = (
    *("vit", "dinov2", "dinov2_with_registers", "deit", "vit_msn", "ijepa", "beit"),
    *("data2vec-vision", "clip_vision_model", "siglip_vision_model"),
)
"""Families of transformers whose only input are images, cut into square patches that follow the
special tokens, if there are any.
"""
UNREAD = r"(^|\.)(pooler|classifier|decoder|mask_token|head)(\.|$)"
"""Pattern of tensors that no pass from pixels to the last block reads; a file may have them or not,
whatever class of transformers wrote it.
"""
_PREPROCESSOR = "preprocessor_config.json"
_BILINEAR = 2
"""Pillow's number for it, which preprocessor_config.json uses too."""


def is_vision(config: Config) -> bool:
    """Whether a config describes a vision transformer."""
    return config.get("model_type") in FAMILIES


def need_language(checkpoint: Checkpoint) -> None:
    """Raise FrankenmergeError for a vision transformer."""
    if is_vision(checkpoint.config):
        found = f"a vision transformer ({checkpoint.config['model_type']})"
        remedy = "for one of these: inspect, features, analyze, align, report; merge, whole models"
        raise fail(checkpoint.name, "a language model", found, remedy)


def need_vision(checkpoint: Checkpoint, option: str) -> None:
    """Raise FrankenmergeError for any other donor; `option` needs a vision transformer."""
    if not is_vision(checkpoint.config):
        expected = f"a vision transformer ({', '.join(FAMILIES)})"
        found, remedy = str(checkpoint.config["model_type"]), f"omit {option}, or use another donor"
        raise fail(f"{option}: {checkpoint.name}", expected, found, remedy)


@dataclass(frozen=True)
class ImageShape:
    """The images that a vision transformer takes, and how pixels become its input."""

    height: int
    width: int
    channels: int
    patch: int
    """Pixels along one side of a patch."""
    resize: tuple[int, int] | int | None
    """Height and width to scale an image to, or only its shorter side; the middle is then used.
    None to leave it as it is.
    """
    resample: int
    """How to scale it, as Pillow numbers the filters."""
    scale: float
    """What the value of white becomes, before `mean` and `deviation`."""
    mean: tuple[float, ...]
    """Subtracted, by channel."""
    deviation: tuple[float, ...]
    """Divided by then, by channel."""

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.height // self.patch) * (self.width // self.patch)


def image_shape(checkpoint: Checkpoint) -> ImageShape:
    """What a donor's preprocessor_config.json and config.json say about its images.

    Without the former, images are scaled to the size in config.json, and 0 to 1 becomes -1 to 1, as
    `ViTImageProcessor` has it by default.

    Raises:
        FrankenmergeError: for sizes that are not numbers, or do not fit each other.
    """
    config, path = checkpoint.config, checkpoint.path / _PREPROCESSOR
    written: Any = read_json(path, "a JSON object") if path.is_file() else {}
    if not isinstance(written, dict):
        raise fail(str(path), "a JSON object", type(written).__name__, "restore the file")
    channels, patch = _pair(config.get("num_channels", 3))[0], _pair(config["patch_size"])
    own = _pair(config["image_size"])
    resize = _size(written.get("size")) if written.get("do_resize", True) else None
    crop = _size(written.get("crop_size")) if written.get("do_center_crop") else None
    if not written or (resize is None and crop is None):
        resize = own
    size = crop if crop is not None else resize
    height, width = size if isinstance(size, tuple) else (size or own[0], size or own[1])
    factor = written.get("rescale_factor", 1 / 255) if written.get("do_rescale", True) else 1.0
    normalised = written.get("do_normalize", True)
    shape = ImageShape(
        height,
        width,
        channels,
        patch[0],
        resize,
        int(written.get("resample", _BILINEAR)),
        255 * float(factor),
        _by_channel(written.get("image_mean", 0.5) if normalised else 0.0, channels),
        _by_channel(written.get("image_std", 0.5) if normalised else 1.0, channels),
    )
    raise_all(_faults(shape, patch, str(path if written else checkpoint.path / "config.json")))
    return shape


def _faults(shape: ImageShape, patch: tuple[int, int], place: str) -> list[Fault]:
    faults, remedy = [], "restore the donor's files"
    if shape.channels not in (1, 3):
        found = f"{shape.channels} channels"
        faults.append(Fault(place, "images of one channel or three", found, "use another donor"))
    if patch[0] != patch[1]:
        faults.append(Fault(place, "square patches", f"{patch[0]} x {patch[1]}", remedy))
    if shape.height % shape.patch or shape.width % shape.patch:
        found = f"images of {shape.height} x {shape.width}, patches of {shape.patch}"
        faults.append(Fault(place, "images that patches fill", found, remedy))
    if {len(shape.mean), len(shape.deviation)} != {shape.channels} or 0 in shape.deviation:
        expected = f"mean and standard deviation of {shape.channels} channels"
        faults.append(Fault(place, expected, f"{shape.mean}, {shape.deviation}", remedy))
    return faults


def _pair(value: Any) -> tuple[int, int]:
    """Height and width, from one number or two."""
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return int(height), int(width)


def _size(value: Any) -> tuple[int, int] | int | None:
    """A size in any of the forms of preprocessor_config.json; one number is the shorter side."""
    if not isinstance(value, dict):
        return None if value is None else _pair(value)
    if "shortest_edge" in value:
        return int(value["shortest_edge"])
    return int(value["height"]), int(value["width"])


def _by_channel(value: Any, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value] * channels
    return tuple(float(entry) for entry in values)
