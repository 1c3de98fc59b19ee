"""The provenance of a merge: where every tensor of the checkpoint comes from."""

import hashlib
import platform
from collections.abc import Mapping, Sequence

import frankenmerge
from frankenmerge.artefacts.provenance import (
    DonorRecord,
    GaugeRecord,
    InputRecord,
    Provenance,
    ShardRecord,
    TensorRecord,
)
from frankenmerge.merging.shards import Shard
from frankenmerge.merging.write_plan import WritePlan
from frankenmerge.splicing.operations import (
    Combine,
    Copy,
    Gate,
    Input,
    Operation,
    Perturb,
    Rotate,
    Transplant,
)
from frankenmerge.splicing.rotation import Fit


def provenance_of(
    plan: WritePlan,
    fits: Mapping[int, Fit],
    checksums: Mapping[str, str],
    files: Mapping[str, bytes],
) -> Provenance:
    """Describe a merge.

    A shard is identified by its size and the hash of its header, which cost nothing.

    Args:
        plan: of the merge.
        fits: rotations of slices that have a gauge.
        checksums: hashes of whole shards by name, where requested: they cost a read of every byte.
        files: the small files besides the shards.
    """
    splice = plan.splice
    versions = {"python": platform.python_version()}
    if plan.arithmetics:
        from importlib.metadata import version

        used = ("numpy", *(("torch",) if "torch" in plan.arithmetics else ()))
        versions |= {name: version(name) for name in used}
    gauges = {str(number): _gauge(fit) for number, fit in fits.items()}
    operations = [operation for shard in plan.shards for operation in shard.operations]
    return Provenance.of(
        frankenmerge=frankenmerge.__version__,
        versions=versions,
        arithmetic=sorted(plan.arithmetics) or None,
        recipe_sha256=splice.recipe.key,
        key=splice.key,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        donors={
            name: DonorRecord.of(fingerprint=donor.fingerprint)
            for name, donor in splice.donors.items()
        },
        shards={shard.name: _shard(shard, checksums.get(shard.name)) for shard in plan.shards},
        tensors={operation.name: origin(operation) for operation in operations},
        gauges=gauges or None,
        texts=splice.texts or None,
        raw=splice.raw or None,
        healing=splice.healing,
    )


def _shard(shard: Shard, checksum: str | None) -> ShardRecord:
    header = hashlib.sha256(shard.header).hexdigest()
    return ShardRecord.of(bytes=shard.bytes, header_sha256=header, sha256=checksum)


def _gauge(fit: Fit) -> GaugeRecord:
    return GaugeRecord.of(
        rotation=fit.rotation.hash,
        scale=fit.rotation.scale,
        held_out_r2=1 - fit.residual,
        refined=[rotation.hash for rotation in fit.refined] or None,
    )


def origin(operation: Operation) -> TensorRecord:
    """Where one tensor comes from."""
    if isinstance(operation, Copy) and operation.start is not None:
        return TensorRecord.of(**dict(origin(operation.start)) | {"healed": True})
    if isinstance(operation, Copy):
        return TensorRecord.of(donor=operation.donor, tensor=operation.source, method="copy")
    if isinstance(operation, Rotate):
        return TensorRecord.of(
            donor=operation.given.donor,
            tensor=operation.given.source,
            method="rotate",
            slice=operation.part,
            place=operation.place,
            gain=operation.gain.source if operation.gain else None,
        )
    if isinstance(operation, Gate):
        return TensorRecord.of(method=f"gate {operation.mode}", seed=operation.seed)
    if isinstance(operation, Transplant):
        return TensorRecord.of(
            method=f"transplant {operation.approximation}",
            parameters={"anchors": operation.anchors},
            inputs=[_input(each) for each in operation.read],
        )
    if isinstance(operation, Perturb):
        return TensorRecord.of(
            method="noise",
            parameters={"noise_scale": operation.deviation, "residual_scale": operation.scale},
            seed=operation.seed,
            inputs=[_input(operation.given)],
        )
    return TensorRecord.of(
        method=operation.method,
        parameters=operation.parameters,
        seed=operation.seed,
        inputs=[_input(given) for given in operation.inputs],
        base=_input(operation.base) if operation.base else None,
    )


def _input(given: Input) -> InputRecord:
    rows = list(given.rows.donors) if given.rows else None
    return InputRecord.of(
        donor=given.donor, tensor=given.source, parameters=given.parameters, rows_of=rows
    )


def plan_hash(shards: Sequence[Shard]) -> str:
    """A hash of everything that decides the bytes of the shards, but for the donors' bytes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name} {len(shard.header)} ".encode() + shard.header)
        for operation in shard.operations:
            digest.update(f"{operation.name} {origin(operation)}\n".encode())
            for part in operation.read if isinstance(operation, Combine) else ():
                if part.rows:
                    digest.update(part.rows.origin.tobytes() + part.rows.row.tobytes())
            if isinstance(operation, Transplant):
                digest.update(b"".join(each.tobytes() for each in operation.tokens))
    return digest.hexdigest()
