"""From a donor to its atlas."""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

import frankenmerge
from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.probes import LENGTH, SEED, probe_activations, probe_hash, random_probes
from frankenmerge.architectures import quantity
from frankenmerge.atlas import SUFFIX, Atlas, load_atlas, save_atlas
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.models import load_model, load_tokenizer

TOP = 10


def token_texts(checkpoint: Checkpoint) -> list[str]:
    """The text of every token of the vocabulary; ids that the tokenizer does not know are shown as `<id>`."""
    tokenizer = load_tokenizer(checkpoint)
    size = quantity(checkpoint.config, "vocabulary") or 0
    known = min(size, len(tokenizer))
    texts = tokenizer.batch_decode([[index] for index in range(known)], clean_up_tokenization_spaces=False)
    return [*texts, *(f"<{index}>" for index in range(known, size))]


def analyze(
    checkpoint: Checkpoint, *, k: int = TOP, untrained: int | None = None, dtype: str = "float32", device: str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
) -> Atlas:  # fmt: skip
    """Search a donor's features, plain and behind BOS, and record its activations on the random probes.

    With `untrained`, a seed, the donor is a random model of the same config: the control for what training brings about.
    `progress` is called with the number of inputs run since its last call; see `work` for their total.

    Raises:
        FrankenmergeError: for a donor without a tokenizer, or one whose activations are not finite.
    """
    vocabulary = token_texts(checkpoint)
    if (positions := quantity(checkpoint.config, "positions") or LENGTH) < LENGTH:
        raise fail(checkpoint.name, f"a donor made for {LENGTH} positions, the length of a probe", str(positions), "use another donor")
    model = load_model(checkpoint, dtype=dtype, device=device, untrained=untrained)
    probes = random_probes(len(vocabulary))
    top = {context: complete_search(model, k=k, prefix=prefix, progress=progress) for context, prefix in _contexts(checkpoint).items()}
    activations = probe_activations(model, probes, progress)
    scale = np.maximum(np.abs(activations).max(axis=1), np.finfo(np.float32).tiny)
    return Atlas(
        donor=_name(checkpoint, untrained),
        fingerprint=checkpoint.fingerprint,
        top=top,
        probes=(activations / scale[:, None]).astype(np.float16),
        probe_scale=scale,
        vocabulary=vocabulary,
        provenance={
            "frankenmerge": frankenmerge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "dtype": dtype,
            "untrained": untrained,
            "k": k,
            "probes": {"shape": list(probes.shape), "sha256": probe_hash(probes), "seed": SEED},
            "tokenizer": checkpoint.tokenizer_hash,
        },
    )


def cached_analyze(
    checkpoint: Checkpoint, *, cache: Path, untrained: int | None = None, dtype: str = "float32", device: str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
) -> Atlas:  # fmt: skip
    """Return the donor's atlas from the folder `cache`, or analyze the donor and keep the atlas there.

    The fingerprint, the tokenizer, the dtype, the seed of random weights and the versions that could change a value are part of the key.
    """
    key = [
        checkpoint.fingerprint,
        checkpoint.tokenizer_hash,
        dtype,
        untrained,
        TOP,
        frankenmerge.__version__,
        torch.__version__,
        transformers.__version__,
    ]
    path = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}{SUFFIX}"
    if path.exists():
        return replace(load_atlas(path), donor=_name(checkpoint, untrained))
    atlas = analyze(checkpoint, untrained=untrained, dtype=dtype, device=device, progress=progress)
    save_atlas(atlas, path)
    return atlas


def _name(checkpoint: Checkpoint, untrained: int | None) -> str:
    return checkpoint.name if untrained is None else f"{checkpoint.name}, random weights (seed {untrained})"


def _contexts(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    contexts: dict[str, tuple[int, ...]] = {"plain": ()}
    bos = checkpoint.config.get("bos_token_id")
    if isinstance(bos, int) and 0 <= bos < (quantity(checkpoint.config, "vocabulary") or 0):
        contexts["bos"] = (bos,)
    return contexts


def work(checkpoint: Checkpoint) -> int:
    """How many inputs `analyze` runs, for a progress bar."""
    vocabulary = quantity(checkpoint.config, "vocabulary") or 0
    return vocabulary * len(_contexts(checkpoint)) + len(random_probes(vocabulary))
