"""Fit the planner's default weights on some of the package's donors: `python evals/fit_planner.py`.

Writes `frankenmerge/planning/prediction.json`. Fitted on the donors `FITTED`, each with itself, and
on the characters from `START` on of the demo's texts; `splice_prediction.py` tests on others and,
as it is called by default, on the characters before. The spreads are what a donor of another family
than those is expected to be off by.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import transformers
from splices import Bank, excerpts, random_seams, single_seams

import frankenmerge
from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.evaluation.compare import read_text
from frankenmerge.evaluation.sampled_damage import damage_on_sampled
from frankenmerge.models.sampling import states_on_sampled
from frankenmerge.planning.prediction import (
    FLOOR,
    SAMPLED_FLOOR,
    DamageModel,
    donor_loss,
    features,
    fitted,
    new_family,
)
from frankenmerge.planning.states import states_of
from frankenmerge.storage.atomic import write_file

PACKAGE = Path(frankenmerge.__file__).parent
FITTED = ("stranger", "gpt2", "wide")
"""Donors of different random weights, shapes and families; none is related to those that are
reported.
"""
START, CHARACTERS, CONTEXT, SEVERAL, SEED = 25_000, 2_500, 128, 100, 0
MOST_SEVERAL = {"wide": 60}
"""Donors of four blocks make fewer recipes."""


class Measured(NamedTuple):
    """The splices of one donor with itself."""

    features: np.ndarray
    """`[r, FEATURES]`"""
    damage: np.ndarray
    """On the text, `[r]`."""
    drawn: np.ndarray
    """On tokens that the donor drew, `[r]`."""
    fingerprint: str


@click.command()
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="A folder for what was measured, to go on from after an interruption.",
)
def main(cache: Path | None) -> None:
    """Measure the splices of the donors, fit, and write the weights with their origin."""
    texts = excerpts(
        [read_text(PACKAGE / "demo" / "text" / f"{name}.txt") for name in ("code", "prose")],
        START,
        CHARACTERS,
    )
    measured = {name: _measured(name, texts, cache) for name in FITTED}
    off = []
    for name, own in measured.items():
        intercept, weights = _fit([other for key, other in measured.items() if key != name])
        model = DamageModel(intercept, tuple(weights), (0, 0), (0, 0))
        off.append(_off(model.damage(own.features), own.damage))
        click.echo(
            f"{name} left out: predicted off by {off[-1].mean():+.2f}, standard deviation {off[-1].std():.2f}",
            err=True,
        )
    intercept, weights = _fit(list(measured.values()))
    drawn = [_off(own.drawn, own.damage, SAMPLED_FLOOR) for own in measured.values()]
    origin = {
        "script": "evals/fit_planner.py",
        "donors": list(FITTED),
        "splices": sum(len(own.damage) for own in measured.values()),
        "spread": "a Student interval over the donors, each left out of the fit",
        "text": {
            "names": ["code", "prose"],
            "start": START,
            "characters": CHARACTERS,
            "context": CONTEXT,
            "sha256": hashlib.sha256(
                "\0".join(text.content for text in texts).encode()
            ).hexdigest(),
        },
        "seed": SEED,
        "fingerprints": {name: own.fingerprint for name, own in measured.items()},
        "versions": {
            "frankenmerge": frankenmerge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    model = DamageModel(
        intercept,
        tuple(float(weight) for weight in weights),
        new_family(off),
        new_family(drawn),
        origin,
    )
    write_file(
        PACKAGE / "planning" / "prediction.json",
        (json.dumps(model.as_json(), indent=1) + "\n").encode(),
    )
    click.echo(json.dumps(model.as_json()))


def _measured(name: str, texts: list, cache: Path | None) -> Measured:
    """Features and damage of every splice of a donor with itself that has a seam."""
    path = str(PACKAGE / "demo" / "donors" / name)
    bank = Bank(texts, [path], cache and cache / f"{name}.json", context=CONTEXT)
    donor, model, _ = bank.bench.load(path)
    blocks = donor.blocks, donor.blocks
    recipes = [
        *single_seams(path, path, blocks).values(),
        *random_seams(path, path, blocks, MOST_SEVERAL.get(name, SEVERAL), seed=SEED),
    ]
    recipes = [recipe for recipe in recipes if recipe.seams]
    damage = np.array(bank.losses(recipes)) - donor_loss(
        recipes[0].blocks, {path: bank.donor(path)}
    )
    atlas = analyze(donor)
    states = states_of([align(atlas, atlas, states=states_on_sampled({path: model}))])
    drawn = damage_on_sampled(recipes, {path: donor}, {path: model})
    return Measured(
        features([recipe.blocks for recipe in recipes], states), damage, drawn, donor.fingerprint
    )


def _off(predicted: np.ndarray, damage: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    return np.log(floor + np.maximum(0, damage)) - np.log(floor + np.maximum(0, predicted))


def _fit(measured: Sequence[Measured]) -> tuple[float, np.ndarray]:
    """Fit with the same weight for every donor."""
    found, damage = (
        np.concatenate([own.features for own in measured]),
        np.concatenate([own.damage for own in measured]),
    )
    return fitted(
        found,
        damage,
        np.concatenate([np.full(len(own.damage), 1 / len(own.damage)) for own in measured]),
    )


if __name__ == "__main__":
    main()
