"""`frankenmerge.json` of an extracted LoRA: what it was made of, and how well it fits."""

from pathlib import Path
from typing import Literal

from frankenmerge.artefacts.json_files import Record, dump_json, load_json
from frankenmerge.artefacts.provenance import PROVENANCE, DonorRecord

KIND = "frankenmerge.lora/1"
_EXPECTED = "provenance written by `frankenmerge extract-lora`"


class ModuleRecord(Record):
    """One linear map."""

    rank: int
    error: float
    """The Frobenius norm of what the factors, as written, leave out of the difference, over the
    difference's own.
    """
    norm: float
    """The Frobenius norm of the difference."""


class LoraProvenance(Record):
    """The whole file."""

    kind: Literal["frankenmerge.lora/1"]
    frankenmerge: str
    """The version that wrote it."""
    versions: dict[str, str]
    model: str
    base: str
    donors: dict[str, DonorRecord]
    """Model and base, by these names."""
    options: dict[str, int | float | str]
    files: dict[str, str]
    """SHA-256 by name, of all files but this one and the card."""
    modules: dict[str, ModuleRecord]
    """By the module's path in memory."""
    saved: list[str]
    """Modules that are held in full."""


def dump(record: LoraProvenance) -> bytes:
    """The content of the file."""
    return dump_json(record, indent=2)


def load(folder: Path) -> LoraProvenance:
    """Read the file of an adapter's folder. Raises FrankenmergeError for anything else."""
    return load_json(folder / PROVENANCE, LoraProvenance, KIND, _EXPECTED)
