"""Heal a splice: a short training towards its donors, measured, with a control, and written."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

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
    HEALING,
    ComparedRecord,
    CurveRecord,
    HealingRecord,
)
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.gains import (
    Sums,
    best_of,
    donor_losses,
    gain_of,
    mean_loss,
    model_losses,
)
from frankenmerge.healing.adapters import Adapter
from frankenmerge.healing.memory import Memory
from frankenmerge.healing.objective import Objective, TeacherKind
from frankenmerge.healing.scopes import (
    Scope,
    check_types,
    spread_blocks,
    trained_names,
)
from frankenmerge.healing.tokens import Tokens, fitting_rows, sampled_tokens, text_tokens
from frankenmerge.healing.training import Training, TrainOptions, accelerator_of, train
from frankenmerge.merging.writer import merge
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import names_as_stored, separated, unpacked
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.storage.atomic import moved, new_folder, replacing_file
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.storage.safetensors_header import read_header
from frankenmerge.workflows.gaining import check_same_tokens, domains_on
from frankenmerge.workflows.patients import (
    HealOptions,
    Patient,
    adapter_base,
    block_maps,
    check_patient,
    memory_needed,
    patient_of,
    scope_of,
    state_folder,
)

TOKENS, MODEL, CONTROL, HEALED = (
    f"{name}.safetensors" for name in ("tokens", "model", "control", "healed")
)
"""The files of an unfinished healing, in OUTPUT.heal."""
WRITTEN = "checkpoint"
"""The result in OUTPUT.heal, until it is complete."""
UNFINISHED = (WRITTEN, ".*.partial")
"""What a process leaves there that is killed while it writes."""


class Healed(NamedTuple):
    """What a healing came to."""

    output: Path
    record: HealingRecord
    trained: int
    """Parameters."""
    memory: Memory


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
    patient = patient_of(model, options)
    scope = scope_of(patient, options)
    check_patient(patient, scope, options, output)
    memory = memory_needed(patient, scope, options)
    planned(memory, scope)
    with accelerator_of(options.placement) as accelerator:
        return _Healing(patient, scope, options, output, memory, accelerator, progress).run()


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
        patient: Patient,
        scope: Scope,
        options: HealOptions,
        output: Path,
        memory: Memory,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.patient, self.options = patient, options
        self.scope: Scope = scope
        self.steps = patient.steps(options)
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
                rows = fitting_rows(self.steps, len(self.donors))
                tokens = sampled_tokens(self.donors, prints, rows, options.seed, kept)
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
        files = _names_in_file(model, splice)
        adapter = None
        if self.scope == "lora":
            adapter = Adapter(model, options.seed)
            parameters = adapter.parameters
            check_types(block_maps(splice))
        else:
            names = set(trained_names(splice, self.scope, blocks))
            parameters = _separate(model, files, names)
        training = train(
            model,
            parameters,
            self.objective,
            lambda: mean_loss(model_losses(model, self.tokens.stopping)),
            TrainOptions(
                self.steps, options.seed, options.micro, options.checkpointing, options.offload
            ),
            self.accelerator,
            kept=self.folder / kept,
            identity=self._identity(splice, blocks),
            progress=self.progress,
        )
        made = adapter.folded() if adapter else parameters.items()
        dtypes = {each.name: torch_dtype(each.dtype) for each in splice.operations}
        rounded = {name: tensor.detach().to("cpu", dtypes[files[name][0]]) for name, tensor in made}
        after = self._model(splice)
        _fill(after, rounded)
        sums = model_losses(after, self.tokens.confirming)
        tensors: dict[str, Tensor] = {}
        for name, tensor in rounded.items():
            packs = len(files[name]) > 1
            tensors |= unpacked(after, name, tensor) if packs else {files[name][0]: tensor}
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
            "steps": self.steps,
            "seed": options.seed,
            "micro": options.micro,
            "checkpointing": options.checkpointing,
            "offload": options.offload,
            "placement": asdict(options.placement),
            "processes": self.accelerator.num_processes,
            "versions": [frankenmerge.__version__, torch.__version__, transformers.__version__],
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()

    def _write(self, healed: _Trained, record: HealingRecord) -> None:
        """Write the result in the folder of the state, and move it to its place.

        There, what a kill has left is known to be of this healing.
        """
        self._clear(UNFINISHED)
        splice, made = self.patient.splice, self.folder / WRITTEN
        if self.options.adapter and healed.adapter:
            with new_folder(made) as folder:
                healed.adapter.save(folder, adapter_base(splice))
                (folder / HEALING).write_bytes(dump_json(record, indent=2))
        else:
            file = self.folder / HEALED
            with replacing_file(file) as partial:
                save_file(
                    {name: each.contiguous() for name, each in healed.tensors.items()}, partial
                )
            merge(splice.healed(read_header(file), record), made, progress=self.progress)
        moved(made, self.output)
        self._clear((*UNFINISHED, TOKENS, MODEL, CONTROL, HEALED))
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _clear(self, patterns: Sequence[str]) -> None:
        """Remove parts of the state; anything else that is in its folder stays."""
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _names_in_file(model: PreTrainedModel, splice: Splice) -> dict[str, list[str]]:
    """Of every parameter in memory, the names in the file: several where it packs experts."""
    known = {operation.name for operation in splice.operations}
    stored = names_as_stored(model, splice.base.architecture)
    return {
        name: [stored[name]]
        if stored[name] in known
        else list(unpacked(model, name, parameter.detach().to("meta")))
        for name, parameter in model.named_parameters()
    }


def _separate(
    model: PreTrainedModel, files: Mapping[str, Sequence[str]], names: set[str]
) -> dict[str, nn.Parameter]:
    """The parameters of these names in the file, in float32, no longer shared with donors.

    Raises FrankenmergeError for tensors that no parameters in memory have.
    """
    chosen = {name: found for name, found in files.items() if names.issuperset(found)}
    if missing := sorted(names.difference(*chosen.values())):
        found = f"in no parameter of their own: {', '.join(missing[:3])}"
        remedy = "use --scope norms"
        raise fail("scope", "tensors that are parameters of the model", found, remedy)
    parameters = separated(model, chosen)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a model by tensors, given by their names in memory."""
    for name, parameter in model.named_parameters():
        if (tensor := tensors.get(name)) is not None:
            parameter.data = tensor.to(parameter.device, parameter.dtype)
