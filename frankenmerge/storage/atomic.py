"""How artefacts reach the disk: whole or not at all, as safetensors whose metadata says what they are."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmerge.errors import fail

if TYPE_CHECKING:
    import numpy as np

PROVENANCE = "frankenmerge.json"
"""The file beside a merged checkpoint that names the origin of every tensor."""


def check_place(path: Path) -> None:
    """Raise FrankenmergeError where `growing` could not write `path`: to be asked before what takes hours is computed."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    found = (
        "a folder"
        if path.is_dir()
        else f"{above} is no folder"
        if not above.is_dir()
        else f"{above} may not be written to"
    )
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise fail(str(path), "a file that may be written", found, "choose another place")


@contextmanager
def growing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to; it is synced and takes its place at the end, and goes if that is not reached.

    Raises FrankenmergeError when the disk will not have it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            beside.chmod(0o644)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise fail(
            str(path), "a file that may be written", str(error), "choose another place or make room"
        ) from error


@contextmanager
def growing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files. Where another process was faster, what it made stays.

    Raises FrankenmergeError when the disk will not have it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            yield beside
            for file in beside.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            beside.chmod(0o755)
            if not path.is_dir():
                beside.rename(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        if not path.is_dir():
            raise fail(
                str(path),
                "a folder that may be written",
                str(error),
                "choose another place or make room",
            ) from error


def cache_folder() -> Path:
    """Where that is kept which takes long to make again: atlases, and donors that had to be converted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmerge"


def write_file(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    with growing(path) as beside:
        beside.write_bytes(content)


def write_arrays(
    path: Path, kind: str, arrays: "dict[str, np.ndarray]", told: dict[str, Any]
) -> None:
    """Write an artefact: named arrays, and one JSON object as metadata, its key the kind of the artefact.

    A single key, because the library writes several in an order that changes from one call to the
    next.
    """
    import numpy as np
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    with growing(path) as beside:
        save_file(contiguous, beside, {kind: json.dumps(told, sort_keys=True)})


def read_arrays(
    path: Path, kind: str, expected: str
) -> "tuple[dict[str, np.ndarray], dict[str, Any]]":
    """Read an artefact of `kind`. Raises FrankenmergeError, saying what was `expected`, for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            metadata = handle.metadata() or {}
            if kind in metadata:
                return {name: handle.get_tensor(name) for name in handle.keys()}, json.loads(
                    metadata[kind]
                )  # noqa: SIM118
        found = f"a file of another kind ({', '.join(metadata) or 'no metadata'})"
    except FileNotFoundError:
        found = "no such file"
    except (OSError, SafetensorError, ValueError) as error:
        found = str(error)
    raise fail(str(path), expected, found, "give another file, or make this one anew")


def kind_of(path: Path) -> str | None:
    """The kind of an artefact, or None for other safetensors files. Raises FrankenmergeError for what is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            return next(
                (key for key in handle.metadata() or {} if key.startswith("frankenmerge.")), None
            )
    except (OSError, SafetensorError) as error:
        raise fail(str(path), "a safetensors file", str(error), "make it anew") from error
