"""Extracting LoRAs in the tests: at full rank unless another is asked for, and what is refused."""

from pathlib import Path

import pytest

from frankenmerge import api as fm
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.lora_plan import LoraOptions

FULL = LoraOptions(rank=64)


def extracted(model: Path, base: Path, output: Path, options: LoraOptions = FULL):
    return fm.extract_lora(model, base, output, options)


def refused(model: Path, base: Path, output: Path, options: LoraOptions = FULL) -> str:
    """The message of an extraction that leaves nothing."""
    with pytest.raises(FrankenmergeError) as caught:
        extracted(model, base, output, options)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))
    assert all(all(fault) for fault in caught.value.faults)
    return str(caught.value)
