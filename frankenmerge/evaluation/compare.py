"""Several models and recipes on the same texts, side by side with every donor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from frankenmerge.architectures import quantity
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.evaluation.language import Encoded, Loss, encode, measure
from frankenmerge.evaluation.together import measure_together
from frankenmerge.models import load_model, load_tokenizer, virtual_splice
from frankenmerge.recipe import Recipe, load_recipe, open_donor
from frankenmerge.splice import validated

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

    @property
    def total(self) -> Loss:
        """All texts together."""
        losses = self.losses.values()
        return Loss(np.concatenate([loss.nats for loss in losses]), sum(loss.bytes for loss in losses))


def read_text(path: Path) -> Text:
    """Read a text file. Raises FrankenmergeError when it is absent, empty or not UTF-8."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a UTF-8 text file", str(error), "give another file") from error
    if not content.strip():
        raise fail(str(path), "a text", "an empty file", "give another file")
    return Text(str(path), content)


def shared_context(checkpoints: Iterable[Checkpoint]) -> int:
    """The longest window that every checkpoint was made for, at most `LONGEST_CONTEXT`."""
    return min([LONGEST_CONTEXT, *(quantity(checkpoint.config, "positions") or LONGEST_CONTEXT for checkpoint in checkpoints)])


class Bench:
    """Models loaded once, shared by every recipe that uses them, and the texts they are measured on.

    Every model is measured with the same windows: of `context` tokens, or as many as all of `names` were made for.
    """

    def __init__(
        self, texts: Iterable[Text], names: Iterable[str], *, context: int | None = None, dtype: str = "float32", device: str = "cpu",
        max_memory: Mapping[int | str, str] | None = None, offload: Path | None = None, download: bool = False,
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        self.texts = list(texts)
        self._placed: dict[str, Any] = {"dtype": dtype, "device": device, "max_memory": max_memory, "offload": offload}
        self._models: dict[str, tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]] = {}
        self._checkpoints = {name: open_donor(name, download=download, allow_pickle=allow_pickle) for name in names}
        self.context = context or shared_context(self._checkpoints.values())
        for name, checkpoint in self._checkpoints.items():
            longest = quantity(checkpoint.config, "positions") or self.context
            if checkpoint.architecture.learned_positions and self.context > longest:
                raise fail(f"context for {name}", f"at most {longest} tokens, its positions", str(self.context), "use a shorter --context")

    def load(self, name: str) -> tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]:
        """A checkpoint by name: its headers, its model, and the texts as its tokenizer reads them."""
        if name not in self._models:
            checkpoint = self._checkpoints[name]
            tokenizer = load_tokenizer(checkpoint)
            encoded = {text.name: encode(tokenizer, text.content, text.name) for text in self.texts}
            self._models[name] = checkpoint, load_model(checkpoint, **self._placed), encoded
        return self._models[name]

    def checkpoint(self, name: str, *, role: str = "model", progress: Callable[[int], None] = lambda _: None) -> Result:
        """Measure a checkpoint."""
        _, model, encoded = self.load(name)
        return self._measured(name, role, model, encoded, progress)

    def recipe(self, name: str, recipe: Recipe, *, progress: Callable[[int], None] = lambda _: None) -> Result:
        """Measure a recipe as a virtual splice."""
        donors = {donor: self._checkpoints[donor] for donor in recipe.donors}
        model = virtual_splice(recipe, donors, {donor: self.load(donor)[1] for donor in donors})
        return self._measured(name, "recipe", model, self.load(recipe.tokenizer_donor)[2], progress)

    def recipes(self, recipes: Sequence[Recipe], *, progress: Callable[[int], None] = lambda _: None) -> list[Result]:
        """Measure many recipes; what they begin with alike is run once. `progress` is called for every recipe on every text.

        Those that turn slices are run one by one, as virtual splices.
        """
        for recipe in recipes:
            validated(recipe, {donor: self._checkpoints[donor] for donor in recipe.donors})
        losses: list[dict[str, Loss]] = [{} for _ in recipes]
        for tokenizer in dict.fromkeys(recipe.tokenizer_donor for recipe in recipes):
            chosen = [index for index, recipe in enumerate(recipes) if recipe.tokenizer_donor == tokenizer and not recipe.has_gauges]
            if not chosen:
                continue
            models = {donor: self.load(donor)[1] for index in chosen for donor in recipes[index].donors}
            for text, line in self.load(tokenizer)[2].items():
                measured = measure_together([recipes[index].blocks for index in chosen], models, line, context=self.context)
                for index, loss in zip(chosen, measured, strict=True):
                    losses[index][text] = loss
                progress(len(chosen))
        for index, recipe in enumerate(recipes):
            if recipe.has_gauges:
                losses[index] = self.recipe(str(recipe), recipe).losses
                progress(len(self.texts))
        return [Result(str(recipe), "recipe", loss) for recipe, loss in zip(recipes, losses, strict=True)]

    def _measured(
        self, name: str, role: str, model: PreTrainedModel, encoded: dict[str, Encoded], progress: Callable[[int], None]
    ) -> Result:
        return Result(name, role, {text: measure(model, line, context=self.context, progress=progress) for text, line in encoded.items()})


def is_recipe(name: str) -> bool:
    """Whether a name on the command line is a recipe's."""
    return Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()


def compare(
    names: Iterable[str], texts: Iterable[Text], *, context: int | None = None, dtype: str = "float32", device: str = "cpu",
    max_memory: Mapping[int | str, str] | None = None, offload: Path | None = None, download: bool = False,
    allow_pickle: bool = False, progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Result], Bench]:  # fmt: skip
    """Measure checkpoints and recipes, and after them every donor of the recipes that was not named itself.

    `progress` is called with the number of tokens predicted since its last call.
    """
    names = list(dict.fromkeys(names))
    recipes = {name: load_recipe(Path(name)) for name in names if is_recipe(name)}
    donors = [donor for donor in dict.fromkeys(donor for recipe in recipes.values() for donor in recipe.donors) if donor not in names]
    checkpoints = [*(name for name in names if name not in recipes), *donors]
    bench = Bench(
        texts, checkpoints, context=context, dtype=dtype, device=device, max_memory=max_memory, offload=offload, download=download,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    results = [
        bench.recipe(name, recipes[name], progress=progress) if name in recipes else bench.checkpoint(name, progress=progress)
        for name in names
    ]
    return results + [bench.checkpoint(name, role="donor", progress=progress) for name in donors], bench
