"""Hashes of files."""

import hashlib
from pathlib import Path


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, as the hub identifies the files of a repository."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
