"""Does the planner predict what a splice costs? Measures single-seam splices and random recipes.

A splice is A's blocks `[0, i)` and B's blocks `[j, L)`, for every `i >= 1` and `j < L`, or for some
of them at random; the truth is its loss on the texts. Prints Spearman's rho of every score at the
seam with minus that loss: over the splices that skip no depth (`i >= j`), and over all. The
predictions for whole recipes by the default weights follow, also for recipes of two and three
seams: `predicted` from the donors' states on tokens that they generated, `from_probes` from their
states on random tokens; and `drawn` (in the table: sampled), the damage that the splices themselves
do on the sampled tokens. None of the three reads a text.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from splices import (
    Bank,
    atlas_option,
    cache_option,
    dtype_option,
    excerpts,
    random_seams,
    sample,
    single_seams,
)

from frankenmerge.analysis.align import INPUT_METHODS, align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.inputs import even_neurons, with_inputs
from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.atlas import Atlas, load_atlas
from frankenmerge.artefacts.bootstrap import percentile_interval, resample_indices
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.token_overlap import token_agreement
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.evaluation.documents import read_text
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.sampling import states_on_sampled
from frankenmerge.planning.prediction import default_model, donor_loss, features, log_error
from frankenmerge.planning.states import states_of
from frankenmerge.storage.atomic import cache_folder

RESAMPLES = 1000
KINDS = {"predicted": "predicted", "from_probes": "from probes", "drawn": "sampled"}
"""Predictions of whole recipes, by their keys in the result, as the table names them."""


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option(
    "--characters", default=20_000, show_default=True, help="Number of characters of each text."
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: the longest that both donors support]",
)
@click.option("--splices", type=click.IntRange(2), help="Number of splices. [default: all]")
@click.option(
    "--several",
    default=200,
    show_default=True,
    help="Number of random recipes of two or three seams.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(INPUT_METHODS),
    help="A search whose inputs are compared, too, for 16 neurons of every block; may be repeated.",
)
@atlas_option
@dtype_option
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    characters: int,
    context: int | None,
    splices: int | None,
    several: int,
    methods: tuple[str, ...],
    files: tuple[Path, Path] | None,
    dtype: str,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure single-seam splices, and how well each score ranks them."""
    bank = Bank(
        excerpts(map(read_text, texts), 0, characters),
        [donor_a, donor_b],
        cache,
        context=context,
        dtype=dtype,
    )
    a, b = bank.checkpoints[donor_a], bank.checkpoints[donor_b]
    atlases = [load_atlas(file) for file in files] if files else [analyze(a), analyze(b)]
    single = sample(single_seams(donor_a, donor_b, (a.blocks, b.blocks)), splices)
    pairs, chosen = (
        list(single),
        [*single.values(), *random_seams(donor_a, donor_b, (a.blocks, b.blocks), several)],
    )
    nats = np.array(bank.losses(chosen))
    damage = _predictions(bank, atlases, chosen)
    own = {name: bank.donor(name) for name in bank.names}
    measured = nats - [donor_loss(recipe.blocks, own) for recipe in chosen]
    seamed = np.array([bool(recipe.seams) for recipe in chosen])
    keeps, first = np.array([i >= j for i, j in pairs]), nats[: len(pairs)]
    scores = _scores(bank, atlases, pairs) | _of_inputs([a, b], atlases, pairs, methods)
    result = {
        "spearman": {
            name: {
                "non_skipping": _rho(value[keeps], -first[keeps]),
                "all": _rho(value, -first),
                "ci": _interval(value[keeps], -first[keeps]),
            }
            for name, value in scores.items()
        },
        **{
            kind: _judged(damage[kind], nats, keeps) | _errors(kind, damage[kind], measured, seamed)
            for kind in KINDS
        },
        "splices": len(pairs),
        "several": len(chosen) - len(pairs),
        "donors": own,
        "measured": [
            {"i": i, "j": j, "nats_per_token": value}
            for (i, j), value in zip(pairs, first.tolist(), strict=True)
        ],
        "damage": {"measured": measured.tolist()}
        | {kind: values.tolist() for kind, values in damage.items()},
        "fingerprints": [a.fingerprint, b.fingerprint],
        "versions": atlases[0].provenance,
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    table = Table(
        title=f"Spearman's rho with the measured loss, {result['splices']} single-seam splices, "
        f"{result['several']} of more seams"
    )
    for column in ("score", "i >= j", "95 %", "all", "more seams", "in the interval"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for kind, label in KINDS.items():
        table.add_row(
            label,
            *_cells(result[kind]),
            f"{result[kind]['multi_seam']:.3f}",
            f"{result[kind]['within_interval']:.0%}",
        )
    for name, rho in sorted(result["spearman"].items(), key=lambda item: -item[1]["non_skipping"]):
        table.add_row(name, *_cells(rho))
    Console().print(table)


def _cells(rho: dict) -> list[str]:
    low, high = rho["ci"] if isinstance(rho["ci"], list) else rho["ci"]["non_skipping"]
    return [f"{rho['non_skipping']:.3f}", f"{low:.2f}-{high:.2f}", f"{rho['all']:.3f}"]


def _predictions(bank: Bank, atlases: list, recipes: list[Recipe]) -> dict[str, np.ndarray]:
    """The predicted damage of every recipe, by kind."""
    found, seamed = {}, np.array([bool(recipe.seams) for recipe in recipes])
    for kind, shown in (("predicted", states_on_sampled(bank.models)), ("from_probes", None)):
        states = states_of([align(*atlases, states=shown)])
        found[kind] = (
            default_model().damage(features([recipe.blocks for recipe in recipes], states)) * seamed
        )
    return found | {"drawn": bank.damage_on_sampled(recipes)}


def _judged(damage: np.ndarray, nats: np.ndarray, keeps: np.ndarray) -> dict[str, Any]:
    """Rho of predicted damage with losses, and its intervals.

    Over the splices of one seam that skip no depth, all of them, and recipes of more seams.
    """
    count = len(keeps)
    parts = {
        "non_skipping": np.flatnonzero(keeps),
        "all": np.arange(count),
        "multi_seam": np.arange(count, len(nats)),
    }
    rhos: dict[str, Any] = {name: _rho(damage[part], nats[part]) for name, part in parts.items()}
    return rhos | {
        "ci": {name: _interval(damage[part], nats[part]) for name, part in parts.items()}
    }


def _errors(
    kind: str, damage: np.ndarray, measured: np.ndarray, seamed: np.ndarray
) -> dict[str, float]:
    """The share of measured damages in the interval, and by how much their logarithm is off."""
    ends = [
        default_model().interval(value, sampled=kind == "drawn")
        for value in damage[seamed].tolist()
    ]
    held = [
        low <= value <= high
        for (low, high), value in zip(ends, measured[seamed].tolist(), strict=True)
    ]
    off = log_error(measured, damage)[seamed]
    return {
        "within_interval": float(np.mean(held)),
        "off_mean": float(off.mean()),
        "off_deviation": float(off.std()),
    }


def _scores(bank: Bank, atlases: list, pairs: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Every score at the seams, by name."""
    alignments: dict[str, Alignment] = {
        kind: align(*atlases, context=kind) for kind in atlases[0].top if kind in atlases[1].top
    }
    scores = {"weights": _weights(bank, pairs)}
    for kind, alignment in alignments.items():
        for name, score in alignment.scores.items():
            if kind == "plain" or name in ("argmax", "jaccard"):
                scores[name if kind == "plain" else f"{name} ({kind})"] = np.array(
                    [score.matrix[pair] for pair in pairs]
                )
    scores["-abs(i-j)"] = scores.pop("distance")
    return scores


def _of_inputs(
    donors: list[Checkpoint],
    atlases: list[Atlas],
    pairs: list[tuple[int, int]],
    methods: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """The scores of searches for inputs, each with its null, and of single tokens alike.

    All are of the same neurons.
    """
    if not methods:
        return {}
    neurons = even_neurons(min(atlas.width for atlas in atlases))
    scores = {}
    for method in methods:
        found = [
            with_inputs(atlas, donor, method, neurons, cache=cache_folder())
            for atlas, donor in zip(atlases, donors, strict=True)
        ]
        score = align(*found, method=method).scores[method]
        scores |= {method: score.matrix, f"{method}, null": score.nulls["permuted_neurons"]}
    best = token_agreement(*(atlas.top["plain"].tokens[:, neurons, :1] for atlas in atlases))
    scores |= {"single tokens": best.matrix, "single tokens, null": best.permuted}
    return {
        f"{name} ({len(neurons)} neurons)": np.array([matrix[pair] for pair in pairs])
        for name, matrix in scores.items()
    }


def _rho(one: np.ndarray, other: np.ndarray) -> float:
    found: Any = spearmanr(one, other)  # scipy's types do not know the result's names
    return float(found.statistic)


def _interval(one: np.ndarray, other: np.ndarray) -> list[float]:
    """95 % bootstrap interval of rho over splices."""
    resampled = [
        _rho(one[chosen], other[chosen])
        for chosen in resample_indices(len(one), RESAMPLES, seed=0)
        if len(set(one[chosen])) > 1
    ]
    return percentile_interval(np.array(resampled)).tolist() if resampled else [float("nan")] * 2


def _weights(bank: Bank, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Cosine of the weights of the blocks on both sides of the seam.

    Those of the block that is entered, and of the block that would have been next (at A's end: its
    last).
    """
    vectors = []
    for name in (bank.names[0], bank.names[-1]):
        blocks = [
            np.concatenate([p.detach().float().flatten().numpy() for p in block.parameters()])
            for block in blocks_of(bank.models[name])
        ]
        vectors.append(np.stack([block / np.linalg.norm(block) for block in blocks]))
    table = vectors[0] @ vectors[1].T
    return np.array([table[min(i, len(table) - 1), j] for i, j in pairs])


if __name__ == "__main__":
    main()
