"""Inputs of several tokens for some neurons of every block, by one of several searches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

import frankenmerge
from frankenmerge.analysis.ascent import STARTS, ascent_search
from frankenmerge.analysis.features import Feature, check_features
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.artefacts.atlas import Atlas, Inputs
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.models.hooks import blocks_of, embedding_of
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.progress import Advance, ignore
from frankenmerge.storage.arrays import read_arrays, write_arrays

NEURONS = 16
"""How many neurons are searched by default; each costs about as much as a complete search."""
TOKENS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "ascent": {"starts": STARTS, "seed": 0},
    "gradient": {"steps": 100, "target": 100.0, "optimizer": "descent", "seed": 0},
}
"""The settings of each method, recorded in the provenance. For donors with the same vocabulary, the
descent starts from the same tokens.
"""
_KIND = "frankenmerge.inputs/1"


def even_neurons(width: int) -> list[int]:
    """`NEURONS` neurons, or all of fewer, evenly spaced over the width."""
    count = min(NEURONS, width)
    return [width * index // count for index in range(count)]


def search_inputs(
    model: PreTrainedModel,
    method: str,
    neurons: Sequence[int],
    *,
    tokens: int = TOKENS,
    advance: Advance = ignore,
) -> Inputs:
    """Search inputs with a high activation of some neurons, for the embedding and every block.

    Args:
        model: the donor.
        method: `greedy`, `ascent` or `gradient`.
        neurons: which neurons, the same in every block.
        tokens: the length of the inputs.
        advance: called with the number of inputs run (greedy, ascent) or of features done
            (gradient) since its last call.

    Raises:
        FrankenmergeError: if the donor lacks the neurons, or positions for the tokens.
    """
    blocks, width = len(blocks_of(model)), embedding_of(model).shape[1]
    check_features(
        [Feature.of(0, neuron) for neuron in neurons], blocks=blocks, width=width, tokens=tokens
    )
    features = [Feature.of(block, neuron) for block in range(blocks + 1) for neuron in neurons]
    settings = SETTINGS[method]
    if method == "greedy":
        found = greedy_search(model, features, n=tokens, advance=advance, **settings).tokens
    elif method == "ascent":
        found = ascent_search(model, features, n=tokens, advance=advance, **settings).tokens
    else:
        found = (
            gradient_search(model, features, tokens=tokens, advance=advance, **settings)
            .tokens.numpy()
            .astype(np.int32)
        )
    return Inputs(
        np.array(neurons, dtype=np.int32), found.reshape(blocks + 1, len(neurons), tokens)
    )


def with_inputs(
    atlas: Atlas,
    checkpoint: Checkpoint,
    method: str,
    neurons: Sequence[int],
    *,
    cache: Path,
    tokens: int = TOKENS,
    untrained: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    advance: Advance = ignore,
) -> Atlas:
    """The donor's atlas with the result of `search_inputs`, from `cache` or computed now.

    `untrained`, `dtype` and `device` as for `analyze`.
    """
    settings = SETTINGS[method] | {"tokens": tokens}
    key = [checkpoint.fingerprint, untrained, dtype, method, settings, list(neurons)]
    key += [frankenmerge.__version__, torch.__version__, transformers.__version__]
    path = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.inputs.safetensors"
    if path.exists():
        inputs = Inputs(**read_arrays(path, _KIND, "inputs saved by an earlier command")[0])
    else:
        model = load_model(checkpoint, Placement(dtype, device), untrained=untrained)
        inputs = search_inputs(model, method, neurons, tokens=tokens, advance=advance)
        write_arrays(path, _KIND, inputs._asdict(), {"key": key})
    settings_of = atlas.provenance.get("inputs", {}) | {method: settings}
    return replace(
        atlas,
        inputs=atlas.inputs | {method: inputs},
        provenance=atlas.provenance | {"inputs": settings_of},
    )
