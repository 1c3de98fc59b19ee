"""Fit the planner's default weights on some of the package's donors: `python evals/fit_planner.py`.

Writes `frankenmerge/planning/prediction.json`. The weights are fitted on the donors `FITTED`, each
with itself, and on the demo's texts from character `START`; `splice_prediction.py` tests on others
and, by default, on the characters before. The spreads are the expected errors for a donor of
another family.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import transformers
from splices import Bank, excerpts, random_seams, single_seams

import frankenmerge
from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.evaluation.documents import Text, read_text
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
DOMAIN_SHARE = 0.1
"""Not fitted here, where every donor is spliced with itself: see `evals/plan_intervals.py`."""
MOST_SEVERAL = {"wide": 60}
"""There are fewer recipes of donors of four blocks."""


class Measured(NamedTuple):
    """The splices of one donor with itself."""

    features: np.ndarray
    """`[r, FEATURES]`"""
    damage: np.ndarray
    """On the text, nats per token, `[r]`."""
    sampled: np.ndarray
    """The same on tokens that the donor generated, `[r]`."""
    fingerprint: str


@click.command()
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="A folder that keeps measurements, to continue from after an interruption.",
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
        mean, deviation = off[-1].mean(), off[-1].std()
        click.echo(
            f"Without {name}: mean error of its prediction {mean:+.2f} (log), "
            f"standard deviation {deviation:.2f}",
            err=True,
        )
    intercept, weights = _fit(list(measured.values()))
    sampled = [_off(own.sampled, own.damage, SAMPLED_FLOOR) for own in measured.values()]
    model = DamageModel(
        intercept,
        tuple(float(weight) for weight in weights),
        new_family(off),
        new_family(sampled),
        _origin(measured, texts),
        DOMAIN_SHARE,
    )
    content = json.dumps(model.as_json(), indent=1) + "\n"
    write_file(PACKAGE / "planning" / "prediction.json", content.encode())
    click.echo(json.dumps(model.as_json()))


def _origin(measured: Mapping[str, Measured], texts: Sequence[Text]) -> dict[str, Any]:
    """What the weights were fitted on, and by which versions."""
    content = "\0".join(text.content for text in texts)
    return {
        "script": "evals/fit_planner.py",
        "donors": list(FITTED),
        "splices": sum(len(own.damage) for own in measured.values()),
        "spread": "a Student interval over the donors, each left out of the fit",
        "domain_share": "chosen on plans of code, prose, base, code and base, prose",
        "text": {
            "names": ["code", "prose"],
            "start": START,
            "characters": CHARACTERS,
            "context": CONTEXT,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
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


def _measured(name: str, texts: Sequence[Text], cache: Path | None) -> Measured:
    """Features and damage of every splice of a donor with itself that has a seam."""
    path = str(PACKAGE / "demo" / "donors" / name)
    bank = Bank(texts, [path], cache and cache / f"{name}.json", context=CONTEXT)
    donor = bank.checkpoints[path]
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
    states = states_of([align(atlas, atlas, states=states_on_sampled(bank.models))])
    sampled = bank.damage_on_sampled(recipes)
    return Measured(
        features([recipe.blocks for recipe in recipes], states), damage, sampled, donor.fingerprint
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
