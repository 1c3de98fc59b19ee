"""What an atlas says of where it comes from."""

import platform
from typing import Any

import torch
import transformers

import frankenmerge
from frankenmerge.donors.checkpoint import Checkpoint


def analyzed_name(checkpoint: Checkpoint, untrained: int | None) -> str:
    """A donor's name, or that of random weights of its config by their seed."""
    if untrained is None:
        return checkpoint.name
    return f"{checkpoint.name}, random weights (seed {untrained})"


def analysis_provenance(
    *, dtype: str, untrained: int | None, k: int, **more: Any
) -> dict[str, Any]:
    """Versions and arguments of an analysis, and what is particular to it."""
    return {
        "frankenmerge": frankenmerge.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": dtype,
        "untrained": untrained,
        "k": k,
        **more,
    }
