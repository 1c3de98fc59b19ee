"""Merge tensors without a model by every method, with `merge --raw` and with mergekit-pytorch.

The tensors are those of `parity_cases` under names of no language model, one file for each donor,
in float32. The figures are those of `parity`: the largest difference over the tensor's largest
magnitude, and the share of elements that differ when rounded to bfloat16; of random methods mean,
variance and density of the changes.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import yaml
from mergekit_peer import checked_run, environment_option, peer_python, peer_version, tensors_of
from parity import compare
from parity_cases import Case, cases, made_donors
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file


def write_files(folder: Path) -> dict[str, dict[str, Any]]:
    """One file for each donor; returns their tensors."""
    donors = {
        donor: {
            name.replace("model.layers.", "down_blocks.").replace("self_attn", "attn1"): tensor
            for name, tensor in tensors.items()
        }
        for donor, tensors in made_donors().items()
    }
    for donor, tensors in donors.items():
        save_file(tensors, folder / f"{donor}.safetensors")
    return donors


def recipe_of(case: Case, folder: Path) -> dict[str, Any]:
    """A case's recipe, its models files."""
    recipe = case.recipe(folder, dtype="float32")
    for model in recipe["models"]:
        model["model"] += ".safetensors"
    if "base_model" in recipe:
        recipe["base_model"] += ".safetensors"
    return recipe


@click.command()
@environment_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(environment: Path, as_json: bool) -> None:
    """Merge raw tensors with both programs, and print how far results differ."""
    python = peer_python(environment.absolute())
    script = python.with_name("mergekit-pytorch")
    rows = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        donors = write_files(folder)
        for number, case in enumerate(cases()):
            path, ours, theirs = (folder / f"{number}{end}" for end in (".yaml", "-ours", "-peer"))
            path.write_text(yaml.safe_dump(recipe_of(case, folder)))
            checked_run([sys.executable, "-m", "frankenmerge", "merge", "--raw", path, ours])
            checked_run([script, path, theirs])
            found, peer = tensors_of(ours), tensors_of(theirs)
            assert found.keys() == peer.keys() == donors["base"].keys()
            rows[case.title] = compare(case, found, peer, donors["base"])
    if as_json:
        click.echo(json.dumps({"rows": rows, "mergekit": peer_version(python)}))
        return
    table = Table("recipe", "figures", title=f"mergekit-pytorch {peer_version(python)}")
    for title, row in rows.items():
        table.add_row(title, json.dumps(row))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
