"""Donors with one parent, of which parts were changed; and texts in the tests' letters."""

import re
from pathlib import Path

import numpy as np
import torch
from conftest import changed

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.models.loading import load_model

BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def noisy(parent: Path, folder: Path, share: float, blocks=range(99), seed: int = 0) -> Path:
    """Replace a share of the matrices' variance in some blocks by noise; 1 destroys them."""
    rng = np.random.default_rng(seed)

    def tensors(arrays):
        for name in sorted(arrays):
            found = BLOCK.search(name)
            if found and int(found[1]) in blocks and arrays[name].ndim > 1:
                noise = rng.normal(0, arrays[name].std(), arrays[name].shape)
                made = (1 - share) ** 0.5 * arrays[name] + share**0.5 * noise
                arrays[name] = made.astype(arrays[name].dtype)
        return arrays

    return changed(parent, folder, tensors)


def aligned(first: Path, second: Path) -> Alignment:
    atlases = [analyze(open_checkpoint(str(path))) for path in (first, second)]
    return align(*atlases)


def opened(*paths: Path) -> dict[str, Checkpoint]:
    return {str(path): open_checkpoint(str(path)) for path in paths}


@torch.no_grad()
def text_from(donor: Path, rows: int, seed: int = 0, length: int = 64) -> str:
    """Letters that a donor generates, `rows` times what follows the start token in its positions.

    The start token is never drawn, so that letters are read as they were generated.
    """
    model = load_model(open_checkpoint(str(donor)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    while ids.shape[1] < length:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, 0] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return "".join(LETTERS[token - 1] for token in ids[:, 1:].flatten().tolist())
