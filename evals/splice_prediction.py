"""Does the planner predict what a splice costs? All single-seam splices of two donors, and random ones of more seams, measured.

A splice is A's blocks `[0, i)` and B's blocks `[j, L)`, for every `i >= 1` and `j < L`; the truth is its loss on the text.
Prints Spearman's rho of every score at the seam with minus that loss: over the splices that skip no depth (`i >= j`), and
over all; beside them the prediction of whole recipes, by the default weights, also for recipes of two and three seams.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from splices import Bank, excerpts, random_seams, single_seams

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.evaluation.compare import read_text
from frankenmerge.models import blocks_of
from frankenmerge.planning.prediction import FLOOR, default_model, donor_loss, features
from frankenmerge.planning.states import states_of

RESAMPLES = 1000


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option("--text", "texts", required=True, multiple=True, type=click.Path(path_type=Path), help="A held-out text; may be repeated.")
@click.option("--characters", default=20_000, show_default=True, help="Of each text, how much is used.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window. [default: what both donors were made for]")
@click.option("--several", default=200, show_default=True, help="Random recipes of two or three seams.")
@click.option("--cache", type=click.Path(path_type=Path), help="A file for what was measured, to go on from after an interruption.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    characters: int,
    context: int | None,
    several: int,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure every single-seam splice and how well each score ranks them."""
    bank = Bank(excerpts(map(read_text, texts), 0, characters), [donor_a, donor_b], cache, context=context)
    a, b = bank.checkpoints[donor_a], bank.checkpoints[donor_b]
    atlases = [analyze(a), analyze(b)]
    alignments = {kind: align(*atlases, context=kind) for kind in atlases[0].top if kind in atlases[1].top}
    recipes = single_seams(donor_a, donor_b, (a.blocks, b.blocks))
    pairs, more = list(recipes), random_seams(donor_a, donor_b, (a.blocks, b.blocks), several)
    nats, nats_more = (np.array(bank.losses(chosen)) for chosen in (list(recipes.values()), more))
    keeps = np.array([i >= j for i, j in pairs])
    scores = {"weights": _weights(bank, donor_a, donor_b, pairs)}
    for kind, alignment in alignments.items():
        for name, score in alignment.scores.items():
            if kind == "plain" or name in ("argmax", "jaccard"):
                scores[name if kind == "plain" else f"{name} ({kind})"] = np.array([score.matrix[pair] for pair in pairs])
    scores["-abs(i-j)"] = scores.pop("distance")
    own, states, model = (
        {name: bank.donor(name) for name in dict.fromkeys((donor_a, donor_b))},
        states_of([alignments["plain"]]),
        default_model(),
    )
    chosen = [*recipes.values(), *more]
    damage = model.damage(features([recipe.blocks for recipe in chosen], states))
    damage[[not recipe.seams for recipe in chosen]] = 0
    measured = np.array([*nats, *nats_more]) - [donor_loss(recipe.blocks, own) for recipe in chosen]
    off = np.log(FLOOR + np.maximum(0, measured)) - np.log(FLOOR + damage)
    seamed = np.array([bool(recipe.seams) for recipe in chosen])
    result = {
        "spearman": {
            name: {"non_skipping": _rho(value[keeps], -nats[keeps]), "all": _rho(value, -nats), "ci": _interval(value[keeps], -nats[keeps])}
            for name, value in scores.items()
        },
        "predicted": {
            "non_skipping": _rho(damage[: len(nats)][keeps], nats[keeps]),
            "all": _rho(damage[: len(nats)], nats),
            "multi_seam": _rho(damage[len(nats) :], nats_more),
            "ci": {
                "non_skipping": _interval(damage[: len(nats)][keeps], nats[keeps]),
                "all": _interval(damage[: len(nats)], nats),
                "multi_seam": _interval(damage[len(nats) :], nats_more),
            },
            "within_interval": float(np.mean((off >= model.spread[0]) & (off <= model.spread[1]), where=seamed)),
        },
        "splices": len(pairs),
        "several": len(more),
        "donors": own,
        "measured": [{"i": i, "j": j, "nats_per_token": value} for (i, j), value in zip(pairs, nats.tolist(), strict=True)],
        "fingerprints": [a.fingerprint, b.fingerprint],
        "versions": atlases[0].provenance,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(title=f"Spearman's rho with the measured loss, {len(pairs)} splices, {len(more)} of more seams")
    for column in ("score", "i >= j", "95 %", "all", "more seams"):
        table.add_column(column, justify="left" if column == "score" else "right")
    rows = [(name, rho, "") for name, rho in sorted(result["spearman"].items(), key=lambda item: -item[1]["non_skipping"])]
    predicted = result["predicted"] | {"ci": result["predicted"]["ci"]["non_skipping"]}
    for name, rho, several_rho in [("predicted", predicted, f"{predicted['multi_seam']:.3f}"), *rows]:
        low, high = rho["ci"]
        table.add_row(name, f"{rho['non_skipping']:.3f}", f"{low:.2f}-{high:.2f}", f"{rho['all']:.3f}", several_rho)
    Console().print(table)


def _rho(one: np.ndarray, other: np.ndarray) -> float:
    found: Any = spearmanr(one, other)  # scipy's types do not know the result's names
    return float(found.statistic)


def _interval(one: np.ndarray, other: np.ndarray) -> list[float]:
    """95 % bootstrap interval of rho over splices."""
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(0, len(one), len(one))
        if len(set(one[chosen])) > 1:
            drawn.append(_rho(one[chosen], other[chosen]))
    return [float(end) for end in np.quantile(drawn, [0.025, 0.975])] if drawn else [float("nan")] * 2


def _weights(bank: Bank, a: str, b: str, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Cosine of the weights of the block that is entered with those of the block that would have come next (at A's end: its last)."""
    vectors = []
    for name in (a, b):
        blocks = [
            np.concatenate([p.detach().float().flatten().numpy() for p in block.parameters()])
            for block in blocks_of(bank.bench.load(name)[1])
        ]
        vectors.append(np.stack([block / np.linalg.norm(block) for block in blocks]))
    table = vectors[0] @ vectors[1].T
    return np.array([table[min(i, len(table) - 1), j] for i, j in pairs])


if __name__ == "__main__":
    main()
