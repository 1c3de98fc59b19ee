"""Measure the damage of recipes, on texts or on tokens that their donors generate."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Literal

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.items import Task
from frankenmerge.evaluation.sampled_damage import cross_losses, damage_on_sampled, disagreement
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.workflows.predictions import donors_loss

On = Literal["sampled"] | Sequence[Text]
"""What recipes are measured on: tokens that the donors generate, or texts."""
GainOn = On | Sequence[Task]
"""What gains are measured on: these, or tasks of multiple choice."""


class Measure:
    """Measures the damage of recipes; donors are opened and loaded once, when they are needed."""

    def __init__(
        self,
        alignments: Sequence[Alignment],
        *,
        placement: Placement = CPU,
        download: bool = False,
        allow_pickle: bool = False,
        opened: Mapping[str, Checkpoint] | None = None,
        progress: Progress = silent,
    ) -> None:
        """Name the donors; none is opened yet.

        Args:
            alignments: whose donors the recipes are made of.
            placement: in which type models compute, and where.
            download: whether donors may be fetched.
            allow_pickle: whether donors that have only pickles are converted.
            opened: donors that are open already, by name.
            progress: of measurements.
        """
        self.names = list(
            dict.fromkeys(name for alignment in alignments for name in alignment.donors)
        )
        self.progress = progress
        self._placement, self._opened = placement, dict(opened or {})
        self._open = {"download": download, "allow_pickle": allow_pickle}
        self._base: Bench | None = None
        self._splices: dict[str, Splice] = {}

    @property
    def donors(self) -> dict[str, Checkpoint]:
        """All donors of the alignments, open."""
        for name in self.names:
            if name not in self._opened:
                self._opened[name] = open_donor(name, **self._open)
        return {name: self._opened[name] for name in self.names}

    def damage(self, recipes: Sequence[Recipe], on: On) -> list[float]:
        """Nats per token of every recipe above its donors' own loss, each by its share."""
        bench = self._bench(on)
        splices = [self._resolved(recipe) for recipe in recipes]
        if isinstance(on, str):
            models = {name: bench.load(name).model for name in self.names}
            total = len(splices) * len(models)
            with self.progress("measuring splices", total, "splices") as advance:
                found = damage_on_sampled(splices, models, bench.assemble, advance=advance)
            return found.tolist()
        whole = [
            recipe_of([Block(name, index) for index in range(donor.blocks)])
            for name, donor in self.donors.items()
        ]
        alone = [self._resolved(recipe) for recipe in whole]
        total = (len(splices) + len(alone)) * len(bench.texts)
        with self.progress("measuring splices", total, "splices") as advance:
            results = bench.splices([*alone, *splices], advance=advance)
        losses = [result.total.nats_per_token for result in results]
        own = dict(zip(self.donors, losses, strict=False))
        measured = zip(splices, islice(losses, len(alone), None), strict=True)
        return [loss - donors_loss(splice, own) for splice, loss in measured]

    @cached_property
    def disagreement(self) -> float:
        """What donors lose on each other's tokens, nats per token."""
        bench = self._bench("sampled")
        return disagreement(cross_losses({name: bench.load(name).model for name in self.names}))

    def remarks(self, recipes: Sequence[Recipe]) -> tuple[str, ...]:
        """Worth knowing about the donors of recipes; each once."""
        found = (remark for recipe in recipes for remark in self._resolved(recipe).remarks)
        return tuple(dict.fromkeys(found))

    def _resolved(self, recipe: Recipe) -> Splice:
        if recipe.key not in self._splices:
            self._splices[recipe.key] = resolve(recipe, self.donors)
        return self._splices[recipe.key]

    def _bench(self, on: On) -> Bench:
        """All texts are measured with the same donors in memory."""
        if self._base is None:
            self._base = Bench((), self.donors, placement=self._placement)
        return self._base if isinstance(on, str) else self._base.on(on)
