"""Files and folders that are written completely or not at all, and where the cache is."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frankenmerge.errors import fail

_OTHER_PLACE = "choose another path, or free disk space"


def check_place(path: Path) -> None:
    """Raise FrankenmergeError if `replacing_file` could not write `path`.

    To be called before a computation that takes hours.
    """
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    found = (
        "a folder"
        if path.is_dir()
        else f"{parent} is not a folder"
        if not parent.is_dir()
        else f"no permission to write to {parent}"
    )
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise fail(str(path), "a file that can be written", found, "choose another path")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file alongside `path`, which replaces it when the block ends.

    The file is synced before it is renamed, and deleted if the block raises.

    Raises:
        FrankenmergeError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise fail(str(path), "a file that can be written", str(error), _OTHER_PLACE) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder alongside `path`, which becomes `path` when the block ends.

    Its files are synced before it is renamed, and it is deleted if the block raises. If another
    process has created `path` in the meantime, that folder stays.

    Raises:
        FrankenmergeError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        )
        try:
            yield partial
            for file in partial.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            partial.chmod(0o755)
            if not path.is_dir():
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if not path.is_dir():
            raise fail(
                str(path), "a folder that can be written", str(error), _OTHER_PLACE
            ) from error


def moved(folder: Path, target: Path) -> None:
    """Move a complete folder to a place next to its parent that is free, or an empty folder.

    Raises:
        FrankenmergeError: if it cannot be moved.
    """
    try:
        folder.rename(target)
        handle = os.open(target.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise fail(str(target), "a folder that can be written", str(error), _OTHER_PLACE) from error


def cache_folder() -> Path:
    """Cache directory for expensive results: atlases, headers, and donors that were converted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmerge"


def write_file(path: Path, content: bytes) -> None:
    """Write a file, completely or not at all."""
    with replacing_file(path) as partial:
        partial.write_bytes(content)
