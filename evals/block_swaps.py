"""Do alignment scores predict which blocks can be exchanged? Both tests of exchangeability.

Replacement: A with its block `i` replaced by B's block `j`, for every `i` and `j`. Interchange: A's
blocks `i` and `j` swapped. Prints Spearman's rho of every score, between the inputs of the two
blocks, with minus the divergence on random tokens.
"""

import json
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.block_swaps import exchange
from frankenmerge.models.loading import load_model


@click.command()
@click.option("--donor-a", required=True, help="The donor whose blocks are exchanged.")
@click.option("--donor-b", required=True, help="The donor of the replacements.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor_a: str, donor_b: str, as_json: bool) -> None:
    """Run both tests on two donors, and print how well each score ranks the divergences."""
    donors = {name: open_checkpoint(name) for name in dict.fromkeys((donor_a, donor_b))}
    a, b = ((name, donors[name].blocks) for name in (donor_a, donor_b))
    found = exchange(a, b, {name: load_model(donor) for name, donor in donors.items()})
    atlases = {name: analyze(donor) for name, donor in donors.items()}
    between, within = (
        align(atlases[donor_a], atlases[donor_b]),
        align(atlases[donor_a], atlases[donor_a]),
    )
    upper = np.triu_indices(a[1], 1)
    result = {
        name: {
            "replacement": _rho(
                between.scores[name].matrix[:-1, :-1].ravel(), -found.replacement[0].ravel()
            ),
            "interchange": _rho(
                within.scores[name].matrix[:-1, :-1][upper], -found.interchange[0][upper]
            ),
        }
        for name in between.scores
    }
    if as_json:
        tables = {
            name: [table.tolist() for table in pair] for name, pair in found._asdict().items()
        }
        click.echo(json.dumps({"spearman": result, "nats": tables}))
        return
    printed = Table(title="Spearman's rho with minus the divergence after exchanging blocks")
    for column in ("score", "replacement", "interchange"):
        printed.add_column(column, justify="left" if column == "score" else "right")
    for name, rho in sorted(result.items(), key=lambda item: -item[1]["replacement"]):
        printed.add_row(name, f"{rho['replacement']:.3f}", f"{rho['interchange']:.3f}")
    Console().print(printed)


def _rho(one: np.ndarray, other: np.ndarray) -> float:
    found: Any = spearmanr(one, other)  # scipy's types do not know the result's names
    return float(found.statistic)


if __name__ == "__main__":
    main()
