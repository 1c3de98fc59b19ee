"""Merge recipes with frankenmerge and with mergekit, which has an environment of its own."""

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from parity_cases import Case
from safetensors.torch import load_file
from torch import Tensor

MERGEKIT = "0.1.5"
environment_option = click.option(
    "--venv",
    "environment",
    type=click.Path(path_type=Path),
    default=Path(".mergekit"),
    show_default=True,
    help="Virtual environment with mergekit; created if it does not exist.",
)
NEEDS = (
    "accelerate",
    "click",
    "huggingface_hub",
    "immutables",
    "peft",
    "protobuf",
    "pydantic",
    "safetensors",
    "scipy",
    "sentencepiece",
)
NEEDS += ("tokenizers", "tqdm", "transformers", "typing-extensions")
PEER = """
import sys
from pathlib import Path
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

for recipe in sorted(Path(sys.argv[1]).glob("*.yaml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(config, str(recipe.with_suffix("")), options)
"""
Listed = list[tuple[Case, dict[str, str]]]
"""Cases, and the types to merge them in."""


def merged(listed: Listed, donors: Path, folder: Path, python: Path) -> list[tuple[dict, dict]]:
    """Merge every case in its types with both programs: (ours, mergekit's) for each."""
    recipes = recipes_in(folder, listed, donors)
    ours(recipes)
    return [
        (tensors_of(folder / f"{recipe.stem}-ours"), peer)
        for recipe, peer in zip(recipes, theirs(recipes, python), strict=True)
    ]


def recipes_in(folder: Path, listed: Listed, donors: Path) -> list[Path]:
    """Write the recipes, and return their files."""
    folder.mkdir()
    recipes = [folder / f"{number:03}.yaml" for number in range(len(listed))]
    for recipe, (case, types) in zip(recipes, listed, strict=True):
        recipe.write_text(yaml.safe_dump(case.recipe(donors, **types)))
    return recipes


def ours(recipes: list[Path]) -> None:
    """Merge every recipe with `frankenmerge merge`, each into a folder of its name and `-ours`."""
    for recipe in recipes:
        checked_run(
            [
                sys.executable,
                "-m",
                "frankenmerge",
                "merge",
                str(recipe),
                f"{recipe.with_suffix('')}-ours",
            ]
        )


def theirs(recipes: list[Path], python: Path) -> list[dict[str, Tensor]]:
    """Merge every recipe of a folder with mergekit."""
    checked_run([python, "-c", PEER, recipes[0].parent])
    return [tensors_of(recipe.with_suffix("")) for recipe in recipes]


def checked_run(command: list[Any]) -> None:
    """Run a program; exit with its error output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        called = " ".join(map(str, command))[:300]
        sys.exit(f"{called} exited with status {done.returncode}:\n{done.stderr}")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def peer_version(python: Path) -> str | None:
    """The version of mergekit that an interpreter has; None without mergekit."""
    program = "from importlib.metadata import version; print(version('mergekit'))"
    done = (
        subprocess.run([python, "-c", program], capture_output=True, text=True)
        if python.exists()
        else None
    )
    return done.stdout.strip() if done and not done.returncode else None


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`; mergekit is installed there if missing."""
    python = folder / "bin" / "python"
    if peer_version(python) is None:
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        for packages in (
            [f"torch=={torch_version}"],
            ["--no-deps", f"mergekit=={MERGEKIT}"],
            [f"torch=={torch_version}", *NEEDS],
        ):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
