"""`frankenmerge.json`: where every tensor of a checkpoint comes from, and how to tell whether it is still the same."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import frankenmerge
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.merging.shards import Shard
from frankenmerge.splicing.operations import Combine, Copy, Input, Operation, Rotate

if TYPE_CHECKING:
    from frankenmerge.merging.plan import Plan
    from frankenmerge.splicing.gauge_fitting import Fit


def provenance(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    plan: "Plan",
    fits: "Mapping[int, Fit]",
    checksums: Mapping[str, str],
    files: Mapping[str, bytes],
) -> dict[str, Any]:
    """Return what `frankenmerge.json` holds.

    A shard is told by its size and the hash of its header, which cost nothing; `checksums`, hashes
    of whole shards by name, cost a read of every byte and are there when they were asked for.
    `files` are the small files beside them.
    """
    operations = [operation for shard in plan.shards for operation in shard.operations]
    versions = {"python": platform.python_version()}
    if plan.arithmetics:
        from importlib.metadata import version

        versions |= {
            name: version(name)
            for name in ("numpy", *(("torch",) if "torch" in plan.arithmetics else ()))
        }
    gauges = {str(number): _gauge(fit) for number, fit in fits.items()}
    texts = texts_of(recipe)
    return {
        "frankenmerge": frankenmerge.__version__,
        "versions": versions,
        **({"arithmetic": sorted(plan.arithmetics)} if plan.arithmetics else {}),
        "recipe_sha256": hashlib.sha256(recipe.dump().encode()).hexdigest(),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "donors": {name: {"fingerprint": donor.fingerprint} for name, donor in donors.items()},
        "shards": {
            shard.name: {
                "bytes": shard.bytes,
                "header_sha256": hashlib.sha256(shard.header).hexdigest(),
            }
            | ({"sha256": checksums[shard.name]} if shard.name in checksums else {})
            for shard in plan.shards
        },
        "tensors": {operation.name: origin(operation) for operation in operations},
        **({"gauges": gauges} if gauges else {}),
        **({"texts": texts} if texts else {}),
    }


def texts_of(recipe: Recipe) -> dict[str, str]:
    """The texts that a recipe's gauges are fitted to, each with its hash."""
    gauges = (part.gauge for part in recipe.stack.slices or [])
    return {
        gauge.fit: file_hash(Path(gauge.fit)) for gauge in gauges if gauge and gauge.fit != "probes"
    }


def _gauge(fit: "Fit") -> dict[str, Any]:
    refined = {"refined": [rotation.hash for rotation in fit.refined]} if fit.refined else {}
    return {
        "rotation": fit.rotation.hash,
        "scale": fit.rotation.scale,
        "held_out_r2": 1 - fit.residual,
        **refined,
    }


def origin(operation: Operation) -> dict[str, Any]:
    """Where one tensor comes from."""
    if isinstance(operation, Copy):
        return {"donor": operation.donor, "tensor": operation.source, "method": "copy"}
    if isinstance(operation, Rotate):
        gain = {"gain": operation.gain.source} if operation.gain else {}
        place = {"slice": operation.part, "place": operation.place}
        return {
            "donor": operation.given.donor,
            "tensor": operation.given.source,
            "method": "rotate",
            **place,
            **gain,
        }
    return {
        "method": operation.method,
        "parameters": operation.parameters,
        "seed": operation.seed,
        "inputs": [_part(part) for part in operation.inputs],
        **({"base": _part(operation.base)} if operation.base else {}),
    }


def _part(part: Input) -> dict[str, Any]:
    rows = {"rows_of": list(part.rows.donors)} if part.rows else {}
    return {"donor": part.donor, "tensor": part.source, "parameters": part.parameters, **rows}


def plan_hash(shards: Sequence[Shard]) -> str:
    """A hash of everything that decides the bytes of the shards, but for the donors' bytes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name} {len(shard.header)} ".encode() + shard.header)
        for operation in shard.operations:
            digest.update(f"{operation.name} {origin(operation)}\n".encode())
            for part in (
                [*operation.inputs, operation.base] if isinstance(operation, Combine) else []
            ):
                if part and part.rows:
                    digest.update(part.rows.origin.tobytes() + part.rows.row.tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, as the hub names the files of a repository."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
