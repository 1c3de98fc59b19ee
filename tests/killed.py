"""Merges that are killed after a number of system calls, and what is left of them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import written

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.journal import work_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

left = int(sys.argv[3])
def counted(real):
    def call(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **named)
    return call
for name in ("fsync", "copy_file_range", "pwrite", "rename", "truncate"):
    setattr(os, name, counted(getattr(os, name)))
recipe = load_recipe(Path(sys.argv[1]))
options = MergeOptions(shard_size=6000, resume=len(sys.argv) > 4)
merge(resolve(recipe, open_donors(recipe)), Path(sys.argv[2]), options)
print("left", left)
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed(tmp_path: Path, output: Path, after: int, *more: str) -> subprocess.CompletedProcess:
    """Merge in another process that is killed after so many calls of the system."""
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path / "recipe.yaml"),
        str(output),
        str(after),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def half_done(tmp_path: Path, output: Path) -> Path:
    """Kill a merge in the middle and return its work folder."""
    assert killed(tmp_path, output, 25).returncode == -signal.SIGKILL
    assert any((work_folder(output) / "checkpoint").glob("*.safetensors"))
    return work_folder(output)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The finished shards, each with what changes when it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


def refused(recipe: Recipe, output: Path, **options):
    with pytest.raises(FrankenmergeError) as caught:
        written(recipe, output, **{"shard_size": 6000} | options)
    return caught.value.faults
