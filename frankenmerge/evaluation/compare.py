"""Several models and recipes on the same texts, side by side with every donor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Recipe, load_recipe, open_donor
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import fail
from frankenmerge.evaluation.language import Encoded, Loss, encode, measure
from frankenmerge.evaluation.lineage import Lineage, checkpoint_lineage, recipe_lineage
from frankenmerge.evaluation.prefix_sharing import measure_together
from frankenmerge.models.loading import load_model, load_tokenizer, virtual_splice
from frankenmerge.progress import Advance, Progress, ignore, silent
from frankenmerge.splicing.compatibility import stacked, validated

LONGEST_CONTEXT = 2048
"""Longest window used without being asked for."""


class Text(NamedTuple):
    """A text to be predicted."""

    name: str
    content: str


class Result(NamedTuple):
    """How one model did."""

    name: str
    role: str
    """`model`, `recipe` or `donor`."""
    losses: dict[str, Loss]
    """By text."""
    lineage: Lineage | None = None
    """What it was made of, where that is known."""

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


class Subject(NamedTuple):
    """A model in memory, while it is measured."""

    name: str
    role: str
    model: PreTrainedModel
    reader: Checkpoint
    """The checkpoint whose tokenizer it reads with."""
    texts: dict[str, Encoded]
    lineage: Lineage | None


Visit = Callable[[Subject], None]
"""What else is done with a model while it is in memory."""


def _nothing(_subject: Subject) -> None:
    """Do nothing else."""


def read_text(path: Path) -> Text:
    """Read a text file as it is, its line ends too. Raises FrankenmergeError when it is absent, empty or not UTF-8."""
    try:
        content = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a UTF-8 text file", str(error), "give another file") from error
    if not content.strip():
        raise fail(str(path), "a text", "an empty file", "give another file")
    return Text(str(path), content)


def shared_context(checkpoints: Iterable[Checkpoint]) -> int:
    """The longest window that every checkpoint was made for, at most `LONGEST_CONTEXT`."""
    return min(
        [
            LONGEST_CONTEXT,
            *(
                quantity(checkpoint.config, "positions") or LONGEST_CONTEXT
                for checkpoint in checkpoints
            ),
        ]
    )


class Bench:
    """Models loaded once, shared by every recipe that uses them, and the texts they are measured on.

    Every model is measured with the same windows: of `context` tokens, or as many as all of `names`
    were made for. What was loaded stays in memory until `keep` lets it go.
    """

    def __init__(
        self,
        texts: Iterable[Text],
        names: Iterable[str],
        *,
        context: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_memory: Mapping[int | str, str] | None = None,
        offload: Path | None = None,
        download: bool = False,
        allow_pickle: bool = False,
        opened: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.texts = list(texts)
        self._placed: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "max_memory": max_memory,
            "offload": offload,
        }
        self._models: dict[str, tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]] = {}
        opened = opened or {}
        self.checkpoints = {
            name: opened[name]
            if name in opened
            else open_donor(name, download=download, allow_pickle=allow_pickle)
            for name in names
        }
        self.context = context or shared_context(self.checkpoints.values())
        for name, checkpoint in self.checkpoints.items():
            longest = quantity(checkpoint.config, "positions") or self.context
            if checkpoint.architecture.learned_positions and self.context > longest:
                raise fail(
                    f"context for {name}",
                    f"at most {longest} tokens, its positions",
                    str(self.context),
                    "use a shorter --context",
                )

    def load(self, name: str) -> tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]:
        """A checkpoint by name: its headers, its model, and the texts as its tokenizer reads them."""
        if name not in self._models:
            checkpoint = self.checkpoints[name]
            tokenizer = load_tokenizer(checkpoint)
            encoded = {text.name: encode(tokenizer, text.content, text.name) for text in self.texts}
            self._models[name] = checkpoint, load_model(checkpoint, **self._placed), encoded
        return self._models[name]

    def keep(self, names: Iterable[str]) -> None:
        """Let go of all models but those of `names`."""
        if gone := self._models.keys() - set(names):
            for name in gone:
                del self._models[name]
            clear_device_cache(garbage_collection=True)

    def checkpoint(
        self,
        name: str,
        *,
        role: str = "model",
        progress: Progress = silent,
        visit: Visit = _nothing,
    ) -> Result:
        """Measure a checkpoint."""
        checkpoint, model, encoded = self.load(name)
        others = {other: opened for other, opened in self.checkpoints.items() if other != name}
        lineage = None if role == "donor" else checkpoint_lineage(checkpoint, others)
        return self._measured(
            Subject(name, role, model, checkpoint, encoded, lineage), progress, visit
        )

    def recipe(
        self, name: str, recipe: Recipe, *, progress: Progress = silent, visit: Visit = _nothing
    ) -> Result:
        """Measure a recipe as a virtual splice."""
        donors = {donor: self.checkpoints[donor] for donor in recipe.donors}
        model = virtual_splice(
            recipe, donors, {donor: self.load(donor)[1] for donor in donors}, progress=progress
        )
        reader, _, encoded = self.load(recipe.tokenizer_donor)
        return self._measured(
            Subject(name, "recipe", model, reader, encoded, recipe_lineage(recipe, donors)),
            progress,
            visit,
        )

    def recipes(self, recipes: Sequence[Recipe], *, advance: Advance = ignore) -> list[Result]:
        """Measure many recipes; what they begin with alike is run once, where blocks are taken as they are.

        `advance` is called for every recipe on every text.
        """
        for recipe in recipes:
            validated(recipe, {donor: self.checkpoints[donor] for donor in recipe.donors})
        losses: list[dict[str, Loss]] = [{} for _ in recipes]
        for index, recipe in enumerate(recipes):
            if not recipe.plain:
                losses[index] = self.recipe(str(recipe), recipe).losses
                advance(len(self.texts))
        for tokenizer in dict.fromkeys(
            recipe.tokenizer_donor for recipe in recipes if recipe.plain
        ):
            chosen = [
                index
                for index, recipe in enumerate(recipes)
                if recipe.plain and recipe.tokenizer_donor == tokenizer
            ]
            models = {
                donor: self.load(donor)[1] for index in chosen for donor in recipes[index].donors
            }
            for text, line in self.load(tokenizer)[2].items():
                measured = measure_together(
                    [recipes[index].blocks for index in chosen], models, line, context=self.context
                )
                for index, loss in zip(chosen, measured, strict=True):
                    losses[index][text] = loss
                advance(len(chosen))
        return [
            Result(str(recipe), "recipe", loss)
            for recipe, loss in zip(recipes, losses, strict=True)
        ]

    def _measured(self, subject: Subject, progress: Progress, visit: Visit) -> Result:
        tokens = sum(len(line.ids) - 1 for line in subject.texts.values())
        with progress(f"{Path(subject.name).name} on text", tokens, "tokens") as advance:
            losses = {
                text: measure(subject.model, line, context=self.context, advance=advance)
                for text, line in subject.texts.items()
            }
        visit(subject)
        return Result(subject.name, subject.role, losses, subject.lineage)


def is_recipe(name: str) -> bool:
    """Whether a name on the command line is a recipe's."""
    return Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()


def compare(
    names: Iterable[str],
    texts: Iterable[Text],
    *,
    context: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: Mapping[int | str, str] | None = None,
    offload: Path | None = None,
    download: bool = False,
    allow_pickle: bool = False,
    beside: bool = False,
    hold: bool = False,
    against: str | None = None,
    progress: Progress = silent,
    visit: Callable[[Subject, "Bench"], None] = lambda _subject, _bench: None,
) -> tuple[list[Result], Bench]:
    """Measure checkpoints and recipes, and after them every donor of the recipes that was not named itself.

    Models are in memory one after another: but for the donors of recipes that are still to come,
    each goes when it was measured.

    Args:
        names: checkpoints and recipes.
        texts: what they are measured on.
        context: tokens in a window.
        dtype: as in `load_model`, and so are device, max_memory and offload.
        device: where to compute.
        max_memory: how much of each device.
        offload: a folder for what fits nowhere.
        download: as in `open_donor`, and so is allow_pickle.
        allow_pickle: whether pickles are converted.
        beside: whether the donors of merged checkpoints, told by the `frankenmerge.json` in their
            folders, are measured as those of recipes are; to be asked only where some model's
            donors are known.
        hold: whether these too stay in memory for `visit`.
        against: another model that is measured as a donor.
        progress: shows progress in every model; with several models, which of how many it is.
        visit: called with every model, while it is in memory, and the bench.
    """
    names = list(dict.fromkeys(names))
    recipes = {name: load_recipe(Path(name)) for name in names if is_recipe(name)}
    opened = {
        name: open_donor(name, download=download, allow_pickle=allow_pickle)
        for name in names
        if name not in recipes
    }
    needed = {name: tuple(recipe.donors) for name, recipe in recipes.items()}
    told = _told_donors(opened) if beside else {}
    if beside and not any([*needed.values(), *told.values()]):
        found = ", ".join(names)
        raise fail(
            "evaluate",
            "a recipe, or a checkpoint with a frankenmerge.json that names its donors",
            found,
            "name one",
        )
    wanted = [
        *(donor for made_of in (needed, told) for donors in made_of.values() for donor in donors),
        *([against] if against else []),
    ]
    donors = [name for name in dict.fromkeys(wanted) if name not in names]
    bench = Bench(
        texts,
        [*opened, *donors],
        context=context,
        dtype=dtype,
        device=device,
        max_memory=max_memory,
        offload=offload,
        download=download,
        allow_pickle=allow_pickle,
        opened=opened,
    )
    for name in bench.checkpoints:
        load_tokenizer(bench.checkpoints[name])
    for name, recipe in recipes.items():
        stacked(recipe, {donor: bench.checkpoints[donor] for donor in recipe.donors}, name)
    needed |= told if hold else {}
    results, order = [], [*names, *donors]
    for number, name in enumerate(order, 1):
        look: dict[str, Any] = {
            "progress": _counted(progress, number, len(order)),
            "visit": lambda subject: visit(subject, bench),
        }
        role = "donor" if name in donors else "model"
        results.append(
            bench.recipe(name, recipes[name], **look)
            if name in recipes
            else bench.checkpoint(name, role=role, **look)
        )
        later = order[number:]
        bench.keep({*later, *(donor for other in later for donor in needed.get(other, ()))})
    return results, bench


def _counted(progress: Progress, number: int, models: int) -> Progress:
    """A progress that tells which of the models is looked at."""
    return (
        progress
        if models == 1
        else lambda what, total, unit: progress(f"{number} of {models}: {what}", total, unit)
    )


def _told_donors(opened: Mapping[str, Checkpoint]) -> dict[str, tuple[str, ...]]:
    """The donors of merged checkpoints, by what lies beside their weights."""
    found = {
        name: checkpoint_lineage(
            checkpoint, {other: opened[other] for other in opened if other != name}
        )
        for name, checkpoint in opened.items()
    }
    return {name: lineage.donors for name, lineage in found.items() if lineage}
