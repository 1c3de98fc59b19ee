"""What every command would take for donors of 7, 13 and 70 billion parameters: `--dry-run`.

The donors are hollow: headers and configs of these shapes, whose files hold no data and take no
space. Times are operations over a device's rate, which no real run reaches.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from big_donor import Llama, make_donor
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.cli import cli
from frankenmerge.cli.console import size
from frankenmerge.cli.dry_run import duration

SHAPES = {
    "7B": Llama(4096, 11008, 32, 32, 32, 32000),
    "13B": Llama(5120, 13824, 40, 40, 40, 32000),
    "70B": Llama(8192, 28672, 64, 8, 80, 32000),
}
RATES = {"A100": 312e12, "H100": 989e12}
"""Dense bfloat16 peaks of the data sheets."""
folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the donors' headers; removed at the end.",
)
TEXT = Path(__file__).parents[1] / "frankenmerge/demo/text/code.txt"


def planned(folder: Path, llama: Llama, dtype: str) -> Iterator[dict[str, Any]]:
    """The plans of all commands for two donors of a shape, and a recipe of both."""
    a, b, recipe = folder / "a", folder / "b", folder / "recipe.yaml"
    for donor in (a, b):
        make_donor(donor, llama, hollow=True)
    # Three fifths of each, the middle fifth of both.
    third = llama.blocks * 2 // 5
    blocks = [Block(str(a), index) for index in range(llama.blocks - third)]
    blocks += [Block(str(b), index) for index in range(third, llama.blocks)]
    recipe.write_text(recipe_of(blocks).dump())
    for name, arguments in {
        "analyze": ["analyze", a, "-o", folder / "a.atlas.safetensors"],
        "align, with both analyses": ["align", a, b, "-o", folder / "ab.alignment.safetensors"],
        "evaluate, recipe and donors": ["evaluate", recipe, "--text", TEXT],
        "heal --scope norms": ["heal", recipe, folder / "healed", "--scope", "norms"],
        "heal --scope lora": ["heal", recipe, folder / "healed", "--scope", "lora"],
        "heal --scope seams": ["heal", recipe, folder / "healed", "--scope", "seams"],
    }.items():
        options = [*map(str, arguments), "--dtype", dtype, "--dry-run", "--json"]
        if name.startswith("heal"):
            options += ["--checkpointing", "--micro-batch", "1"]
        done = CliRunner().invoke(cli, options)
        if done.exit_code:
            raise click.ClickException(f"{name}: {done.stderr or done.exception}")
        yield {"command": name, "plan": json.loads(done.stdout)}


@click.command()
@folder_option
@click.option("--dtype", default="bfloat16", show_default=True, help="Type to compute in.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(folder: Path, dtype: str, as_json: bool) -> None:
    """Plan every command for every size."""
    try:
        found = {name: list(planned(folder / name, llama, dtype)) for name, llama in SHAPES.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("command", "donors", "operations", *RATES, "memory", "read from disk")
    for number in range(len(found["7B"])):
        for name, plans in found.items():
            plan = plans[number]["plan"]
            times = [duration(plan["operations"] / rate) for rate in RATES.values()]
            figures = size(plan["memory"]["total"]), size(plan["read"])
            command = plans[number]["command"] if name == "7B" else ""
            table.add_row(command, name, f"{plan['operations']:.2g}", *times, *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
