"""What `plan --sweep` costs beside the forward passes that it stands for, in one run.

The bare passes: every window and scale, made in memory, run by transformers over the tokens that
windows are selected by, the logits thrown away. Pieces of the sweep and of the bare passes take
turns, one block number after the other, so that both meet the same machine.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.evaluation.domains import split
from frankenmerge.evaluation.gains import losses_in_turn
from frankenmerge.planning.candidates import REPEATED, repeated_window, windows
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.workflows.gaining import domains_on, parts_of


@click.command()
@click.option("--donor", "name", required=True, help="The donor.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text; may be repeated.",
)
@click.option("--every", default=1, show_default=True, help="Measure every so manyth window's end.")
def main(name: str, texts: tuple[Path, ...], every: int) -> None:
    """Print the seconds of both, and their ratio."""
    donor = open_checkpoint(name)
    bench = Bench((), {name: donor})
    selection = split(domains_on([read_text(text) for text in texts], bench, [name], 0), 2)[0]
    batches = [batch.ids for domain in selection for batch in domain.batches()]
    writes = parts_of({name: donor}, None).writes
    seconds = {"sweep": 0.0, "bare": 0.0}
    blocks = {"sweep": 0, "bare": 0}
    count = 0
    for stop in range(1, donor.blocks + 1, every):
        splices = [
            resolve(repeated_window(name, donor.blocks, *window, scale, writes), {name: donor})
            for window in windows(donor.blocks)
            if window[1] == stop
            for scale in REPEATED
        ]
        count += len(splices)
        started = time.perf_counter()
        blocks["sweep"] += sum(
            each.blocks for each in losses_in_turn(splices, bench.assemble, selection)
        )
        seconds["sweep"] += time.perf_counter() - started
        for passes, taken in _bare(bench, splices, batches):
            blocks["bare"] += passes
            seconds["bare"] += taken
    click.echo(
        json.dumps(
            {
                "windows_and_scales": count,
                "tokens": sum(ids.numel() for ids in batches),
                "seconds": seconds,
                "blocks_run": blocks,
                "ratio": seconds["sweep"] / seconds["bare"],
            }
        )
    )


@torch.no_grad()
def _bare(
    bench: Bench, splices: list[Splice], batches: list[torch.Tensor]
) -> Iterator[tuple[int, float]]:
    """Of every splice the passes through a block and the seconds in transformers' own forward."""
    for splice in splices:
        model = bench.assemble(splice)
        started = time.perf_counter()
        for ids in batches:
            model(input_ids=ids, use_cache=False)
        yield len(splice.recipe.blocks) * len(batches), time.perf_counter() - started


if __name__ == "__main__":
    main()
