"""Do scores that need no data predict the loss of a splice? All single-seam splices of two donors, measured.

A splice is A's blocks `[0, i)` and B's blocks `[j, L)`, for every `i >= 1` and `j < L`; the truth is its loss on the text.
Prints Spearman's rho of every score at the seam with minus that loss: over the splices that skip no depth (`i >= j`), and
over all.
"""

import json
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.evaluation.compare import Bench, Text, read_text
from frankenmerge.recipe import Block, recipe_of


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option("--text", "texts", required=True, multiple=True, type=click.Path(path_type=Path), help="A held-out text; may be repeated.")
@click.option("--characters", default=20_000, show_default=True, help="Of each text, how much is used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor_a: str, donor_b: str, texts: tuple[Path, ...], characters: int, as_json: bool) -> None:
    """Measure every single-seam splice and how well each score ranks them."""
    shown = [Text(text.name, text.content[:characters]) for text in map(read_text, texts)]
    a, b = open_checkpoint(donor_a), open_checkpoint(donor_b)
    atlases = [analyze(a), analyze(b)]
    alignments = {context: align(*atlases, context=context) for context in atlases[0].top}
    bench = Bench(shown, dict.fromkeys((donor_a, donor_b)))
    pairs = [(i, j) for i in range(1, a.blocks + 1) for j in range(b.blocks)]
    nats = []
    for i, j in track(pairs, "splicing", console=Console(stderr=True)):
        blocks = [Block(donor_a, index) for index in range(i)] + [Block(donor_b, index) for index in range(j, b.blocks)]
        nats.append(bench.recipe(f"{i},{j}", recipe_of(blocks)).total.nats_per_token)
    scores = {"-abs(i-j)": [-abs(i - j) for i, j in pairs]}
    for context, alignment in alignments.items():
        for name, score in alignment.scores.items():
            if context == "plain" or name != "correlation":
                scores[name if context == "plain" else f"{name} ({context})"] = [float(score.matrix[pair]) for pair in pairs]
    keeps = np.array([i >= j for i, j in pairs])
    spearman = {
        name: {
            "non_skipping": float(spearmanr(np.array(values)[keeps], -np.array(nats)[keeps]).statistic),
            "all": float(spearmanr(values, -np.array(nats)).statistic),
        }
        for name, values in scores.items()
    }
    donors = {name: bench.checkpoint(name).total.nats_per_token for name in dict.fromkeys((donor_a, donor_b))}
    result = {
        "spearman": spearman,
        "splices": len(pairs),
        "donors": donors,
        "measured": [{"i": i, "j": j, "nats_per_token": value} for (i, j), value in zip(pairs, nats, strict=True)],
        "fingerprints": [a.fingerprint, b.fingerprint],
        "versions": atlases[0].provenance,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(title=f"Spearman's rho with the measured loss, {len(pairs)} splices")
    for column in ("score", "i >= j", "all"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, rho in sorted(spearman.items(), key=lambda item: -item[1]["non_skipping"]):
        table.add_row(name, f"{rho['non_skipping']:.3f}", f"{rho['all']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
