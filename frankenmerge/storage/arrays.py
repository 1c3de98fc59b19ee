"""Artefacts on disk: named arrays in a safetensors file whose metadata says what they are."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmerge.errors import fail
from frankenmerge.storage.atomic import replacing_file

if TYPE_CHECKING:
    import numpy as np


def write_arrays(
    path: Path, kind: str, arrays: "dict[str, np.ndarray]", metadata: dict[str, Any]
) -> None:
    """Write an artefact: named arrays, and one JSON object as metadata under the artefact's kind.

    There is a single key because the library writes several in an order that changes from one call
    to the next.
    """
    import numpy as np
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    with replacing_file(path) as partial:
        save_file(contiguous, partial, {kind: json.dumps(metadata, sort_keys=True)})


def read_arrays(
    path: Path, kind: str, expected: str
) -> "tuple[dict[str, np.ndarray], dict[str, Any]]":
    """Read the arrays and the metadata of an artefact.

    Args:
        path: the file.
        kind: the kind that it must have.
        expected: what the file should be, for the error message.

    Raises:
        FrankenmergeError: if the file is missing, unreadable, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            metadata = handle.metadata() or {}
            if kind in metadata:
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return arrays, json.loads(metadata[kind])
        found = f"a file of another kind ({', '.join(metadata) or 'no metadata'})"
    except FileNotFoundError:
        found = "no such file"
    except (OSError, SafetensorError, ValueError) as error:
        found = str(error)
    raise fail(str(path), expected, found, "give another file, or create this one again")


def kind_of(path: Path) -> str | None:
    """The kind of an artefact, or None for any other safetensors file.

    Raises FrankenmergeError for a file that is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            return next(
                (key for key in handle.metadata() or {} if key.startswith("frankenmerge.")), None
            )
    except (OSError, SafetensorError) as error:
        raise fail(str(path), "a safetensors file", str(error), "create it again") from error
