"""Fit the planner's default weights.

`python evals/fit_planner.py --real build/real/smollm2 --data ../shared/data` writes
`frankenmerge/planning/prediction.json`. The weights are fitted on three of the package's donors,
two small models of TinyStories and SmolLM2, which `make real` fetches, each with itself, on
characters from `START` of the demo's texts, or of TinyStories. `splice_prediction.py` tests on
others and, by default, on the characters before. The spreads are the expected errors for a donor of
another family; `--further RESULT.json`, what `splice_prediction.py --json` has printed of a model
that is not fitted on, counts for them as one more family.
"""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import transformers
from splices import Bank, excerpts, random_seams, sample, single_seams

import frankenmerge
from frankenmerge.analysis.geometry import gram
from frankenmerge.evaluation.documents import Text, read_text
from frankenmerge.models.sampling import states_on_sampled
from frankenmerge.planning.prediction import (
    FLOOR,
    SAMPLED_FLOOR,
    DamageModel,
    States,
    donor_loss,
    features,
    fitted,
    log_error,
    new_family,
)
from frankenmerge.storage.atomic import write_file

PACKAGE = Path(frankenmerge.__file__).parent
FITTED = ("stranger", "gpt2", "wide")
"""Donors of different random weights, shapes and families; none is related to the package's others.
"""
STORIES = ("stories260K", "llama2xs-281K")
"""Models of TinyStories."""
START, CHARACTERS, CONTEXT, SPLICES, SEVERAL, SEED = 25_000, 2_500, 128, 100, 100, 0
DOMAIN_SHARE = 0.15
"""Not fitted here, where every donor is spliced with itself: see `evals/plan_intervals.py`."""
MOST_SEVERAL = {"wide": 60}
"""There are fewer recipes of donors of four blocks."""
REAL_DTYPE = "bfloat16"
"""Of SmolLM2, as it is stored."""


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
@click.option("--real", required=True, help="SmolLM2's folder, as `make real` writes it.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder of models/stories260K, models/llama2xs-281K and text/tinystories.txt.",
)
@click.option(
    "--further",
    multiple=True,
    type=click.Path(path_type=Path),
    help="splice_prediction.py's JSON on another family, made with these weights; may be repeated.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="A folder that keeps measurements, to continue from after an interruption.",
)
def main(real: str, data: Path, further: tuple[Path, ...], cache: Path | None) -> None:
    """Measure the splices of the donors, fit, and write the weights with their origin."""
    demo = [read_text(PACKAGE / "demo" / "text" / f"{name}.txt") for name in ("code", "prose")]
    demo = excerpts(demo, START, CHARACTERS)
    stories = excerpts([read_text(data / "text" / "tinystories.txt")], START, 2 * CHARACTERS)
    jobs = [
        *((PACKAGE / "demo" / "donors" / name, demo, "float32") for name in FITTED),
        *((data / "models" / name, stories, "float32") for name in STORIES),
        (Path(real), demo, REAL_DTYPE),
    ]
    measured = {path.name: _measured(path, texts, cache, dtype) for path, texts, dtype in jobs}
    off = []
    for name, own in measured.items():
        weights = _fit([other for key, other in measured.items() if key != name])
        model = DamageModel(math.log(FLOOR), tuple(weights), (0, 0), (0, 0))
        off.append(log_error(own.damage, model.damage(own.features)))
        mean, deviation = off[-1].mean(), off[-1].std()
        click.echo(
            f"Without {name}: mean error of its prediction {mean:+.2f} (log), "
            f"standard deviation {deviation:.2f}",
            err=True,
        )
    weights = _fit(list(measured.values()))
    results = [json.loads(path.read_text("utf-8")) for path in further]
    others = [
        {kind: np.array(values) for kind, values in each["damage"].items()} for each in results
    ]
    off += [log_error(each["measured"], each["predicted"]) for each in others]
    sampled = [log_error(own.damage, own.sampled, SAMPLED_FLOOR) for own in measured.values()]
    sampled += [log_error(each["measured"], each["drawn"], SAMPLED_FLOOR) for each in others]
    model = DamageModel(
        math.log(FLOOR),
        tuple(float(weight) for weight in weights),
        new_family(off),
        new_family(sampled),
        _origin(measured, [*demo, *stories], results),
        DOMAIN_SHARE,
    )
    content = json.dumps(model.as_json(), indent=1) + "\n"
    write_file(PACKAGE / "planning" / "prediction.json", content.encode())
    click.echo(json.dumps(model.as_json()))


def _origin(
    measured: Mapping[str, Measured], texts: Sequence[Text], further: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the weights were fitted on, and by which versions."""
    content = "\0".join(text.content for text in texts)
    return {
        "script": "evals/fit_planner.py",
        "donors": list(measured),
        "splices": sum(len(own.damage) for own in measured.values()),
        "spread": "a Student interval over the donors, each left out of the fit, and over others",
        "domain_share": "chosen on plans of code, prose, base, code and base, prose",
        "text": {
            "names": [Path(text.name).stem for text in texts],
            "start": START,
            "characters": CHARACTERS,
            "context": CONTEXT,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        },
        "further": {
            Path(name).name: fingerprint
            for each in further
            for name, fingerprint in zip(each["donors"], each["fingerprints"], strict=False)
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


def _measured(folder: Path, texts: Sequence[Text], cache: Path | None, dtype: str) -> Measured:
    """Features and damage of splices of a donor with itself that have a seam."""
    path, file = str(folder), cache and cache / f"{folder.name}.json"
    bank = Bank(texts, [path], file, context=CONTEXT, dtype=dtype)
    donor = bank.checkpoints[path]
    blocks = donor.blocks, donor.blocks
    recipes = [
        *sample(single_seams(path, path, blocks), SPLICES, seed=SEED).values(),
        *random_seams(path, path, blocks, MOST_SEVERAL.get(folder.name, SEVERAL), seed=SEED),
    ]
    recipes = [recipe for recipe in recipes if recipe.seams]
    damage = np.array(bank.losses(recipes)) - donor_loss(
        recipes[0].blocks, {path: bank.donor(path)}
    )
    shown, count = states_on_sampled(bank.models)[path], donor.blocks + 1
    states = States({path: 0}, {path: donor.blocks}, gram(shown, shown)[:count, :count])
    sampled = bank.damage_on_sampled(recipes)
    return Measured(
        features([recipe.blocks for recipe in recipes], states), damage, sampled, donor.fingerprint
    )


def _fit(measured: Sequence[Measured]) -> np.ndarray:
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
