"""Time and memory of every score of `align`, on made-up atlases of any size.

Memory is the peak of what numpy allocates while the score is computed, in copies of the donors'
activations on the probes in float64: `workflows.costs` plans with them.
"""

import json
import time
import tracemalloc

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from frankenmerge.analysis.align import FUNCTIONS
from frankenmerge.analysis.probes import COUNT, LENGTH
from frankenmerge.artefacts.atlas import Atlas, TopTokens

PROBED, TOP, VOCABULARY = COUNT * (LENGTH - 1), 10, 1000
INPUTS = ("greedy", "gradient")
"""Scores of searches for inputs, which the atlases do not have."""


def made_up(blocks: int, width: int, seed: int) -> Atlas:
    """An atlas of random numbers."""
    generator = np.random.default_rng(seed)
    probes = np.empty((blocks + 1, PROBED, width), np.float16)
    for each in probes:
        each[:] = generator.standard_normal((PROBED, width), dtype=np.float32) * 0.3
    tokens = generator.integers(0, VOCABULARY, (blocks + 1, width, TOP)).astype(np.int32)
    return Atlas(
        donor=f"random {seed}",
        fingerprint=str(seed),
        top={"plain": TopTokens(tokens, np.zeros(tokens.shape, np.float32))},
        probes=probes,
        probe_scale=np.ones((blocks + 1, width), np.float32),
        vocabulary=[str(token) for token in range(VOCABULARY)],
    )


@click.command()
@click.option("--blocks", default=16, show_default=True, help="Blocks of both donors.")
@click.option("--width", default=512, show_default=True, help="Neurons of both donors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(blocks: int, width: int, as_json: bool) -> None:
    """Measure every score."""
    a, b = (made_up(blocks, width, seed) for seed in (0, 1))
    copy = 8 * (blocks + 1) * PROBED * width
    rows = {}
    for name, function in FUNCTIONS.items():
        if name in INPUTS:
            continue
        tracemalloc.start()
        started = time.process_time()
        function(a, b, "plain", width)
        seconds = time.process_time() - started
        rows[name] = {"seconds": seconds, "copies": tracemalloc.get_traced_memory()[1] / copy}
        tracemalloc.stop()
    if as_json:
        click.echo(json.dumps({"blocks": blocks, "width": width, "scores": rows}))
        return
    table = Table("score", "CPU seconds", "copies in memory", title=f"{blocks} x {width}")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['copies']:.2f}")
    table.add_row("all", f"{sum(row['seconds'] for row in rows.values()):.1f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
