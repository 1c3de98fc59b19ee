"""How artefacts reach the disk: whole or not at all, as safetensors whose metadata says what they are."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from frankenmerge.errors import fail


def write_file(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename. Raises FrankenmergeError when the disk will not have it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            Path(beside).unlink(missing_ok=True)
    except OSError as error:
        raise fail(str(path), "a file that may be written", str(error), "choose another place or make room") from error


def write_arrays(path: Path, kind: str, arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    """Write an artefact: named arrays, and one JSON object as metadata, its key the kind of the artefact.

    A single key, because the library writes several in an order that changes from one call to the next.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    write_file(path, save(contiguous, {kind: json.dumps(told, sort_keys=True)}))


def read_arrays(path: Path, kind: str, expected: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read an artefact of `kind`. Raises FrankenmergeError, saying what was `expected`, for anything else."""
    try:
        with safe_open(path, "np") as handle:
            metadata = handle.metadata() or {}
            if kind in metadata:
                return {name: handle.get_tensor(name) for name in handle.keys()}, json.loads(metadata[kind])  # noqa: SIM118
        found = f"a file of another kind ({', '.join(metadata) or 'no metadata'})"
    except FileNotFoundError:
        found = "no such file"
    except (OSError, SafetensorError, ValueError) as error:
        found = str(error)
    raise fail(str(path), expected, found, "give another file, or make this one anew")
