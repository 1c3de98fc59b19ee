"""Heal a splice: a short training towards its donors, measured, with a control, and written."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import frankenmerge
from frankenmerge.artefacts.json_files import dump_json
from frankenmerge.artefacts.provenance import (
    ComparedRecord,
    CurveRecord,
    HealingRecord,
    load_provenance,
)
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import FrankenmergeError, fail, raise_all
from frankenmerge.evaluation.bench import Bench, Text
from frankenmerge.evaluation.domains import LENGTH
from frankenmerge.evaluation.gains import (
    Sums,
    best_of,
    donor_losses,
    gain_of,
    mean_loss,
    model_losses,
)
from frankenmerge.healing.adapters import RANK, Adapter
from frankenmerge.healing.memory import Memory, Sizes, available_memory, check_memory
from frankenmerge.healing.objective import Objective, TeacherKind
from frankenmerge.healing.scopes import (
    SCOPES,
    Scope,
    check_types,
    seam_blocks,
    size_of,
    spread_blocks,
    trained_names,
)
from frankenmerge.healing.tokens import Tokens, probability_bytes, sampled_tokens, text_tokens
from frankenmerge.healing.training import ROWS, Training, TrainOptions, accelerator_of, train
from frankenmerge.merging.output import check_output
from frankenmerge.merging.writer import merge
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import names_as_stored, separated
from frankenmerge.splicing.opening import open_donor, open_donors
from frankenmerge.splicing.operations import Copy, Operation
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.storage.atomic import new_folder, replacing_file
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.storage.safetensors_header import read_header
from frankenmerge.workflows.gaining import check_same_tokens, domains_on
from frankenmerge.workflows.measuring import On
from frankenmerge.workflows.subjects import is_recipe

STEPS = 300
"""Most steps, unless it is said otherwise."""
TOKENS, MODEL, CONTROL, HEALED = (
    f"{name}.safetensors" for name in ("tokens", "model", "control", "healed")
)
"""The files of an unfinished healing, in OUTPUT.heal."""


@dataclass(frozen=True)
class HealOptions:
    """How a splice is healed."""

    on: On = "sampled"
    """What it is trained on: tokens that the donors generate, or texts."""
    scope: Scope | None = None
    """What is trained; None for `seams` where there are seams, and `norms` elsewhere."""
    steps: int = STEPS
    """Most steps."""
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
    memory: int | None = None
    """Bytes that may be used; what is free if None."""
    seed: int = 0
    """Of sampled tokens, batches, the LoRA and resamples."""
    placement: Placement = CPU
    download: bool = False
    allow_pickle: bool = False


class Healed(NamedTuple):
    """What a healing came to."""

    output: Path
    record: HealingRecord
    trained: int
    """Parameters."""
    memory: Memory


class _Patient(NamedTuple):
    """What is healed."""

    splice: Splice
    seams: list[int]
    """The blocks on both sides of its seams."""
    donors: dict[str, Checkpoint]
    """Its teachers, and what it is compared with."""


def heal(
    model: str | Path | Recipe,
    output: Path,
    options: HealOptions = HealOptions(),  # noqa: B008 - it is immutable
    *,
    planned: Callable[[Memory, Scope], None] = lambda _memory, _scope: None,
    progress: Progress = silent,
) -> Healed | None:
    """Train a splice for some steps towards its donors, and write it.

    What an interrupted run has done is in `OUTPUT.heal`; the same call continues from there.

    Args:
        model: a recipe, the file of one, or a checkpoint.
        output: the folder of the result, which does not exist yet.
        options: how.
        planned: called with the memory of a process and the scope before anything is loaded.
        progress: of sampling, steps and writing.

    Returns:
        What was done; None in all processes but the first.

    Raises:
        FrankenmergeError: for donors that are not known or do not read the same tokens, a scope
            without tensors, too little memory, and an output that cannot be written.
    """
    patient = _patient(model, options)
    scope: Scope = options.scope or ("seams" if patient.seams else "norms")
    _check(patient, scope, options, output)
    memory = _memory(patient, scope, options)
    planned(memory, scope)
    with accelerator_of(options.placement) as accelerator:
        return _Healing(patient, scope, options, output, memory, accelerator, progress).run()


def _patient(model: str | Path | Recipe, options: HealOptions) -> _Patient:
    opening: Any = {"download": options.download, "allow_pickle": options.allow_pickle}
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
        return _Patient(splice, seam_blocks(splice.spelled, depths), donors)
    checkpoint = open_donor(str(model), **opening)
    donors = _donors_of(checkpoint, options)
    blocks = [Block(checkpoint.name, index) for index in range(checkpoint.blocks)]
    splice = resolve(recipe_of(blocks), {checkpoint.name: checkpoint})
    return _Patient(splice, _seams_in(checkpoint, donors), donors)


def _donors_of(checkpoint: Checkpoint, options: HealOptions) -> dict[str, Checkpoint]:
    """The donors that are named, or those that the checkpoint's provenance names."""
    opening: Any = {"download": options.download, "allow_pickle": options.allow_pickle}
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
            if donors[name].fingerprint != donor.fingerprint:
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


def _check(patient: _Patient, scope: Scope, options: HealOptions, output: Path) -> None:
    """Refuse what cannot be healed in this way, before anything is loaded."""
    if scope == "seams" and not patient.seams:
        found = "none: whole models, or blocks as they follow in one donor"
        raise fail("--scope seams", "a model with seams", found, "use --scope norms, lora or all")
    if options.adapter and scope != "lora":
        raise fail("--adapter", "--scope lora", f"--scope {scope}", "add --scope lora")
    copied = all(isinstance(each, Copy) for each in patient.splice.operations)
    if options.adapter and not (copied and len(patient.splice.donors) == 1):
        expected, remedy = "a checkpoint, its base", "merge the recipe, and heal the checkpoint"
        raise fail("--adapter", expected, "a recipe", remedy)
    if options.teacher == "none" and options.mix not in (0.0, 1.0):
        expected = "a teacher, where only a share of the loss is the tokens' own"
        raise fail("--mix", expected, "--teacher none", "omit --mix, or name a teacher")
    if not isinstance(options.on, str):
        same = {text.content for text in options.on} & {text.content for text in options.text}
        if same:
            expected = "a text that the model is not trained on"
            raise fail("--text", expected, "one of --on", "give another --text")
    if patient.splice.vocabulary is not None:
        expected, found = "a result with its donors' tokens", "rows matched token by token"
        raise fail("heal", expected, found, "merge donors of one tokenizer")
    state = state_folder(output)
    if state.exists() and not state.is_dir():
        raise fail(str(state), "a folder, for the state", "a file", "move it away")
    check_output(output, {**patient.splice.donors, **patient.donors}, patient.splice.bytes)


def state_folder(output: Path) -> Path:
    """Where the state of an unfinished healing is."""
    return output.with_name(f"{output.name}.heal")


def _memory(patient: _Patient, scope: Scope, options: HealOptions) -> Memory:
    splice = patient.splice
    number = torch_dtype(options.placement.dtype).itemsize
    donors = {**patient.donors, **{name: splice.donors[name] for name in splice.copied_donors}}
    computed = sum(
        size_of([each], [each.name]) for each in splice.operations if not isinstance(each, Copy)
    )
    weights = number * (sum(donor.parameters for donor in donors.values()) + computed)
    trained: dict[Scope, int] = {each: _trained(splice, each, patient.seams) for each in SCOPES}
    config = splice.config
    width, vocabulary = quantity(config, "width") or 0, quantity(config, "vocabulary") or 0
    taught = options.teacher != "none"
    kept = probability_bytes(len(patient.donors), vocabulary, taught=taught)
    sizes = Sizes(
        weights,
        trained,
        width,
        len(splice.blocks),
        quantity(config, "inner") or 4 * width,
        vocabulary,
        min(options.micro, ROWS),
        LENGTH,
        len(patient.donors) if taught else 0,
        # They are in the memory of the CPU, whatever computes.
        kept if options.placement.device == "cpu" else 0,
    )
    limit = options.memory or available_memory(options.placement.device)
    return check_memory(sizes, scope, limit, checkpointing=options.checkpointing)


def _trained(splice: Splice, scope: Scope, seams: Sequence[int]) -> int:
    """How many parameters a scope trains; 0 where it has none."""
    if scope == "lora":
        return sum(RANK * sum(each.shape) for each in _maps(splice))
    try:
        return size_of(splice.operations, set(trained_names(splice, scope, seams)))
    except FrankenmergeError:
        return 0


def _maps(splice: Splice) -> list[Operation]:
    """The matrices of all blocks."""
    role = splice.base.architecture.role
    return [
        each for each in splice.operations if role(each.name)[0] == "block" and len(each.shape) == 2
    ]


class _Trained(NamedTuple):
    """A splice after training."""

    tensors: dict[str, Tensor]
    """Those that were trained, by their names in the result, in its types."""
    training: Training
    sums: Sums
    """On the tokens that judge."""
    parameters: int
    adapter: Adapter | None


class _Healing:
    """One healing."""

    def __init__(
        self,
        patient: _Patient,
        scope: Scope,
        options: HealOptions,
        output: Path,
        memory: Memory,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.patient, self.options = patient, options
        self.scope: Scope = scope
        self.output, self.memory, self.progress = output, memory, progress
        self.accelerator = accelerator
        self.folder = state_folder(output)
        opened = {**patient.splice.donors, **patient.donors}
        self.bench = Bench((), opened, placement=options.placement)
        loaded = {name: self.bench.load(name) for name in patient.donors}
        check_same_tokens(list(loaded.values()))
        self.donors = {name: each.model for name, each in loaded.items()}
        self.tokens = self._tokens()
        self.before = self._model(patient.splice)
        self._check_vocabulary()
        stopping, _ = donor_losses(self.donors, self.tokens.stopping)
        taught = 1.0 if options.teacher == "none" else options.mix
        self.teachers = self._teachers(stopping)
        self.objective = Objective(self.tokens.fitting, self.teachers, taught)

    def _model(self, splice: Splice) -> PreTrainedModel:
        return self.bench.assemble(splice, self.progress)

    def _tokens(self) -> Tokens:
        """What to heal on; the first process samples, and the others read what it has kept."""
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(options.on, str):
            on = domains_on(options.on, self.bench, list(self.donors), options.seed)
            tokens = text_tokens(on)
        else:
            if not self.accelerator.is_main_process:
                self.accelerator.wait_for_everyone()
            prints = {name: donor.fingerprint for name, donor in self.patient.donors.items()}
            with self.progress("sampling tokens", None, "donors"):
                kept = self.folder / TOKENS
                tokens = sampled_tokens(self.donors, prints, options.seed, kept)
            if self.accelerator.is_main_process:
                self.accelerator.wait_for_everyone()
        if options.text:
            judged = domains_on(list(options.text), self.bench, list(self.donors), options.seed)
            tokens = tokens._replace(confirming=judged)
        return tokens

    def _check_vocabulary(self) -> None:
        rows = embedding_of(self.before).shape[0]
        for name, model in self.donors.items():
            if (found := embedding_of(model).shape[0]) != rows:
                expected = f"{rows} rows of the embedding, as the result has"
                remedy = "heal with donors of one vocabulary size"
                raise fail(f"{name}: embedding", expected, str(found), remedy)

    def _teachers(self, stopping: Mapping[str, Sums]) -> list[dict[str, PreTrainedModel]]:
        """Of every domain; chosen by the tokens that decide when to stop."""

        def best(names: Sequence[str]) -> dict[str, PreTrainedModel]:
            chosen = best_of(
                {name: {each: sums[each] for each in names} for name, sums in stopping.items()}
            )
            return {chosen: self.donors[chosen]}

        domains = [domain.name for domain in self.tokens.fitting]
        kinds: dict[TeacherKind, Callable[[str], dict[str, PreTrainedModel]]] = {
            "ensemble": lambda _: self.donors,
            "donor": lambda _: best(domains),
            "best-per-domain": lambda name: best([name]),
            "none": lambda _: {},
        }
        return [kinds[self.options.teacher](name) for name in domains]

    def run(self) -> Healed | None:
        """Train, run the control, and write."""
        options, patient = self.options, self.patient
        confirming = self.tokens.confirming
        donors, _ = donor_losses(self.donors, confirming)
        before = mean_loss(model_losses(self.before, confirming))
        healed = self._trained(patient.splice, self.before, patient.seams, MODEL)
        best = best_of(donors)
        control = None
        if options.control:
            donor = patient.donors[best]
            whole = recipe_of([Block(best, index) for index in range(donor.blocks)])
            splice = resolve(whole, {best: donor})
            blocks = spread_blocks(len(patient.seams), donor.blocks)
            treated = self._trained(splice, self._model(splice), blocks, CONTROL)
            control = self._compared(best, healed.sums, treated.sums)
        training = healed.training
        packages = (frankenmerge, torch, transformers, accelerate)
        record = HealingRecord.of(
            scope=self.scope,
            teacher=options.teacher,
            teachers=list(dict.fromkeys(name for each in self.teachers for name in each)),
            mix=self.objective.mix,
            on=[domain.name for domain in self.tokens.fitting],
            sampled=isinstance(options.on, str),
            tokens_sha256=self.tokens.hash,
            seed=options.seed,
            steps=training.steps,
            tokens=training.tokens,
            rate=training.rate,
            curve=[CurveRecord(step=step, nats=nats) for step, nats in training.curve],
            measured_on=[domain.name for domain in confirming],
            before=before,
            after=mean_loss(healed.sums),
            best_donor=self._compared(best, healed.sums, donors[best]),
            control=control,
            versions={each.__name__: each.__version__ for each in packages},
        )
        if not self.accelerator.is_main_process:
            return None
        self._write(healed, record)
        self._clear()
        return Healed(self.output, record, healed.parameters, self.memory)

    def _compared(self, name: str, ours: Sums, theirs: Sums) -> ComparedRecord:
        gain = gain_of(ours, {name: theirs}, seed=self.options.seed)
        low, high = gain.interval
        nats = mean_loss(theirs)
        return ComparedRecord(name=name, nats=nats, difference=-gain.nats, interval=(-high, -low))

    def _trained(
        self, splice: Splice, model: PreTrainedModel, blocks: Sequence[int], kept: str
    ) -> _Trained:
        """Train the scope's tensors of a splice; `kept` names the file of the state."""
        options = self.options
        stored = names_as_stored(model, splice.base.architecture)
        adapter = None
        if self.scope == "lora":
            adapter = Adapter(model, options.seed)
            parameters = adapter.parameters
            check_types(_maps(splice))
        else:
            names = set(trained_names(splice, self.scope, blocks))
            parameters = _separate(model, stored, names)
        training = train(
            model,
            parameters,
            self.objective,
            lambda: mean_loss(model_losses(model, self.tokens.stopping)),
            TrainOptions(options.steps, options.seed, options.micro, options.checkpointing),
            self.accelerator,
            kept=self.folder / kept,
            identity=self._identity(splice, blocks),
            progress=self.progress,
        )
        made = adapter.folded() if adapter else parameters.items()
        dtypes = {each.name: torch_dtype(each.dtype) for each in splice.operations}
        tensors = {
            stored.get(name, name): tensor.detach().to("cpu", dtypes[stored.get(name, name)])
            for name, tensor in made
        }
        after = self._model(splice)
        _fill(after, names_as_stored(after, splice.base.architecture), tensors)
        sums = model_losses(after, self.tokens.confirming)
        count = sum(parameter.numel() for parameter in parameters.values())
        return _Trained(tensors, training, sums, count, adapter)

    def _identity(self, splice: Splice, blocks: Sequence[int]) -> str:
        """A hash of everything that the trained weights depend on."""
        options = self.options
        found = {
            "key": splice.key,
            "scope": self.scope,
            "blocks": list(blocks),
            "teachers": [
                [self.patient.donors[name].fingerprint for name in each] for each in self.teachers
            ],
            "mix": self.objective.mix,
            "tokens": self.tokens.hash,
            "steps": options.steps,
            "seed": options.seed,
            "micro": options.micro,
            "checkpointing": options.checkpointing,
            "placement": asdict(options.placement),
            "processes": self.accelerator.num_processes,
            "versions": [frankenmerge.__version__, torch.__version__, transformers.__version__],
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()

    def _write(self, healed: _Trained, record: HealingRecord) -> None:
        splice = self.patient.splice
        if self.options.adapter and healed.adapter:
            (base,) = splice.donors
            with new_folder(self.output) as folder:
                healed.adapter.save(folder, base)
                (folder / "healing.json").write_bytes(dump_json(record, indent=2))
            return
        file = self.folder / HEALED
        with replacing_file(file) as partial:
            save_file({name: each.contiguous() for name, each in healed.tensors.items()}, partial)
        merge(splice.healed(read_header(file), record), self.output, progress=self.progress)

    def _clear(self) -> None:
        """Remove the state; anything else that is in its folder stays."""
        for name in (TOKENS, MODEL, CONTROL, HEALED):
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _separate(
    model: PreTrainedModel, stored: Mapping[str, str], names: set[str]
) -> dict[str, nn.Parameter]:
    """The parameters of these names in the file, in float32, no longer shared with donors.

    Raises FrankenmergeError for tensors that are no parameters of their own in memory.
    """
    parameters = separated(model, stored, names)
    if missing := sorted(names - {stored[name] for name in parameters}):
        found = f"packed with others in memory: {', '.join(missing[:3])}"
        remedy = "use --scope norms"
        raise fail("scope", "tensors that are parameters of the model", found, remedy)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def _fill(model: PreTrainedModel, stored: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a model by tensors, given by their names in the file."""
    for name, parameter in model.named_parameters():
        if (tensor := tensors.get(stored[name])) is not None:
            parameter.data = tensor.to(parameter.device, parameter.dtype)
