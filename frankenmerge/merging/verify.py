"""Whether a finished checkpoint still is what its provenance says."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.provenance import PROVENANCE
from frankenmerge.artefacts.recipe import open_donor, parse_recipe
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.merging.copying import CHUNK
from frankenmerge.merging.provenance import file_hash, origin
from frankenmerge.progress import Advance, ignore
from frankenmerge.splicing.operations import schedule
from frankenmerge.splicing.reading import read_fully
from frankenmerge.storage.safetensors_header import HEADER_LIMIT, Tensor, read_json

_REMEDY = "merge again"


class Verified(NamedTuple):
    """What was found right."""

    output: Path
    shards: int
    tensors: int
    hashed: int
    """Shards whose every byte was held against a checksum."""
    compared: int
    """Tensors whose every byte was held against their donor's."""
    absent: list[str]
    """Donors that are not at hand, or are not what they were: their tensors were not compared."""


def verify(
    folder: Path,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    advance: Advance = ignore,
) -> Verified:
    """Hold the checkpoint in `folder` against its `frankenmerge.json`.

    Files, sizes, headers and names always; what every tensor is said to be made of where all donors
    are at hand, unchanged, and the bytes of copied tensors where their own donors are; whole shards
    where they have checksums. `advance` is called with bytes compared. Raises FrankenmergeError
    with all that differs.
    """
    path = folder / PROVENANCE
    told = read_json(path, "the provenance that a merge writes")
    try:
        checkpoint = open_checkpoint(str(folder))
        raise_all([*_file_faults(folder, told), *_name_faults(checkpoint, told)])
        opened = {
            name: _donor(name, given["fingerprint"], download, allow_pickle)
            for name, given in told["donors"].items()
        }
        at_hand = {name: donor for name, donor in opened.items() if donor}
        if at_hand.keys() == opened.keys():
            raise_all(_origin_faults(folder, told, at_hand))
        pairs = [
            (name, checkpoint.tensors[name], at_hand[given["donor"]], given["tensor"])
            for name, given in told["tensors"].items()
            if given["method"] == "copy" and given["donor"] in at_hand
        ]
        hashed = sum("sha256" in shard for shard in told["shards"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise fail(
            str(path),
            "the provenance that this version's merge writes",
            f"something else: {error!r}",
            _REMEDY,
        ) from error
    with ThreadPoolExecutor(2) as pool:
        differences = [pool.submit(_difference, *pair, advance) for pair in pairs]
    raise_all(filter(None, (difference.result() for difference in differences)))
    absent = [name for name in told["donors"] if name not in at_hand]
    return Verified(
        folder, len(told["shards"]), len(checkpoint.tensors), hashed, len(pairs), absent
    )


def _file_faults(folder: Path, told: dict[str, Any]) -> Iterator[Fault]:
    for name, expected in told["files"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            yield Fault(
                str(folder / name), "the file that the merge wrote", "another one, or none", _REMEDY
            )
    for file in sorted(folder.iterdir()):
        # The card is there to be written on, and hidden files are no part of a model.
        if not file.name.startswith(".") and file.name not in {
            *told["shards"],
            *told["files"],
            PROVENANCE,
            "README.md",
        }:
            yield Fault(
                str(file), "only files of the merge", "one that it did not write", "remove it"
            )
    for name, shard in told["shards"].items():
        file = folder / name
        if not file.is_file():
            yield Fault(str(file), "a file that the merge wrote", "no such file", _REMEDY)
            continue
        with file.open("rb") as handle:
            length = handle.read(8)
            header = length + handle.read(min(int.from_bytes(length, "little"), HEADER_LIMIT))
        if file.stat().st_size != shard["bytes"]:
            yield Fault(str(file), f"{shard['bytes']:,} bytes", f"{file.stat().st_size:,}", _REMEDY)
        elif hashlib.sha256(header).hexdigest() != shard["header_sha256"]:
            yield Fault(str(file), "the header that the merge wrote", "another one", _REMEDY)
        elif "sha256" in shard and file_hash(file) != shard["sha256"]:
            yield Fault(str(file), f"SHA-256 {shard['sha256']}", "other bytes", _REMEDY)


def _name_faults(checkpoint: Checkpoint, told: dict[str, Any]) -> Iterator[Fault]:
    for name in sorted(checkpoint.tensors.keys() ^ told["tensors"].keys()):
        there = name in checkpoint.tensors
        yield Fault(
            f"{checkpoint.path}: {name}",
            "the tensors of the provenance",
            "one more" if there else "not there",
            _REMEDY,
        )


def _origin_faults(
    folder: Path, told: dict[str, Any], donors: dict[str, Checkpoint]
) -> Iterator[Fault]:
    """Hold what the provenance says of every tensor against what the recipe makes of the donors."""
    recipe = parse_recipe(
        (folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml")
    )
    made = {operation.name: origin(operation) for operation in schedule(recipe, donors)}
    for name, expected in json.loads(json.dumps(made)).items():
        if (found := told["tensors"].get(name)) != expected:
            yield Fault(
                f"{folder / PROVENANCE}: {name}",
                f"{expected}, as recipe.yaml has it"[:400],
                str(found)[:400],
                _REMEDY,
            )


def _donor(name: str, fingerprint: str, download: bool, allow_pickle: bool) -> Checkpoint | None:
    try:
        donor = open_donor(name, download=download, allow_pickle=allow_pickle)
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
