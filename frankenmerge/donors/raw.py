"""Tensors without a model: a safetensors file, or a folder of them, of any architecture."""

from functools import partial
from pathlib import Path

from frankenmerge.donors.architecture import Architecture
from frankenmerge.donors.checkpoint import Checkpoint, View
from frankenmerge.donors.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    WEIGHTS,
    link_faults,
    read_tensors,
    tensors_in,
)
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.storage.hub import resolve
from frankenmerge.storage.safetensors_header import Tensor, read_header

_NONE = Architecture("", "{}.", (), "", listed=False)
"""Of tensors that are matched by their names alone."""


def open_raw(name: str, *, download: bool = False) -> Checkpoint:
    """Open a file of tensors or a folder of such files; only headers are read.

    Args:
        name: a safetensors file, a folder, `org/name` or `org/name@revision`.
        download: whether a hub id that is not in the local cache may be fetched.

    Raises:
        FrankenmergeError: for a file or folder that is not there, is broken or holds no tensors,
            and for files that hold a tensor twice.
    """
    file = Path(name).expanduser()
    if file.is_file():
        path, tensors = file, read_header(file)
    else:
        path = resolve(name, (WEIGHTS, INDEX_NAME), download)
        raise_all(link_faults(path))
        tensors = _folder_tensors(path)
    if not tensors:
        raise fail(name, "tensors", "none", "name another file")
    return raw_checkpoint(name, path, tensors)


def raw_checkpoint(name: str, path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """Tensors as a donor without config: none of them is part of a block."""
    # A canonical name has `{}` for a block's index, so that other braces are doubled in it.
    names = {each.replace("{", "{{").replace("}", "}}"): each for each in tensors}
    return Checkpoint(name, path, {}, tensors, view=View(_NONE, {("rest", None): names}))


def _folder_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the single file or of the index's shards, or else of all files."""
    if (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists():
        return read_tensors(path, partial(tensors_in, repository=None, download=False))
    files = sorted(path.glob(WEIGHTS))
    if not files:
        remedy = "convert other files, such as pickles, to safetensors first"
        raise fail(str(path), "a folder of safetensors files", "none", remedy)
    found: dict[str, Tensor] = {}
    faults = []
    for file in files:
        header = read_header(file)
        faults += [
            Fault(f"{file}: {name}", "a tensor once", f"also in {found[name].file.name}", "move it")
            for name in header
            if name in found
        ]
        found |= header
    raise_all(faults)
    return found
