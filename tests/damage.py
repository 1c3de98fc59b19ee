"""Damaged donors and safetensors files, and the faults that they cause."""

import json
import shutil
from pathlib import Path

import pytest

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError

INDEX = "model.safetensors.index.json"


def faults(call, *arguments):
    """The faults that `call` raises, each with four parts."""
    with pytest.raises(FrankenmergeError) as caught:
        call(*arguments)
    assert caught.value.faults
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
    return caught.value.faults


def refused(path) -> tuple:
    return faults(open_checkpoint, str(path))


def places(found) -> list[str]:
    return [fault.place for fault in found]


def copied(donors, name, folder) -> Path:
    return Path(shutil.copytree(donors[name], folder / name))


def raw(header, data: bytes = b"") -> bytes:
    """A safetensors file of any header: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, shape, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path
