"""Folders that exist as long as they are needed, and files that exist in memory alone."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, removed at the end with all that is in it."""
    with TemporaryDirectory(prefix="frankenmerge-") as folder:
        yield Path(folder)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files, given by their paths within the folder, which may name further folders."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@contextmanager
def file_in_memory(path: Path) -> Iterator[int]:
    """A file at `path` whose content is in memory, where the system can (Linux); open for writing.

    Elsewhere its content is on disk.
    """
    if not hasattr(os, "memfd_create"):
        with path.open("w+b") as file:
            yield file.fileno()
        return
    handle = os.memfd_create(path.name)
    try:
        path.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
        yield handle
    finally:
        os.close(handle)
