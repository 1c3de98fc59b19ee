"""Steps of a run: commands that are skipped where their outputs are there and nothing changed.

A step's record, `NAME.json`, has the hash of its command and of its inputs, its time and its peak
of memory. Its standard output is `NAME.out`, its standard error `NAME.err`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from frankenmerge.storage.hashing import file_hash

UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of `ru_maxrss`."""
SHOWN = 12
"""Last lines of a step's standard error that a failure shows."""


@dataclass(frozen=True)
class Step:
    """A command, what it reads and what it writes."""

    name: str
    """Also of its files; not two steps have the same."""
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    """Files and folders that other steps, or nobody, wrote."""
    outputs: tuple[Path, ...] = ()
    floor: str | None = None
    """The step that does the least that this one has to do, if there is one."""


@dataclass(frozen=True)
class Record:
    """What a step was and what it took."""

    key: str
    """The hash of command and inputs."""
    seconds: float
    cpu_seconds: float
    """Of the process and of those that it waited for."""
    peak_bytes: int
    """Largest resident memory of the process."""


def run(steps: Sequence[Step], folder: Path) -> dict[str, Record]:
    """Run the steps in this order, or skip them; returns their records by name.

    Raises:
        click.ClickException: for a step that fails; those before it keep their records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {step.name: _done(step, folder) or _made(step, folder) for step in steps}


def output_of(step: str, folder: Path) -> str:
    """What a step printed."""
    return (folder / f"{step}.out").read_text("utf-8")


def _done(step: Step, folder: Path) -> Record | None:
    """The record of a step that need not run again."""
    try:
        record = Record(**json.loads((folder / f"{step.name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    there = all(path.exists() for path in step.outputs)
    return record if there and record.key == _key(step) else None


def _made(step: Step, folder: Path) -> Record:
    """Run a step, and write its record last."""
    key = _key(step)
    path = folder / f"{step.name}.json"
    path.unlink(missing_ok=True)
    for output in step.outputs:  # what an interrupted run may have left
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
    click.echo(f"{step.name} ...", err=True)
    started, errors = time.perf_counter(), folder / f"{step.name}.err"
    with (
        (folder / f"{step.name}.out").open("wb") as out,
        errors.open("wb") as err,
        TemporaryDirectory() as empty,
    ):
        # What earlier runs left in the user's cache would hide what a step takes.
        environment = os.environ | {"XDG_CACHE_HOME": empty}
        process = subprocess.Popen(step.command, stdout=out, stderr=err, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        last = "\n".join(errors.read_text("utf-8", "replace").splitlines()[-SHOWN:])
        raise click.ClickException(
            f"step {step.name}: status {process.returncode} of\n{' '.join(step.command)}\n{last}"
        )
    if missing := [str(output) for output in step.outputs if not output.exists()]:
        raise click.ClickException(f"step {step.name} did not write {', '.join(missing)}")
    cpu = usage.ru_utime + usage.ru_stime
    record = Record(key, seconds, cpu, usage.ru_maxrss * UNIT)
    path.write_text(json.dumps(asdict(record)), "utf-8")
    click.echo(f"{step.name}: {seconds:.0f} s, {record.peak_bytes / 1e9:.1f} GB", err=True)
    return record


def _key(step: Step) -> str:
    described = [list(step.command), {str(path): _hash(path) for path in step.inputs}]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _hash(path: Path) -> Mapping[str, str]:
    """The hashes of a file, or of the files in a folder; none of what does not exist."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return {
        str(each.relative_to(path)): _file_hash(each, each.stat().st_size, each.stat().st_mtime_ns)
        for each in files
        if each.exists()
    }


@cache
def _file_hash(path: Path, _size: int, _changed: int) -> str:
    """The hash of a file that is read once for all steps."""
    return file_hash(path)
