"""Fit the planner's default weights on some pairs of the package's donors: `python evals/fit_planner.py`.

Writes `frankenmerge/planning/prediction.json`. Fitted on the pairs `FITTED` and on the characters from `START` on of the demo's
texts; `splice_prediction.py` tests on other pairs and, as it is called by default, on the characters before. The spread of the
residuals is that of donors whose whole family was left out of the fit.
"""

import hashlib
import json
import platform
from pathlib import Path

import click
import numpy as np
import torch
import transformers
from splices import Bank, excerpts, random_seams, single_seams

import frankenmerge
from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.evaluation.compare import read_text
from frankenmerge.files import write_file
from frankenmerge.planning.prediction import FLOOR, Model, donor_loss, features, fitted
from frankenmerge.planning.states import states_of

PACKAGE = Path(frankenmerge.__file__).parent
FITTED = {"stranger": [("stranger", "stranger")], "base": [("prose", "base"), ("prose", "prose")], "gpt2": [("gpt2", "gpt2")],
          "wide": [("wide", "wide")]}  # fmt: skip
"""Pairs by family: what was trained from the same random weights."""
START, CHARACTERS, CONTEXT, SEVERAL, SEED = 25_000, 2_500, 128, 100, 0
MOST_SEVERAL = {"wide": 60}
"""Donors of four blocks make fewer recipes."""


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), help="A folder for what was measured, to go on from after an interruption.")
def main(cache: Path | None) -> None:
    """Measure the splices of the pairs, fit, and write the weights with their origin."""
    texts = excerpts([read_text(PACKAGE / "demo" / "text" / f"{name}.txt") for name in ("code", "prose")], START, CHARACTERS)
    measured = {family: [_measured(pair, texts, cache) for pair in pairs] for family, pairs in FITTED.items()}
    off = []
    for family, own in measured.items():
        intercept, weights = _fit([entry for other, entries in measured.items() if other != family for entry in entries])
        model = Model(intercept, tuple(weights), (0, 0))
        off += [np.log(FLOOR + np.maximum(0, damage)) - np.log(FLOOR + model.damage(found)) for found, damage, _ in own]
    intercept, weights = _fit([entry for entries in measured.values() for entry in entries])
    low, high = np.quantile(np.concatenate(off), [0.05, 0.95])
    origin = {
        "script": "evals/fit_planner.py",
        "pairs": [list(pair) for pairs in FITTED.values() for pair in pairs],
        "splices": sum(len(damage) for entries in measured.values() for _, damage, _ in entries),
        "spread": "quantiles of the residuals of families left out",
        "text": {"names": ["code", "prose"], "start": START, "characters": CHARACTERS, "context": CONTEXT,
                 "sha256": hashlib.sha256("\0".join(text.content for text in texts).encode()).hexdigest()},
        "seed": SEED,
        "fingerprints": {name: print_ for entries in measured.values() for _, _, prints in entries for name, print_ in prints.items()},
        "versions": {"frankenmerge": frankenmerge.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    model = Model(intercept, tuple(float(weight) for weight in weights), (float(low), float(high)), origin)
    write_file(PACKAGE / "planning" / "prediction.json", (json.dumps(model.as_json(), indent=1) + "\n").encode())
    click.echo(json.dumps(model.as_json()))


def _measured(pair: tuple[str, str], texts: list, cache: Path | None) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Features and damage of every splice of a pair that has a seam, and the donors' fingerprints."""
    a, b = (str(PACKAGE / "demo" / "donors" / name) for name in pair)
    bank = Bank(texts, [a, b], cache and cache / f"{'-'.join(pair)}.json", context=CONTEXT)
    blocks = bank.checkpoints[a].blocks, bank.checkpoints[b].blocks
    count = MOST_SEVERAL.get(pair[0], SEVERAL)
    recipes = [*single_seams(a, b, blocks).values(), *random_seams(a, b, blocks, count, seed=SEED)]
    recipes = [recipe for recipe in recipes if recipe.seams]
    losses, own = bank.losses(recipes), {name: bank.donor(name) for name in dict.fromkeys((a, b))}
    damage = np.array([loss - donor_loss(recipe.blocks, own) for loss, recipe in zip(losses, recipes, strict=True)])
    states = states_of([align(*(analyze(bank.checkpoints[name]) for name in (a, b)))])
    prints = {name: bank.checkpoints[path].fingerprint for name, path in zip(pair, (a, b), strict=True)}
    return features([recipe.blocks for recipe in recipes], states), damage, prints


def _fit(entries: list) -> tuple[float, np.ndarray]:
    """Fit with the same weight for every pair."""
    found, damage = (np.concatenate([entry[part] for entry in entries]) for part in (0, 1))
    return fitted(found, damage, np.concatenate([np.full(len(entry[1]), 1 / len(entry[1])) for entry in entries]))


if __name__ == "__main__":
    main()
