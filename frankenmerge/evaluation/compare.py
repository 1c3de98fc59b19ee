"""Several models and recipes on the same texts, side by side with every donor."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from frankenmerge.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import fail
from frankenmerge.evaluation.language import Encoded, Loss, encode, measure
from frankenmerge.models import load_model, load_tokenizer, virtual_splice
from frankenmerge.recipe import Recipe, load_recipe, open_donors


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
    return Text(str(path), content)


class Bench:
    """Models loaded once, shared by every recipe that uses them, and the texts they are measured on."""

    def __init__(self, texts: Iterable[Text], *, dtype: str = "float32", device: str = "cpu", download: bool = False) -> None:
        self.texts = list(texts)
        self.dtype, self.device, self.download = dtype, device, download
        self._models: dict[str, tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]] = {}

    def load(self, name: str) -> tuple[Checkpoint, PreTrainedModel, dict[str, Encoded]]:
        """A checkpoint by name: its headers, its model, and the texts as its tokenizer reads them."""
        if name not in self._models:
            checkpoint = open_checkpoint(name, download=self.download)
            tokenizer = load_tokenizer(checkpoint)
            encoded = {text.name: encode(tokenizer, text.content, text.name) for text in self.texts}
            self._models[name] = checkpoint, load_model(checkpoint, dtype=self.dtype, device=self.device), encoded
        return self._models[name]

    def checkpoint(self, name: str, *, role: str = "model", progress: Callable[[int], None] = lambda _: None) -> Result:
        """Measure a checkpoint."""
        _, model, encoded = self.load(name)
        return Result(name, role, {text: measure(model, line, progress=progress) for text, line in encoded.items()})

    def recipe(self, name: str, recipe: Recipe, *, progress: Callable[[int], None] = lambda _: None) -> Result:
        """Measure a recipe as a virtual splice."""
        donors = open_donors(recipe, download=self.download)
        models = {donor: self.load(donor)[1] for donor in donors}
        model = virtual_splice(recipe, donors, models)
        encoded = self.load(recipe.tokenizer)[2]
        return Result(name, "recipe", {text: measure(model, line, progress=progress) for text, line in encoded.items()})


def is_recipe(name: str) -> bool:
    """Whether a name on the command line is a recipe's."""
    return Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()


def compare(names: list[str], bench: Bench, progress: Callable[[str, int], None] = lambda _name, _done: None) -> list[Result]:
    """Measure checkpoints and recipes, and after them every donor of the recipes that was not named itself.

    `progress` is called with what is being measured and the number of tokens done since its last call.
    """
    recipes = {name: load_recipe(Path(name)) for name in names if is_recipe(name)}
    donors = dict.fromkeys(donor for recipe in recipes.values() for donor in recipe.donors)
    results = []
    for name in dict.fromkeys(names):
        if name in recipes:
            results.append(bench.recipe(name, recipes[name], progress=lambda done, name=name: progress(name, done)))
        else:
            results.append(bench.checkpoint(name, progress=lambda done, name=name: progress(name, done)))
    for name in donors:
        if name not in names:
            results.append(bench.checkpoint(name, role="donor", progress=lambda done, name=name: progress(name, done)))
    return results
