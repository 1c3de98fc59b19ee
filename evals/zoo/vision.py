"""Train small vision transformers on the digits that scikit-learn brings along.

Usage: `python evals/zoo/vision.py --out DIR`, some minutes on one core. Writes `vit`, `vit-wide`
(other width, other seed), `vit-untrained` (`vit` before its first step) and the images, as PNG
files in `digits`. Every donor is seeded; batch number `n` is a pure function of (seed, n).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from corpus import is_held_out
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

BATCH, WARM_UP = 64, 100
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


@dataclass(frozen=True)
class Training:
    """How one donor is trained."""

    seed: int
    width: int
    heads: int
    steps: int = 1200
    rate: float = 1e-3


DONORS = {
    "vit": Training(0, 64, 4),
    "vit-wide": Training(1, 96, 6),
    "vit-untrained": Training(0, 64, 4, steps=0),
}


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels `[n, 8, 8]` uint8, labels `[n]`, and whether an image is held out `[n]`."""
    found = load_digits()
    pixels = np.round(found.images * 255 / 16).astype(np.uint8)
    held_out = np.array([is_held_out(name_of(index)) for index in range(len(pixels))])
    return pixels, found.target, held_out


def name_of(index: int) -> str:
    """The name of an image's file."""
    return f"{index:04}.png"


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Pixels as the model takes them, `[n, 1, 8, 8]`."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)[:, None] * 2 - 1


def config_of(donor: Training) -> ViTConfig:
    """The donor's configuration."""
    return ViTConfig(
        hidden_size=donor.width,
        num_hidden_layers=6,
        num_attention_heads=donor.heads,
        intermediate_size=3 * donor.width,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )


def train(donor: Training, pixels: torch.Tensor, labels: torch.Tensor) -> ViTForImageClassification:
    """Train a donor on images with noise."""
    torch.manual_seed(donor.seed)
    model = ViTForImageClassification(config_of(donor))
    optimiser = torch.optim.AdamW(model.parameters(), lr=donor.rate, weight_decay=0.05)
    for step in range(donor.steps):
        random = torch.Generator().manual_seed(donor.seed * 1_000_000 + step)
        rows = torch.randint(len(pixels), (BATCH,), generator=random)
        images = pixels[rows]
        images = images + 0.2 * torch.randn(images.shape, generator=random)
        left = 0.5 * (1 + np.cos(np.pi * step / donor.steps))
        for group in optimiser.param_groups:
            group["lr"] = donor.rate * min(1, (step + 1) / WARM_UP) * left
        loss = cross_entropy(model(pixel_values=images).logits, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Train all donors into OUT, and print their accuracies on the images that are held out."""
    torch.set_num_threads(1)
    pixels, labels, held_out = digits()
    (out / "digits").mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(out / "digits" / name_of(index))
    inputs, targets = normalised(pixels), torch.from_numpy(labels)
    seen = torch.from_numpy(~held_out)
    for name, donor in DONORS.items():
        model = train(donor, inputs[seen], targets[seen])
        with torch.no_grad():
            found = model(pixel_values=inputs[~seen]).logits.argmax(1)
        accuracy = (found == targets[~seen]).float().mean().item()
        model.save_pretrained(out / name)
        (out / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2))
        click.echo(f"{name}: {accuracy:.3f} of {int((~seen).sum())} held-out images")


if __name__ == "__main__":
    main()
