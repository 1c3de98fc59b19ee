"""What is healed: a splice, its seams and donors, found, checked, and its memory planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.provenance import load_provenance
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.costs import Shape, shape_of
from frankenmerge.errors import FrankenmergeError, fail, raise_all
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.domains import LENGTH
from frankenmerge.healing.adapters import RANK
from frankenmerge.healing.memory import Memory, Sizes, available_memory, check_memory
from frankenmerge.healing.objective import TeacherKind
from frankenmerge.healing.scopes import SCOPES, Scope, device_of, seam_blocks, trained_names
from frankenmerge.healing.tokens import fitting_rows, probability_bytes
from frankenmerge.healing.training import ROWS
from frankenmerge.merging.output import check_output
from frankenmerge.models.loading import CPU, Placement, devices_of
from frankenmerge.splicing.opening import open_donor, open_donors
from frankenmerge.splicing.operations import Copy, Operation
from frankenmerge.splicing.replication import Unrepeated, unrepeated
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.workflows.measuring import On
from frankenmerge.workflows.subjects import is_recipe

STEPS, STEPS_SHORTENED = 300, 1000
"""Most steps, unless it is said otherwise; the second where blocks were left out."""


@dataclass(frozen=True)
class HealOptions:
    """How a splice is healed."""

    on: On = "sampled"
    """What it is trained on: tokens that the donors generate, or texts."""
    scope: Scope | None = None
    """What is trained; None for `seams` where there are seams, and `norms` elsewhere."""
    steps: int | None = None
    """Most steps; None for as many as suit what is healed."""
    teacher: TeacherKind = "ensemble"
    mix: float = 0.0
    """Share of the tokens' own loss; the rest is the divergence from the teacher."""
    donors: Sequence[str] = ()
    """Of a checkpoint that has no provenance, or other ones than those in it."""
    text: Sequence[Text] = ()
    """What it is judged by; held-out tokens of `on` where there is none."""
    control: bool = False
    """Whether the best donor is healed alike."""
    adapter: bool = False
    """Whether the LoRA is written alone."""
    micro: int = ROWS
    """Most rows in one pass."""
    checkpointing: bool = False
    """Compute activations again instead of keeping them."""
    offload: bool = False
    """Keep the optimiser, the best weights and activations in the memory of the CPU."""
    memory: int | None = None
    """Bytes that may be used; what is free if None."""
    seed: int = 0
    """Of sampled tokens, batches, the LoRA and resamples."""
    placement: Placement = CPU
    download: bool = False
    allow_pickle: bool = False


class Patient(NamedTuple):
    """What is healed."""

    splice: Splice
    seams: list[int]
    """The blocks on both sides of its seams."""
    donors: dict[str, Checkpoint]
    """Its teachers, and what it is compared with."""

    def steps(self, options: HealOptions) -> int:
        """Most steps. A model with fewer blocks than a donor has most to learn."""
        shortened = len(self.splice.blocks) < max(each.blocks for each in self.donors.values())
        return options.steps or (STEPS_SHORTENED if shortened else STEPS)


def patient_of(
    model: str | Path | Recipe, options: HealOptions, *, weights: bool = True
) -> Patient:
    """Open a recipe or a checkpoint, and the donors that it is healed towards.

    Args:
        model: a recipe, its file, or a checkpoint.
        options: where donors are named.
        weights: whether they will be read; if not, headers suffice.

    Raises:
        FrankenmergeError: for what cannot be opened, and a checkpoint whose donors are not known.
    """
    opening = _opening(options, weights)
    if isinstance(model, Recipe) or is_recipe(str(model)):
        recipes = [model] if isinstance(model, Recipe) else load_recipes(Path(model))
        if len(recipes) > 1:
            found = f"{len(recipes)} stages"
            remedy = "merge the recipe, and heal the checkpoint"
            raise fail(str(model), "a recipe of one stage", found, remedy)
        if recipes[0].mixture:
            found, remedy = "a mixture of experts", "heal its base, or a recipe that is an expert"
            raise fail(str(model), "a recipe without experts", found, remedy)
        splice = resolve(recipes[0], open_donors(recipes[0], **opening))
        named = options.donors or list(splice.shares)
        donors = {name: splice.donors.get(name) or open_donor(name, **opening) for name in named}
        depths = {name: donor.blocks for name, donor in splice.donors.items()}
        return Patient(splice, seam_blocks(splice.spelled, depths), donors)
    checkpoint = open_donor(str(model), **opening)
    donors = _donors_of(checkpoint, options, opening)
    blocks = [Block(checkpoint.name, index) for index in range(checkpoint.blocks)]
    splice = resolve(recipe_of(blocks), {checkpoint.name: checkpoint})
    return Patient(splice, _seams_in(checkpoint, donors), donors)


def _opening(options: HealOptions, weights: bool) -> dict[str, Any]:
    return {
        "download": options.download,
        "allow_pickle": options.allow_pickle,
        "weights": weights,
    }


def _donors_of(
    checkpoint: Checkpoint, options: HealOptions, opening: dict[str, Any]
) -> dict[str, Checkpoint]:
    """The donors that are named, or those that the checkpoint's provenance names."""
    if options.donors:
        return {name: open_donor(name, **opening) for name in options.donors}
    record = load_provenance(checkpoint.path)
    remedy = "name them with --donor"
    if record is None:
        expected = "its donors in frankenmerge.json"
        raise fail(checkpoint.name, expected, "no such file", remedy)
    donors, faults = {}, []
    for name, donor in record.donors.items():
        try:
            donors[name] = open_donor(name, **opening)
            if opening["weights"] and donors[name].fingerprint != donor.fingerprint:
                place = f"{checkpoint.name}: donor {name}"
                raise fail(place, "the donor of the merge", "another model", remedy)
        except FrankenmergeError as error:
            faults += [
                fault._replace(remedy=f"{fault.remedy}, or {remedy}") for fault in error.faults
            ]
    raise_all(faults)
    return donors


def _seams_in(checkpoint: Checkpoint, donors: Mapping[str, Checkpoint]) -> list[int]:
    """The blocks at the seams of a merged checkpoint, by the recipe in it."""
    path = checkpoint.path / "recipe.yaml"
    if not path.is_file():
        return []
    (recipe,) = load_recipes(path)
    if not recipe.slices or len(recipe.blocks) != checkpoint.blocks:
        return []
    depths = {block.model: block.index + 1 for block in recipe.blocks}
    return seam_blocks(recipe, depths | {name: donor.blocks for name, donor in donors.items()})


def scope_of(patient: Patient, options: HealOptions) -> Scope:
    """What is trained, where it is not said: the seams, or norms where there are none."""
    return options.scope or ("seams" if patient.seams else "norms")


def check_patient(
    patient: Patient, scope: Scope, options: HealOptions, output: Path | None
) -> None:
    """Refuse what cannot be healed in this way, before anything is loaded.

    Without an `output` only the model and the options are checked.
    """
    if scope == "seams" and not patient.seams:
        found = "none: whole models, or blocks as they follow in one donor"
        raise fail("--scope seams", "a model with seams", found, "use --scope norms, lora or all")
    if options.adapter and scope != "lora":
        raise fail("--adapter", "--scope lora", f"--scope {scope}", "add --scope lora")
    if options.adapter:
        adapter_base(patient.splice)
    if options.teacher == "none" and options.mix not in (0.0, 1.0):
        expected = "a teacher, where only a share of the loss is the tokens' own"
        raise fail("--mix", expected, "--teacher none", "omit --mix, or name a teacher")
    if not isinstance(options.on, str):
        trained = [text.documents for text in options.on]
        if any(text.documents in trained for text in options.text):
            expected = "a text that the model is not trained on"
            raise fail("--text", expected, "one of --on", "give another --text")
    if patient.splice.vocabulary is not None:
        expected, found = "a result with its donors' tokens", "rows matched token by token"
        raise fail("heal", expected, found, "merge donors of one tokenizer")
    if output is None:
        return
    state = state_folder(output)
    if state.exists() and not state.is_dir():
        raise fail(str(state), "a folder, for the state", "a file", "move it away")
    check_output(output, {**patient.splice.donors, **patient.donors}, patient.splice.bytes)


def adapter_base(splice: Splice) -> Unrepeated:
    """The base of an adapter of a splice. Raises FrankenmergeError where there is none."""
    return unrepeated(splice, "merge the recipe, and heal the checkpoint")


def state_folder(output: Path) -> Path:
    """Where the state of an unfinished healing is."""
    return output.with_name(f"{output.name}.heal")


def splice_shape(splice: Splice) -> Shape:
    """The shape of a splice's result."""
    shapes = {each.name: each.shape for each in splice.operations}
    return shape_of(shapes, splice.base.architecture, splice.config)


def computed_elements(splice: Splice) -> int:
    """Elements of the tensors of a splice that are not copied, and share no donor's memory."""
    return sum(prod(each.shape) for each in splice.operations if not isinstance(each, Copy))


def sizes_of(patient: Patient, options: HealOptions, devices: int = 1) -> Sizes:
    """What the memory of healing depends on; models are spread over so many devices."""
    splice, shape = patient.splice, splice_shape(patient.splice)
    number = torch_dtype(options.placement.dtype).itemsize
    donors = {**patient.donors, **{name: splice.donors[name] for name in splice.copied_donors}}
    # Copied tensors are shared with a donor only where they are on its device.
    own = computed_elements(splice) if devices == 1 else shape.parameters
    taught = options.teacher != "none"
    rows = fitting_rows(patient.steps(options), len(patient.donors))
    kept = probability_bytes(rows, len(patient.donors), shape.vocabulary, taught=taught)
    return Sizes(
        number * (sum(donor.parameters for donor in donors.values()) + own),
        {each: _trained(splice, each, patient.seams, devices) for each in SCOPES},
        shape.width,
        len(shape.blocks),
        shape.inner,
        shape.vocabulary,
        min(options.micro, ROWS),
        LENGTH,
        len(patient.donors) if taught else 0,
        # They are in the memory of the CPU, whatever computes.
        kept if options.placement.device == "cpu" else 0,
        devices,
    )


def memory_needed(patient: Patient, scope: Scope, options: HealOptions) -> Memory:
    """The memory of one process, or of each of its devices.

    Raises FrankenmergeError where less is available.
    """
    device = options.placement.device
    limit = options.memory or available_memory(device)
    saving = {"checkpointing": options.checkpointing, "offload": offloads(options)}
    return check_memory(sizes_of(patient, options, devices_of(device)), scope, limit, **saving)


def offloads(options: HealOptions) -> bool:
    """Whether anything is kept in the memory of the CPU instead of an accelerator's."""
    return options.offload and options.placement.device != "cpu"


def _trained(splice: Splice, scope: Scope, seams: Sequence[int], devices: int) -> int:
    """How many parameters a scope trains on the device that has most; 0 where it has none."""
    counts = [0] * devices
    if scope == "lora":
        for each in block_maps(splice):
            counts[device_of(splice, each, devices)] += RANK * sum(each.shape)
        return max(counts)
    try:
        names = set(trained_names(splice, scope, seams))
    except FrankenmergeError:
        return 0
    for each in splice.operations:
        if each.name in names:
            counts[device_of(splice, each, devices)] += prod(each.shape)
    return max(counts)


def block_maps(splice: Splice) -> list[Operation]:
    """The matrices of all blocks."""
    role = splice.base.architecture.role
    return [
        each for each in splice.operations if role(each.name)[0] == "block" and len(each.shape) == 2
    ]
