"""Whether a finished checkpoint still is what its provenance says."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from frankenmerge.artefacts import provenance as artefact
from frankenmerge.artefacts.provenance import PROVENANCE, Provenance
from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.donors.raw import open_raw
from frankenmerge.donors.shards import TEMPLATES_FOLDER
from frankenmerge.errors import Fault, FrankenmergeError, raise_all
from frankenmerge.merging.copying import CHUNK
from frankenmerge.merging.provenance import origin
from frankenmerge.progress import Advance, Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.splicing.raw import resolve_raw
from frankenmerge.splicing.reading import read_fully
from frankenmerge.splicing.resolve import resolve
from frankenmerge.storage.hashing import file_hash
from frankenmerge.storage.safetensors_header import HEADER_LIMIT, Tensor

_REMEDY = "merge again"


class Verified(NamedTuple):
    """What was found to be right."""

    output: Path
    shards: int
    tensors: int
    hashed: int
    """Shards whose every byte was compared with a checksum."""
    compared: int
    """Tensors whose every byte was compared with their donor's."""
    absent: list[str]
    """Donors that were not found, or have changed: their tensors were not compared."""


def verify(
    folder: Path,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> Verified:
    """Compare the checkpoint in `folder` with its `frankenmerge.json`.

    Always: files, sizes, headers and names. Where all donors are available and unchanged: what
    every tensor is made of. Where its own donor is: the bytes of each copied tensor. Where there
    are checksums: whole shards.

    Args:
        folder: of a merged checkpoint.
        download: whether donors may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        progress: in bytes compared.

    Raises:
        FrankenmergeError: with all that differs.
    """
    record = artefact.load(folder / PROVENANCE)
    checkpoint = open_raw(str(folder)) if record.raw else open_checkpoint(str(folder))
    raise_all([*_file_faults(folder, record), *_name_faults(checkpoint, record)])
    opened = {
        name: _donor(name, donor.fingerprint, download, allow_pickle, raw=bool(record.raw))
        for name, donor in record.donors.items()
    }
    available = {name: donor for name, donor in opened.items() if donor}
    if available.keys() == opened.keys():
        raise_all(_origin_faults(folder, record, available))
    pairs = [
        (name, checkpoint.tensors[name], available[donor], tensor)
        for name, each in record.tensors.items()
        if each.method == "copy"
        and not each.healed
        and (donor := each.donor) in available
        and (tensor := each.tensor)
    ]
    total = sum(tensor.bytes for _, tensor, _, _ in pairs)
    with (
        progress(f"comparing {folder.name}", total, "bytes") as advance,
        ThreadPoolExecutor(2) as pool,
    ):
        differences = [pool.submit(_difference, *pair, advance) for pair in pairs]
        raise_all(filter(None, (difference.result() for difference in differences)))
    absent = [name for name in record.donors if name not in available]
    hashed = sum(shard.sha256 is not None for shard in record.shards.values())
    tensors = len(checkpoint.tensors)
    return Verified(folder, len(record.shards), tensors, hashed, len(pairs), absent)


def _file_faults(folder: Path, record: Provenance) -> Iterator[Fault]:
    for name, expected in record.files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            place, found = str(folder / name), "another one, or none"
            yield Fault(place, "the file that the merge wrote", found, _REMEDY)
    known = {*record.shards, *record.files, PROVENANCE, "README.md"}
    if any(name.startswith(f"{TEMPLATES_FOLDER}/") for name in known):
        known.add(TEMPLATES_FOLDER)
    for file in sorted([*folder.iterdir(), *(folder / TEMPLATES_FOLDER).glob("*")]):
        # The card may be edited, and hidden files are no part of a model.
        if not file.name.startswith(".") and file.relative_to(folder).as_posix() not in known:
            expected, found = "only files of the merge", "one that it did not write"
            yield Fault(str(file), expected, found, "remove it")
    for name, shard in record.shards.items():
        file = folder / name
        if not file.is_file():
            yield Fault(str(file), "a file that the merge wrote", "no such file", _REMEDY)
            continue
        with file.open("rb") as handle:
            length = handle.read(8)
            header = length + handle.read(min(int.from_bytes(length, "little"), HEADER_LIMIT))
        if file.stat().st_size != shard.bytes:
            yield Fault(str(file), f"{shard.bytes:,} bytes", f"{file.stat().st_size:,}", _REMEDY)
        elif hashlib.sha256(header).hexdigest() != shard.header_sha256:
            yield Fault(str(file), "the header that the merge wrote", "another one", _REMEDY)
        elif shard.sha256 is not None and file_hash(file) != shard.sha256:
            yield Fault(str(file), f"SHA-256 {shard.sha256}", "other bytes", _REMEDY)


def _name_faults(checkpoint: Checkpoint, record: Provenance) -> Iterator[Fault]:
    for name in sorted(checkpoint.tensors.keys() ^ record.tensors.keys()):
        found = "one more" if name in checkpoint.tensors else "not there"
        yield Fault(f"{checkpoint.path}: {name}", "the tensors of the provenance", found, _REMEDY)


def _origin_faults(
    folder: Path, record: Provenance, donors: dict[str, Checkpoint]
) -> Iterator[Fault]:
    """Compare the recorded origin of every tensor with what the recipe makes of the donors."""
    path = folder / "recipe.yaml"
    recipe = parse_recipe(path.read_text(encoding="utf-8"), str(path))
    splice = (resolve_raw if record.raw else resolve)(recipe, donors, str(path))
    for operation in splice.operations:
        expected, found = origin(operation).as_json(), record.tensors.get(operation.name)
        if found is not None and record.healing:
            expected |= {"healed": True} if found.healed else {}
        if found is None or found.as_json() != expected:
            wanted = f"{expected}, from recipe.yaml"[:400]
            given = str(found.as_json() if found else None)[:400]
            yield Fault(f"{folder / PROVENANCE}: {operation.name}", wanted, given, _REMEDY)


def _donor(
    name: str, fingerprint: str, download: bool, allow_pickle: bool, *, raw: bool
) -> Checkpoint | None:
    try:
        donor = (
            open_raw(name, download=download)
            if raw
            else open_donor(name, download=download, allow_pickle=allow_pickle)
        )
        return donor if donor.fingerprint == fingerprint else None
    except FrankenmergeError:
        return None


def _difference(
    name: str, ours: Tensor, donor: Checkpoint, source: str, advance: Advance
) -> Fault | None:
    theirs = donor.tensors.get(source)
    if theirs is None or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return Fault(
            f"{ours.file}: {name}",
            f"the type and shape of {donor.name}: {source}",
            f"{ours.dtype} {list(ours.shape)}",
            _REMEDY,
        )
    with ours.file.open("rb", buffering=0) as here, theirs.file.open("rb", buffering=0) as there:
        for start in range(0, ours.bytes, CHUNK):
            stop = min(start + CHUNK, ours.bytes)
            if read_fully(here.fileno(), ours, start, stop) != read_fully(
                there.fileno(), theirs, start, stop
            ):
                found = f"others, between bytes {start:,} and {stop:,} of the tensor"
                return Fault(
                    f"{ours.file}: {name}", f"the bytes of {donor.name}: {source}", found, _REMEDY
                )
            advance(stop - start)
    return None
