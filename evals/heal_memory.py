"""The memory of healing donors of 7, 13 and 70 billion parameters, on one GPU and on several.

The donors are hollow: headers and configs of these shapes (see `large_donors.py`). The result is
1.25 times as deep, with two seams; bfloat16, `--offload --checkpointing --micro-batch 1`.
"""

import json
import shutil
from pathlib import Path

import click
from big_donor import make_donor
from large_donors import SHAPES, folder_option
from rich.console import Console
from rich.table import Table

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.healing.memory import memory_of
from frankenmerge.healing.scopes import SCOPES
from frankenmerge.models.loading import Placement
from frankenmerge.workflows.patients import HealOptions, patient_of, sizes_of

DEVICES = (1, 2, 4, 8)


def tall(a: Path, b: Path, blocks: int) -> Recipe:
    """`a` up to half its depth, then `b` from a quarter to three quarters, then `a` to its end."""
    parts = [(a, 0, blocks // 2), (b, blocks // 4, 3 * blocks // 4), (a, 3 * blocks // 4, blocks)]
    return recipe_of(
        [Block(str(name), index) for name, start, stop in parts for index in range(start, stop)]
    )


@click.command()
@folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(folder: Path, as_json: bool) -> None:
    """Plan the memory of every scope, of each of 1, 2, 4 and 8 devices."""
    options = HealOptions(
        micro=1, checkpointing=True, offload=True, placement=Placement("bfloat16", "auto")
    )
    found: dict[str, dict[int, dict[str, int]]] = {}
    try:
        for name, llama in SHAPES.items():
            a, b = folder / name / "a", folder / name / "b"
            for donor in (a, b):
                make_donor(donor, llama, hollow=True)
            patient = patient_of(tall(a, b, llama.blocks), options, weights=False)
            sizes = {count: sizes_of(patient, options, count) for count in DEVICES}
            found[name] = {
                count: {
                    scope: memory_of(each, scope, checkpointing=True, offload=True).total
                    for scope in SCOPES
                }
                for count, each in sizes.items()
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("donors", "GPUs", *SCOPES, title="Memory of each GPU, GiB")
    for name, counts in found.items():
        for count, plan in counts.items():
            table.add_row(name, str(count), *(f"{plan[scope] / 2**30:.0f}" for scope in SCOPES))
    Console().print(table)


if __name__ == "__main__":
    main()
