"""Tiny vision transformers and images, written by the tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from frankenmerge.models.quiet import quiet

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
CLASSES = {
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2-body": "Dinov2Model",
}
PROCESSOR = {
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.3],
    "image_std": [0.6],
}


def write_vision(folder: Path, kind: str = "vit", seed: int = 0, **changes) -> Path:
    """Write a random vision transformer, one of `CLASSES`, and return its folder."""
    import transformers

    sizes = {"mlp_ratio": 2} if kind.startswith("dinov2") else {"intermediate_size": 24}
    config = transformers.AutoConfig.for_model(kind.split("-")[0], **SHAPE | sizes | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[kind])(config)
    with torch.no_grad(), quiet():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def write_images(folder: Path, count: int = 12, size: tuple[int, int] = (8, 8)) -> Path:
    """Write random grey images as PNG files, and return their folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, size=size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder
