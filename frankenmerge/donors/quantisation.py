"""Quantised donors: whose weights are stored in few bits, together with their scales."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frankenmerge.donors.architecture import Config
from frankenmerge.errors import Fault
from frankenmerge.storage.dtypes import COMPUTED

DEQUANTISE = "save it dequantised with transformers (from_pretrained, then save_pretrained)"


Scheme = Mapping[str, Any]
"""The quantization_config of a config.json."""


def scheme(config: Config, dtypes: Iterable[str]) -> Scheme | None:
    """How a donor is quantised; None for plain weights, even if config.json has a scheme.

    Args:
        config: the donor's.
        dtypes: the types of its tensors, by their names in safetensors.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    plain = all(dtype in COMPUTED for dtype in dtypes)
    return found if isinstance(found, Mapping) and not plain else None


def title(found: Scheme | None) -> str:
    """A short name of a donor's quantisation: `fp8`, `mxfp4`, `gptq`, ..."""
    if found is None:
        return "none"
    return str(found.get("quant_method") or found.get("format") or "quantised")


def names_blocks(found: Scheme | None) -> bool:
    """Whether the scheme names single blocks by their index, which splicing would change."""
    return re.search(r"\b(layers|h|blocks)\b\W+\d", json.dumps(found)) is not None


def gguf_fault(name: str) -> Fault | None:
    """The fault of a folder or file in GGUF alone; None for any other name."""
    if not os.path.exists(expanded := os.path.expanduser(name)):  # also for invalid paths
        return None
    path = Path(expanded)
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not files or files[0].suffix != ".gguf" or any(path.glob("*.safetensors")):
        return None
    remedy = (
        f"dequantise it: AutoModelForCausalLM.from_pretrained({str(files[0].parent)!r}, "
        f"gguf_file={files[0].name!r}).save_pretrained(FOLDER), and the same with AutoTokenizer"
    )
    return Fault(str(path), "a checkpoint in safetensors", "GGUF", remedy)
