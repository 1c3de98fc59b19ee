"""Tokens to heal on: sampled once and kept, or texts; three parts that share no rows."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from frankenmerge.evaluation.domains import (
    LENGTH,
    TARGET_BYTES,
    Domain,
    generated,
    stages,
    with_target,
)
from frankenmerge.healing.training import ROWS
from frankenmerge.models.sampling import sample_unprompted
from frankenmerge.storage.atomic import replacing_file

FITTING, STOPPING, CONFIRMING = 512, 64, 128
"""Rows of every donor's tokens: to heal on at least, to decide when to stop, to be judged by."""
USES = 5
"""How often a row is trained on at most; for many steps more are sampled."""
SHARES = (0.6, 0.15, 0.25)
"""The same of a text, as shares of its units."""


def fitting_rows(steps: int, donors: int) -> int:
    """How many rows of every donor's tokens to heal on for so many steps."""
    return max(FITTING, math.ceil(steps * ROWS / donors / USES))


def probability_bytes(rows: int, donors: int, vocabulary: int, *, taught: bool) -> int:
    """How much memory the probabilities take that are computed once, on sampled tokens.

    Those of the parts are kept where they take at most `TARGET_BYTES`, a donor's in each held-out
    part, and the teachers' of all tokens to heal on.

    Args:
        rows: of every donor's tokens, to heal on.
        donors: how many.
        vocabulary: number of tokens in it.
        taught: whether there is a teacher.
    """
    row = (LENGTH - 1) * vocabulary * 4
    parts = [STOPPING * row] * donors + [CONFIRMING * row] * donors
    parts += [rows * row * donors] if taught else []
    return sum(part for part in parts if part <= TARGET_BYTES)


class Tokens(NamedTuple):
    """What a model is healed on and measured on; no part shares rows with another."""

    fitting: list[Domain]
    stopping: list[Domain]
    confirming: list[Domain]

    @property
    def hash(self) -> str:
        """SHA-256 of the token ids of all parts, and of which count."""
        digest = hashlib.sha256()
        for domain in (*self.fitting, *self.stopping, *self.confirming):
            digest.update(json.dumps([domain.name, list(domain.ids.shape)]).encode())
            digest.update(domain.ids.numpy().tobytes())
            digest.update(domain.counted.numpy().tobytes())
        return digest.hexdigest()


def sampled_tokens(
    models: Mapping[str, PreTrainedModel],
    fingerprints: Mapping[str, str],
    fitting: int,
    seed: int,
    kept: Path,
) -> Tokens:
    """What every model generates; read from the file `kept` if it was sampled before.

    Args:
        models: by name.
        fingerprints: of these models, by name.
        fitting: rows of each to heal on.
        seed: of the sampling.
        kept: a safetensors file; written where it is absent, or of other models.
    """
    rows = (fitting, STOPPING, CONFIRMING)
    identity = json.dumps([[fingerprints[name] for name in models], seed, rows, LENGTH])
    ids = _kept(kept, identity)
    if ids is None:
        ids = {
            str(place): sample_unprompted(model, sum(rows), LENGTH, seed)
            for place, model in enumerate(models.values())
        }
        with replacing_file(kept) as partial:
            save_file(ids, partial, {"identity": identity})
    parts: list[list[Domain]] = [[], [], []]
    for place, (name, model) in enumerate(models.items()):
        for part, own in zip(parts, ids[str(place)].split(rows), strict=True):
            domain = generated(name, own.contiguous())
            part.append(domain if part is parts[0] else with_target(domain, model))
    return Tokens(*parts)


def text_tokens(domains: Sequence[Domain]) -> Tokens:
    """Texts, cut into the three parts."""
    return Tokens(*stages(domains, SHARES))


def _kept(file: Path, identity: str) -> dict[str, torch.Tensor] | None:
    if not file.is_file():
        return None
    with safe_open(file, "pt") as handle:
        if (handle.metadata() or {}).get("identity") != identity:
            return None
        return {name: handle.get_tensor(name) for name in handle.keys()}
