"""Recipes to measure, and a bank of measured losses, so that a run may be interrupted."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.sampled_damage import damage_on_sampled
from frankenmerge.models.loading import Placement
from frankenmerge.splicing.resolve import Splice, resolve

T = TypeVar("T")
atlas_option = click.option(
    "--atlas",
    "files",
    nargs=2,
    type=click.Path(path_type=Path),
    help="The donors' atlases, where `analyze` has written them.",
)
dtype_option = click.option(
    "--dtype", default="float32", show_default=True, help="To compute losses in."
)
cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="A file that keeps measurements, to continue from after an interruption.",
)
CHUNK = 64
"""Recipes measured between two saves."""


def single_seams(a: str, b: str, blocks: tuple[int, int]) -> dict[tuple[int, int], Recipe]:
    """A's blocks `[0, i)` and B's `[j, L)`, by `(i, j)`, for every `i >= 1` and `j < L`.

    A whole donor, which has no seam, is among them.
    """
    return {
        (i, j): recipe_of(
            [
                *(Block(a, index) for index in range(i)),
                *(Block(b, index) for index in range(j, blocks[1])),
            ]
        )
        for i in range(1, blocks[0] + 1)
        for j in range(blocks[1])
    }


def sample(recipes: Mapping[T, Recipe], count: int | None, *, seed: int = 0) -> dict[T, Recipe]:
    """`count` of the recipes at random, or all where there are not as many; their order is kept."""
    if count is None or count >= len(recipes):
        return dict(recipes)
    places = np.random.default_rng(seed).choice(len(recipes), count, replace=False)
    keys = list(recipes)
    return {keys[place]: recipes[keys[place]] for place in sorted(places.tolist())}


def random_seams(
    a: str, b: str, blocks: tuple[int, int], count: int, *, seed: int = 0
) -> list[Recipe]:
    """`count` different recipes of two or three seams whose slices alternate between the donors.

    They have three quarters to nine quarters of the mean depth. They begin at a block 0 and end
    with a last block; the slices between are sampled uniformly, and may begin at block 0 again.
    """
    generator, found = np.random.default_rng(seed), {}
    mean = sum(blocks) / 2
    while len(found) < count:
        pieces, first = int(generator.integers(3, 5)), int(generator.integers(2))
        order = [(first + number) % 2 for number in range(pieces)]
        cuts = [np.sort(generator.choice(blocks[donor] + 1, 2, replace=False)) for donor in order]
        cuts[0][0], cuts[-1][1] = 0, blocks[order[-1]]
        slices = [
            (donor, int(start), int(stop)) for donor, (start, stop) in zip(order, cuts, strict=True)
        ]
        recipe = recipe_of(
            [
                Block((a, b)[donor], index)
                for donor, start, stop in slices
                for index in range(start, stop)
            ]
        )
        if all(start < stop for _, start, stop in slices) and len(recipe.seams) == pieces - 1:
            if 0.75 * mean <= len(recipe.blocks) <= 2.25 * mean:
                found[str(recipe)] = recipe
    return list(found.values())


def excerpts(texts: Iterable[Text], start: int, characters: int | None) -> list[Text]:
    """A part of every text; all that follows `start` without a number of characters."""
    stop = None if characters is None else start + characters
    return [Text(text.name, text.content[start:stop]) for text in texts]


class Bank:
    """Measured losses in nats per token, by recipe and texts; kept in a file if one is given."""

    def __init__(
        self,
        texts: Sequence[Text],
        names: Iterable[str],
        cache: Path | None = None,
        *,
        context: int | None = None,
        dtype: str = "float32",
    ) -> None:
        self.names = list(dict.fromkeys(names))
        self.checkpoints = {name: open_checkpoint(name) for name in self.names}
        self.bench = Bench(texts, self.checkpoints, context=context, placement=Placement(dtype))
        content = "\0".join(text.content for text in texts)
        place = f"{self.bench.context} {dtype} {content}"
        self.place = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.cache = cache
        self.known: dict[str, float] = (
            json.loads(cache.read_text()) if cache and cache.exists() else {}
        )

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The donors in memory, by name."""
        return {name: self.bench.load(name).model for name in self.names}

    def splice(self, recipe: Recipe) -> Splice:
        """A recipe of these donors, resolved."""
        return resolve(recipe, self.checkpoints)

    def damage_on_sampled(self, recipes: Iterable[Recipe]) -> np.ndarray:
        """The damage of every recipe on tokens that the donors generate, nats per token `[r]`."""
        splices = [self.splice(recipe) for recipe in recipes]
        return damage_on_sampled(splices, self.models, self.bench.assemble)

    def _key(self, blocks: Sequence[Block]) -> str:
        description = " ".join(
            f"{self.checkpoints[block.model].fingerprint[:16]}:{block.index}" for block in blocks
        )
        return f"{self.place} {hashlib.sha256(description.encode()).hexdigest()[:32]}"

    def donor(self, name: str) -> float:
        """A donor's own loss."""
        return self.losses(
            [recipe_of([Block(name, index) for index in range(self.checkpoints[name].blocks)])]
        )[0]

    def losses(self, recipes: Sequence[Recipe]) -> list[float]:
        """The loss of every recipe, measured unless it is known."""
        keys = [self._key(recipe.blocks) for recipe in recipes]
        missing = dict(
            sorted(
                (
                    (key, recipe)
                    for key, recipe in zip(keys, recipes, strict=True)
                    if key not in self.known
                ),
                key=lambda item: item[1].blocks,
            )
        )
        waiting = list(missing)
        for start in track(
            range(0, len(waiting), CHUNK),
            "splicing",
            console=Console(stderr=True),
            disable=not waiting,
        ):
            part = waiting[start : start + CHUNK]
            results = self.bench.splices([self.splice(missing[key]) for key in part])
            for key, result in zip(part, results, strict=True):
                self.known[key] = result.total.nats_per_token
            self._save()
        return [self.known[key] for key in keys]

    def _save(self) -> None:
        if self.cache:
            saved = json.loads(self.cache.read_text()) if self.cache.exists() else {}
            partial = self.cache.with_name(self.cache.name + ".partial")
            partial.write_text(json.dumps(saved | self.known))
            partial.replace(self.cache)
