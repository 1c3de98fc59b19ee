"""Checkpoints and splices measured on the same texts; models are loaded once and shared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import fail
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.language import Encoded, Loss, encode_text, measure
from frankenmerge.evaluation.lineage import Lineage, checkpoint_lineage, splice_lineage
from frankenmerge.evaluation.prefix_sharing import measure_together
from frankenmerge.models.loading import CPU, Placement, load_model, load_tokenizer
from frankenmerge.models.lora import attach
from frankenmerge.progress import Advance, Progress, ignore, silent
from frankenmerge.splicing.assemble import ComputedTensors, assemble, splice_tokenizer
from frankenmerge.splicing.gauge_fitting import fitted_rotations
from frankenmerge.splicing.resolve import Splice

LONGEST_CONTEXT = 2048
"""Longest window used without being asked for, in tokens."""


class Result(NamedTuple):
    """The losses of one model."""

    name: str
    role: str
    """`model`, `recipe` or `donor`."""
    losses: dict[str, Loss]
    """By text; empty if nothing is measured on text."""
    lineage: Lineage | None = None
    """What it was made of, where that is known."""
    key: str | None = None
    """Of a recipe and its donors."""

    @property
    def total(self) -> Loss:
        """All texts together."""
        losses = list(self.losses.values())
        hits = [loss.hits for loss in losses if loss.hits is not None]
        return Loss(
            np.concatenate([loss.nats for loss in losses]),
            sum(loss.bytes for loss in losses),
            np.concatenate(hits) if len(hits) == len(losses) else None,
        )


class Loaded(NamedTuple):
    """A checkpoint in memory."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


class Subject(NamedTuple):
    """A model in memory, while it is measured."""

    name: str
    role: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Checkpoint | Splice
    """What was loaded or assembled."""
    texts: dict[str, Encoded]
    lineage: Lineage | None


Visit = Callable[[Subject], None]
"""What else is done with a model while it is in memory."""


def _nothing(_subject: Subject) -> None:
    """Do nothing else."""


def shared_context(checkpoints: Iterable[Checkpoint]) -> int:
    """The longest window that every checkpoint was made for, at most `LONGEST_CONTEXT`."""
    sizes = (quantity(checkpoint.config, "positions") for checkpoint in checkpoints)
    return min([LONGEST_CONTEXT, *(size or LONGEST_CONTEXT for size in sizes)])


class Bench:
    """Texts, and checkpoints to measure on them and to make splices of.

    Every model is measured with the same windows: of `context` tokens, or as many as all
    checkpoints were made for. What was loaded stays in memory until `keep` releases it.
    """

    def __init__(
        self,
        texts: Iterable[Text],
        checkpoints: Mapping[str, Checkpoint],
        *,
        context: int | None = None,
        placement: Placement = CPU,
        stages: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        """Prepare the texts; no model is loaded yet.

        Args:
            texts: what models are measured on.
            checkpoints: by name, those to be measured and the donors of splices.
            context: tokens in a window.
            placement: in which type models compute, and where.
            stages: donors of splices that were made in memory, by name.

        Raises:
            FrankenmergeError: for a context longer than the learned positions of a checkpoint.
        """
        self.texts, self.placement = list(texts), placement
        self.checkpoints = dict(checkpoints)
        self._donors = {**checkpoints, **(stages or {})}
        self._loaded: dict[str, Loaded] = {}
        self._encodings: dict[str, dict[str, Encoded]] = {}
        self._shared = ComputedTensors()
        self.context = context or shared_context(self._donors.values())
        for name, checkpoint in self._donors.items():
            longest = quantity(checkpoint.config, "positions") or self.context
            if checkpoint.architecture.learned_positions and self.context > longest:
                expected = f"at most {longest} tokens, its positions"
                remedy = "use a shorter --context"
                raise fail(f"context for {name}", expected, str(self.context), remedy)

    def on(self, texts: Iterable[Text]) -> "Bench":
        """The same checkpoints and models, on other texts."""
        other = copy(self)
        other.texts, other._encodings = list(texts), {}
        return other

    def within(self, context: int) -> "Bench":
        """The same with windows of `context` tokens."""
        other = copy(self)
        other.context = context
        return other

    def load(self, name: str) -> Loaded:
        """A checkpoint in memory."""
        if name not in self._loaded:
            checkpoint = self._donors[name]
            tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, self.placement)
            self._loaded[name] = Loaded(checkpoint, tokenizer, model)
        return self._loaded[name]

    def encoded(self, name: str) -> dict[str, Encoded]:
        """The texts as a checkpoint's tokenizer encodes them."""
        if name not in self._encodings:
            self._encodings[name] = self._encoded(self.load(name).tokenizer)
        return self._encodings[name]

    def _encoded(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Encoded]:
        return {text.name: encode_text(tokenizer, text) for text in self.texts}

    def keep(self, names: Iterable[str]) -> None:
        """Release all models but those of `names`."""
        if gone := self._loaded.keys() - set(names):
            for name in gone:
                del self._loaded[name]
            clear_device_cache(garbage_collection=True)

    def assemble(self, splice: Splice, progress: Progress = silent) -> PreTrainedModel:
        """The model of a splice; it shares tensors with the donors in memory."""
        models = {name: self.load(name).model for name in splice.copied_donors}
        fits = fitted_rotations(splice, progress) if splice.has_gauges else {}
        return assemble(
            splice, models, self.placement, fits=fits, shared=self._shared, progress=progress
        )

    def checkpoint(
        self,
        name: str,
        *,
        role: str = "model",
        progress: Progress = silent,
        visit: Visit = _nothing,
    ) -> Result:
        """Measure a checkpoint."""
        (checkpoint, tokenizer, model), texts = self.load(name), self.encoded(name)
        others = {other: each for other, each in self.checkpoints.items() if other != name}
        lineage = None if role == "donor" else checkpoint_lineage(checkpoint, others)
        subject = Subject(name, role, model, tokenizer, checkpoint, texts, lineage)
        return self._measured(subject, progress, visit)

    def splice(
        self,
        name: str,
        splice: Splice,
        *,
        lineage: Lineage | None = None,
        adapter: Path | None = None,
        progress: Progress = silent,
        visit: Visit = _nothing,
    ) -> Result:
        """Measure a splice in memory.

        Args:
            name: of the result.
            splice: what to measure.
            lineage: leads through stages that were made.
            adapter: the folder of a LoRA that is added to it.
            progress: of assembling and measuring.
            visit: what else is done with the model.
        """
        model = self.assemble(splice, progress)
        if adapter:
            attach(model, adapter, name)
        tokenizer = splice_tokenizer(splice)
        texts, lineage = self._encoded(tokenizer), lineage or splice_lineage(splice)
        subject = Subject(name, "recipe", model, tokenizer, splice, texts, lineage)
        # The key is the recipe's, and not that of what a LoRA makes of it.
        key = None if adapter else splice.key
        return self._measured(subject, progress, visit)._replace(key=key)

    def splices(self, splices: Sequence[Splice], *, advance: Advance = ignore) -> list[Result]:
        """Measure many splices; blocks that several begin with are run once.

        `advance` is called for every splice on every text.
        """
        losses: list[dict[str, Loss]] = [{} for _ in splices]
        for index, splice in enumerate(splices):
            if not splice.stacks_whole_blocks:
                losses[index] = self.splice(str(splice.recipe), splice).losses
                advance(len(self.texts))
        whole = [index for index, each in enumerate(splices) if each.stacks_whole_blocks]
        readers = dict.fromkeys(splices[index].recipe.tokenizer_donor for index in whole)
        for reader in readers:
            chosen = [each for each in whole if splices[each].recipe.tokenizer_donor == reader]
            names = (name for index in chosen for name in splices[index].shares)
            models = {name: self.load(name).model for name in names}
            stacks = [splices[index].blocks for index in chosen]
            for text, encoded in self.encoded(reader).items():
                measured = measure_together(stacks, models, encoded, context=self.context)
                for index, loss in zip(chosen, measured, strict=True):
                    losses[index][text] = loss
                advance(len(chosen))
        return [
            Result(str(splice.recipe), "recipe", loss, key=splice.key)
            for splice, loss in zip(splices, losses, strict=True)
        ]

    def _measured(self, subject: Subject, progress: Progress, visit: Visit) -> Result:
        losses = self._losses(subject, progress) if subject.texts else {}
        visit(subject)
        return Result(subject.name, subject.role, losses, subject.lineage)

    def _losses(self, subject: Subject, progress: Progress) -> dict[str, Loss]:
        tokens = sum(line.predicted for line in subject.texts.values())
        with progress(f"{Path(subject.name).name} on text", tokens, "tokens") as advance:
            return {
                text: measure(subject.model, line, context=self.context, advance=advance)
                for text, line in subject.texts.items()
            }
