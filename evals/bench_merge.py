"""Time merges, compared with `cp` of the same bytes and with mergekit, alternately in one run.

Random bf16 Llamas are written to a scratch folder. Every program runs in its own process, start-up
included; a run ends when the bytes are on the disk (`sync`). Its inputs are read once before,
untimed, so that they are in memory for every run. Times and memory are medians over the rounds,
ratios are medians of the ratios in each round, so that other load affects all programs alike.
Reflinks are off by default: a clone is not a copy.

The floor is the time that `cp`, at its own rate, needs to move as many bytes as the merge must:
every donor's tensor read once, every byte of the result written once. `cp` reads as much as it
writes, so a mean of two donors has a floor of one and a half `cp`.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import yaml
from mergekit_peer import environment_option, peer_python
from rich.console import Console
from rich.table import Table

import frankenmerge
from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import readings
from frankenmerge.splicing.resolve import resolve

WIDTH, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 32_000
BLOCK_PARAMETERS = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
TASK = {"parameters": {"weight": 0.7, "density": 0.5}}
BEST_FLAGS = ("--async-write", "--write-threads", "2", "--out-shard-size", "250M", "-j", "2")
"""mergekit's fastest on two cores; its sizes are in parameters: a shard takes 500 MB."""

LAUNCH = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT)
_, status, usage = os.wait4(child.pid, 0)
os.sync()
code = os.waitstatus_to_exitcode(status)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss / 1024, code]))
"""
"""Runs a program from a small process: Linux counts the parent's memory at the fork as part of the
child's peak.
"""


class Run(NamedTuple):
    """One run of one program."""

    seconds: float
    rss_mb: float


def moved_bytes(path: Path) -> tuple[int, int]:
    """The number of bytes that the merge of a recipe must read, and write."""
    recipe = load_recipes(path)[-1]
    operations = resolve(recipe, open_donors(recipe)).operations
    read = sum(reading.tensor.bytes for operation in operations for reading in readings(operation))
    return read, sum(operation.bytes for operation in operations)


def warm(*folders: Path) -> None:
    """Read every file, so that it is in the page cache."""
    for file in (
        file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()
    ):
        with file.open("rb", buffering=0) as handle:
            while handle.read(8 << 20):
                pass


def blocks_for(gigabytes: float) -> int:
    """The number of blocks of a donor of this size."""
    return max(4, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / BLOCK_PARAMETERS))


def write_donor(folder: Path, blocks: int, seed: int) -> Path:
    """Write a random Llama in bf16, in files of about a gigabyte, as transformers lays them out."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, "w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0"
    ).save_pretrained(folder)
    shapes = _shapes(blocks)
    names = sorted(shapes)
    per_file = max(
        1, len(names) * 10**9 // (2 * sum(int(np.prod(shape)) for shape in shapes.values()))
    )
    groups = [names[start : start + per_file] for start in range(0, len(names), per_file)]
    files = [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number in range(1, len(groups) + 1)
    ]
    rng = np.random.default_rng(seed)
    for file, group in zip(files, groups, strict=True):
        _write_random(folder / file, {name: shapes[name] for name in group}, rng)
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama's tensors, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, WIDTH),
        "lm_head": (VOCABULARY, WIDTH),
        "model.norm": (WIDTH,),
    }
    for block in range(blocks):
        shapes |= {f"model.layers.{block}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {
            f"model.layers.{block}.mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")
        }
        shapes[f"model.layers.{block}.mlp.down_proj"] = (WIDTH, INNER)
        shapes |= {
            f"model.layers.{block}.{name}_layernorm": (WIDTH,)
            for name in ("input", "post_attention")
        }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _write_random(
    file: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> None:
    """Write a safetensors file of random bf16 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        stop = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            handle.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def recipes(a: str, b: str, c: str, blocks: int) -> dict[str, dict[str, Any]]:
    """A recipe for every method that both programs can read, by method.

    The result of the passthrough is half as large again as a donor.
    """
    quarter = blocks // 4
    pair = [
        {"model": a, "parameters": {"weight": 0.6}},
        {"model": b, "parameters": {"weight": 0.4}},
    ]
    two = [{"model": a}, {"model": b}]
    task = {"models": [{"model": b, **TASK}], "base_model": a}
    made = {
        "passthrough": {
            "slices": [
                {"sources": [{"model": a, "layer_range": [0, blocks - quarter]}]},
                {"sources": [{"model": b, "layer_range": [quarter, blocks]}]},
            ]
        },
        "linear": {"models": pair},
        "slerp": {"models": two, "base_model": a, "parameters": {"t": 0.4}},
        "task_arithmetic": task,
        "model_stock": {"models": [{"model": b}, {"model": c}], "base_model": a},
        "karcher": {"models": two},
        "ties": task,
        "dare_ties": task,
    }
    return {
        method: recipe | {"merge_method": method, "dtype": "bfloat16"}
        for method, recipe in made.items()
    }


def timed(command: Sequence[str], log: Path) -> Run:
    """Run a program, and wait until its output is on the disk; memory is the peak resident set."""
    os.sync()
    # Installed programs are compiled; ours may run from a checkout.
    compiled = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(log), *command],
        capture_output=True,
        text=True,
        check=True,
        env=compiled,
    )
    seconds, rss_mb, code = json.loads(done.stdout)
    if code:
        output = log.read_text(errors="replace")[-2000:]
        raise click.ClickException(f"{' '.join(command)} exited with status {code}:\n{output}")
    return Run(seconds, rss_mb)


def measured(
    method: str,
    recipe: dict[str, Any],
    donors: list[Path],
    scratch: Path,
    rounds: int,
    mergekit: Path | None,
    reflink: bool,
) -> dict[str, float]:
    """Time all programs on one recipe, alternately."""
    path, out, log = scratch / f"{method}.yaml", scratch / "out", scratch / "log"
    path.write_text(yaml.safe_dump(recipe))
    ours = [
        sys.executable,
        "-m",
        "frankenmerge",
        "merge",
        str(path),
        str(out),
        *(() if reflink else ("--no-reflink",)),
    ]
    commands = {"ours": ours}
    if mergekit:
        yaml_command = [str(mergekit / "mergekit-yaml"), str(path), str(out)]
        commands |= {"mergekit_default": yaml_command, "mergekit": [*yaml_command, *BEST_FLAGS]}
    timed([*ours, "--dry-run"], log)
    return _figures(_timed_alternately(commands, donors, out, log, rounds), *moved_bytes(path))


def _timed_alternately(
    commands: Mapping[str, Sequence[str]], donors: Sequence[Path], out: Path, log: Path, rounds: int
) -> dict[str, list[Run]]:
    """Run every program once a round; after them `cp`, which copies our last result."""
    kept = out.with_name("kept")
    commands = {**commands, "cp": ["cp", "-r", str(kept), str(out)]}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            warm(*([kept] if name == "cp" else donors))
            runs[name].append(timed(command, log))
            if name == "ours":
                shutil.rmtree(kept, ignore_errors=True)
                out.rename(kept)
            else:
                shutil.rmtree(out)
    shutil.rmtree(kept)
    return runs


def _figures(runs: Mapping[str, Sequence[Run]], read: int, written: int) -> dict[str, float]:
    """Medians over the rounds, for a merge that reads and writes so many bytes."""

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[name])

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(
            one.seconds / other.seconds for one, other in zip(runs[slow], runs[fast], strict=True)
        )

    floor = (read + written) / (2 * written)
    figures = {
        "ours_s": median("ours", "seconds"),
        "cp_s": median("cp", "seconds"),
        "ours_over_cp": ratio("ours", "cp"),
        "ours_rss_mb": median("ours", "rss_mb"),
        "read_gb": read / 1e9,
        "written_gb": written / 1e9,
        "cp_gb_per_s": 2 * written / 1e9 / median("cp", "seconds"),
        "floor_s": floor * median("cp", "seconds"),
        "ours_over_floor": ratio("ours", "cp") / floor,
    }
    if "mergekit" in runs:
        figures |= {
            "mergekit_s": median("mergekit", "seconds"),
            "mergekit_default_s": median("mergekit_default", "seconds"),
            "mergekit_over_ours": ratio("mergekit", "ours"),
            "mergekit_rss_mb": median("mergekit", "rss_mb"),
        }
    return figures


METHODS = list(recipes("a", "b", "c", 4))


@click.command()
@click.option(
    "--gigabytes", default=3.0, show_default=True, help="Size of each donor, in gigabytes."
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="Merge method to time; may be repeated. [default: all]",
)
@click.option(
    "--rounds", default=3, show_default=True, help="Number of times that everything is timed."
)
@environment_option
@click.option(
    "--mergekit/--no-mergekit",
    "with_mergekit",
    default=True,
    show_default=True,
    help="Whether to time mergekit as well.",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True),
    help="Folder for temporary donors and results.",
)
@click.option(
    "--reflink",
    is_flag=True,
    help="Let our merge share disk blocks with the donors if the file system supports it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    gigabytes: float,
    methods: tuple[str, ...],
    rounds: int,
    environment: Path,
    with_mergekit: bool,
    scratch: Path | None,
    reflink: bool,
    as_json: bool,
) -> None:
    """Time merges of random donors."""
    chosen = methods or METHODS
    mergekit = peer_python(environment.absolute()).parent if with_mergekit else None
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder, blocks = Path(name), blocks_for(gigabytes)
        donors = [
            write_donor(folder / letter, blocks, seed)
            for seed, letter in enumerate("abc" if "model_stock" in chosen else "ab")
        ]
        a, b, *c = map(str, donors)
        for method in chosen:
            recipe = recipes(a, b, c[0] if c else b, blocks)[method]
            figures[method] = measured(method, recipe, donors, folder, rounds, mergekit, reflink)
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    system = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
    setting = f"donors of {gigabytes} GB, {rounds} rounds, {system}"
    table = Table("figure", *figures, title=f"frankenmerge {frankenmerge.__version__}: {setting}")
    for figure in next(iter(figures.values())):
        table.add_row(figure, *(f"{found[figure]:.3g}" for found in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
