"""What `plan` measures: recipes on texts, or on tokens that their donors draw."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from frankenmerge.cli.console import progress

SAMPLED = "drawn"
"""Given in the place of a text: tokens that the donors draw themselves."""
HANDFUL = 16
"""Splices measured to calibrate the prediction."""


class Bench(NamedTuple):
    """On what and how recipes are measured."""

    donors: list[str]
    texts: tuple[str, ...]
    """Files; `SAMPLED` alone for none."""
    placed: dict[str, Any]
    """Device and dtype."""

    @property
    def drawn(self) -> bool:
        """Whether it takes no text."""
        return self.texts == (SAMPLED,)

    def damage(self, recipes: Sequence) -> list[float]:
        """Nats per token of every recipe above its donors' own loss, each donor's by its share of the blocks."""
        from pathlib import Path

        from frankenmerge.artefacts.recipe import Block, recipe_of
        from frankenmerge.evaluation.compare import Bench as Loaded
        from frankenmerge.evaluation.compare import read_text
        from frankenmerge.evaluation.sampled_damage import damage_on_sampled
        from frankenmerge.planning.prediction import donor_loss

        if self.drawn:
            loaded = Loaded([], self.donors, **self.placed)
            checkpoints, models = (
                {name: loaded.load(name)[0] for name in self.donors},
                {name: loaded.load(name)[1] for name in self.donors},
            )
            with progress("splicing", len(recipes) * len(models), "recipes") as advance:
                return damage_on_sampled(recipes, checkpoints, models, advance=advance).tolist()
        bench = Loaded([read_text(Path(text)) for text in self.texts], self.donors, **self.placed)
        whole = [
            recipe_of([Block(name, index) for index in range(bench.load(name)[0].blocks)])
            for name in self.donors
        ]
        with progress(
            "splicing", (len(recipes) + len(whole)) * len(self.texts), "recipes"
        ) as advance:
            found = [
                result.total.nats_per_token
                for result in bench.recipes([*whole, *recipes], advance=advance)
            ]
        own = dict(zip(self.donors, found, strict=False))
        return [
            loss - donor_loss(recipe.blocks, own)
            for recipe, loss in zip(recipes, found[len(whole) :], strict=True)
        ]


def calibrated(alignments: list, bench: Bench) -> Any:
    """The default model after seeing a handful of splices."""
    import numpy as np

    from frankenmerge.planning.plan import spread_splices
    from frankenmerge.planning.prediction import default_model, features, refined
    from frankenmerge.planning.states import states_of

    recipes = spread_splices(alignments, HANDFUL)
    found = features([recipe.blocks for recipe in recipes], states_of(alignments))
    origin = {
        "refined": default_model().origin,
        "texts": list(bench.texts),
        "splices": len(recipes),
    }
    return refined(default_model(), found, np.array(bench.damage(recipes)), origin)


def verified(plans: list, bench: Bench, model: Any) -> list:
    """The plans with what was measured of them, the best first; on drawn tokens that is a better prediction, on a text the truth."""
    damage = bench.damage([entry.recipe for entry in plans])
    ranked = sorted(zip(plans, damage, strict=True), key=lambda pair: pair[1])
    return [_told(entry, value, bench, model) for entry, value in ranked]


def _told(entry: Any, damage: float, bench: Bench, model: Any) -> Any:
    """A plan with what was measured of it."""
    if bench.drawn:
        return entry._replace(
            predicted_damage=damage, interval=model.interval(damage, sampled=True), basis=SAMPLED
        )
    return entry._replace(measured=damage)


class Damped(NamedTuple):
    """What damping did to a plan."""

    kept: str | None
    """The way of damping that lost least; None where the plan as it is loses less."""
    damage: dict[str, float]
    """Nats per token, by way of damping; `none` for the plan as it is."""


def damped(plans: list, alignments: list, bench: Bench, model: Any) -> tuple[list, Damped]:
    """The plans, the repeated blocks of each damped the way that loses least, or as it is where that loses less; the best first.

    Told beside them is what was tried on the best. On a text the prediction, which knows of no
    damping, is moved by what damping gained there.
    """
    from frankenmerge.planning.damping import dampings
    from frankenmerge.splicing.opening import open_donors

    ways = []
    for entry in plans:
        stream = open_donors(entry.recipe)[entry.recipe.base].architecture.stream
        # A norm behind a block's maps undoes what they are scaled by.
        found = (
            dampings(entry.recipe, alignments, stream.writes)
            if stream and not stream.output_norms
            else []
        )
        ways.append({"none": entry.recipe, **{way.name: way.recipe for way in found}})
    measured = iter(bench.damage([recipe for recipes in ways for recipe in recipes.values()]))
    ranked = []
    for entry, recipes in zip(plans, ways, strict=True):
        damage = {name: next(measured) for name in recipes}
        best = min(damage, key=damage.__getitem__)
        predicted = max(0.0, entry.predicted_damage + damage[best] - damage["none"])
        interval = model.interval(predicted, sampled=entry.basis == SAMPLED)
        told = entry._replace(recipe=recipes[best], predicted_damage=predicted, interval=interval)
        ranked.append(
            (
                damage[best],
                _told(told, damage[best], bench, model),
                Damped(None if best == "none" else best, damage),
            )
        )
    ranked.sort(key=lambda each: each[0])
    return [entry for _, entry, _ in ranked], ranked[0][2]
