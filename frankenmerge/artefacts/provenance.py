"""`frankenmerge.json` in a merged checkpoint: the origin of every tensor, hashes of all files."""

from pathlib import Path
from typing import Any

from frankenmerge.artefacts.json_files import Record, dump_json, load_json, parse_json, save_json

PROVENANCE = "frankenmerge.json"
"""The name of the file."""
HEALING = "healing.json"
"""The same for an adapter, which has no tensors of donors: only how it was trained."""
KIND = "frankenmerge.provenance/1"
"""The kind of these files; files of version 1 do not state it."""
_EXPECTED = "provenance written by `frankenmerge merge`"


class DonorRecord(Record):
    """A donor, identified by the hash of its content."""

    fingerprint: str


class ShardRecord(Record):
    """A file of tensors."""

    bytes: int
    header_sha256: str
    sha256: str | None = None
    """Of the whole file, where checksums were requested."""


class InputRecord(Record):
    """A donor's tensor from which another one is computed."""

    donor: str
    tensor: str
    parameters: dict[str, Any] = {}
    """Of the merge method, for this tensor."""
    rows_of: list[str] | None = None
    """Donors of the rows, where a vocabulary was merged."""


class TensorRecord(Record):
    """Where one tensor comes from: a copy or rotation of one tensor, or a merge of several."""

    donor: str | None = None
    tensor: str | None = None
    method: str
    """`copy`, `rotate`, or a merge method."""
    slice: int | None = None
    """The recipe's slice whose gauge rotated the tensor."""
    place: int | None = None
    """The block within the slice, from 0; -1 for final norm and head."""
    gain: str | None = None
    """The tensor of the norm whose gain was folded into this one."""
    parameters: dict[str, Any] | None = None
    seed: int | None = None
    inputs: list[InputRecord] | None = None
    base: InputRecord | None = None
    healed: bool | None = None
    """Whether it was trained since; all else is about what it was before."""

    @property
    def source(self) -> tuple[str, str] | None:
        """Donor and name of the tensor, or of the first of several; None where none is named."""
        first = self.inputs[0] if self.inputs else self
        return (first.donor, first.tensor) if first.donor and first.tensor else None


class GaugeRecord(Record):
    """The rotation that was fitted for a slice."""

    rotation: str
    """Hash of the matrix."""
    scale: float
    held_out_r2: float
    """R squared on inputs that the rotation was not fitted on."""
    refined: list[str] | None = None
    """Hashes of the rotations within blocks."""


class CurveRecord(Record):
    """The loss at one step of healing."""

    step: int
    nats: float
    """Nats per token on the tokens that decide when to stop."""


class ComparedRecord(Record):
    """A model that the healed one is compared with, on the same tokens."""

    name: str
    nats: float
    """Its loss per token."""
    difference: float
    """Nats per token of the healed model minus its own; below 0 the healed model is better."""
    interval: tuple[float, float]
    """95 %, paired."""


class HealingRecord(Record):
    """How tensors were trained, and what it changed."""

    scope: str
    """`seams`, `norms`, `lora` or `all`."""
    teacher: str
    """`ensemble`, `donor`, `best-per-domain` or `none`."""
    teachers: list[str]
    """The donors that taught."""
    mix: float
    """Share of the text's own loss in what was minimised; the rest is the teacher's divergence."""
    on: list[str]
    """Texts, or the donors whose tokens were sampled."""
    sampled: bool
    tokens_sha256: str
    seed: int
    steps: int
    """Whose weights were kept."""
    tokens: int
    """Predicted in all these steps."""
    rate: float
    """Highest learning rate."""
    curve: list[CurveRecord]
    measured_on: list[str]
    """What the following losses are of: held-out tokens that nothing was chosen by."""
    before: float
    """Nats per token."""
    after: float
    best_donor: ComparedRecord
    control: ComparedRecord | None = None
    """The best donor healed alike; None where no control was run."""
    versions: dict[str, str]


class Provenance(Record):
    """The whole file."""

    frankenmerge: str
    """The version that wrote the checkpoint."""
    versions: dict[str, str] = {}
    """Of Python, and of the packages that computed tensors."""
    arithmetic: list[str] | None = None
    """What computed tensors, where any were computed."""
    recipe_sha256: str
    key: str | None = None
    """The key of the recipe with its donors; files of version 0.1 have none."""
    files: dict[str, str] = {}
    """SHA-256 of the small files by name."""
    donors: dict[str, DonorRecord]
    shards: dict[str, ShardRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    gauges: dict[str, GaugeRecord] | None = None
    """By the number of the slice."""
    texts: dict[str, str] | None = None
    """SHA-256 of the texts that gauges were fitted on, by path."""
    raw: bool | None = None
    """Whether the donors are tensors without a model."""
    healing: HealingRecord | None = None
    """Where tensors were trained after merging."""


def dump(provenance: Provenance) -> bytes:
    """The content of the file, for a writer that writes the checkpoint as a whole."""
    return dump_json(provenance, indent=2)


def save(provenance: Provenance, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(provenance, path, indent=2)


def load(path: Path) -> Provenance:
    """Read the file. Raises FrankenmergeError for anything else."""
    return load_json(path, Provenance, KIND, _EXPECTED)


def parse(content: Any, place: str) -> Provenance:
    """Check parsed JSON, as `load` does. Raises FrankenmergeError, which names `place`."""
    return parse_json(content, place, Provenance, KIND, _EXPECTED)


def load_healing(path: Path) -> HealingRecord:
    """Read how an adapter was healed. Raises FrankenmergeError for anything else."""
    return load_json(path, HealingRecord, "", "written by `frankenmerge heal --adapter`")


def load_provenance(folder: Path) -> Provenance | None:
    """Read the provenance of a checkpoint's folder; None where there is none.

    Raises:
        FrankenmergeError: for a file that is there but cannot be used.
    """
    path = folder / PROVENANCE
    return load(path) if path.exists() else None
