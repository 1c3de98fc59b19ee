"""How long a merge takes beside `cp` of the same bytes and beside mergekit, measured in turns in one run.

Random bf16 Llamas are made in a scratch folder. Every program runs in a process of its own, its
start included; a run ends when the bytes are on the disk (`sync`). What it reads is read once
before, untimed, so that every run finds it in memory. Times and memory are medians over the rounds,
ratios medians of the rounds' own ratios, so that a load that comes and goes falls on all sides.
Reflinks are off unless asked for: a clone is no copy.

The floor is the time in which `cp`, at its own rate, moves as many bytes as the merge must: every
donor's tensor read once, every byte of the result written once. `cp` reads as much as it writes, so
a mean of two donors has a floor of one and a half `cp`.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import yaml
from parity import peer_python
from rich.console import Console
from rich.table import Table

import frankenmerge
from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.merging.shards import readings
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import schedule

WIDTH, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 32_000
BLOCK_PARAMETERS = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
TASK = {"parameters": {"weight": 0.7, "density": 0.5}}
BEST_FLAGS = ("--async-write", "--write-threads", "2", "--out-shard-size", "250M", "-j", "2")
"""mergekit's fastest on two cores; its sizes are parameters, so that a shard takes 500 MB."""


LAUNCH = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT)
_, status, usage = os.wait4(child.pid, 0)
os.sync()
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)]))
"""
"""Runs a program from a small process: Linux counts what the parent holds when it forks towards the
child's largest memory.
"""


class Run(NamedTuple):
    """One run of one program."""

    seconds: float
    rss_mb: float


def moved_bytes(path: Path) -> tuple[int, int]:
    """How many bytes the merge of a recipe must read, and how many write."""
    recipe = load_recipes(path)[-1]
    operations = schedule(recipe, open_donors(recipe))
    read = sum(reading.tensor.bytes for operation in operations for reading in readings(operation))
    return read, sum(operation.bytes for operation in operations)


def warm(*folders: Path) -> None:
    """Read every file, so that the system has it in memory."""
    for file in (
        file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()
    ):
        with file.open("rb", buffering=0) as handle:
            while handle.read(8 << 20):
                pass


def blocks_for(gigabytes: float) -> int:
    """How many blocks a donor of that size has."""
    return max(4, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / BLOCK_PARAMETERS))


def write_donor(folder: Path, blocks: int, seed: int) -> Path:
    """Write a random Llama in bf16, in files of about a gigabyte, as transformers lays them out."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
    }
    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, "w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0"
    ).save_pretrained(folder)
    shapes = {
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
    names = sorted(f"{name}.weight" for name in shapes)
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
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in group:
            shape = shapes[name.removesuffix(".weight")]
            stop = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in group:
                values = rng.standard_normal(
                    shapes[name.removesuffix(".weight")], np.float32
                ) * np.float32(0.02)
                handle.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def recipes(a: str, b: str, c: str, blocks: int) -> dict[str, dict[str, Any]]:
    """A recipe for every method, in terms that both programs read. The result of the passthrough is half as large again."""
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
    """Run a program and wait until the disk has what it wrote; memory is the largest that was resident."""
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
        raise click.ClickException(
            f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-2000:]}"
        )
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
    """Time all programs on one recipe, in turns; the last result of ours is what `cp` copies."""
    path, out, log = scratch / f"{method}.yaml", scratch / "out", scratch / "log"
    path.write_text(yaml.safe_dump(recipe))
    kept = scratch / "kept"
    commands = {
        "ours": [
            sys.executable,
            "-m",
            "frankenmerge",
            "merge",
            str(path),
            str(out),
            *(() if reflink else ("--no-reflink",)),
        ]
    }
    if mergekit:
        yaml_command = [str(mergekit / "mergekit-yaml"), str(path), str(out)]
        commands |= {"mergekit_default": yaml_command, "mergekit": [*yaml_command, *BEST_FLAGS]}
    commands |= {"cp": ["cp", "-r", str(kept), str(out)]}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    timed([*commands["ours"], "--dry-run"], log)
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

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[name])

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(
            one.seconds / other.seconds for one, other in zip(runs[slow], runs[fast], strict=True)
        )

    read, written = moved_bytes(path)
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
    if mergekit:
        figures |= {
            "mergekit_s": median("mergekit", "seconds"),
            "mergekit_default_s": median("mergekit_default", "seconds"),
            "mergekit_over_ours": ratio("mergekit", "ours"),
            "mergekit_rss_mb": median("mergekit", "rss_mb"),
        }
    return figures


METHODS = list(recipes("a", "b", "c", 4))


@click.command()
@click.option("--gigabytes", default=3.0, show_default=True, help="Size of each donor.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="What to measure; may be repeated; all by default.",
)
@click.option("--rounds", default=3, show_default=True, help="How often everything is timed.")
@click.option(
    "--venv",
    "environment",
    type=click.Path(path_type=Path),
    default=Path(".mergekit"),
    show_default=True,
    help="An environment with mergekit; made where there is none.",
)
@click.option(
    "--mergekit/--no-mergekit",
    "with_mergekit",
    default=True,
    show_default=True,
    help="Whether mergekit is timed too.",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True),
    help="Where donors and results go for the time being.",
)
@click.option(
    "--reflink",
    is_flag=True,
    help="Let ours share blocks with the donors where the file system can.",
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
    made = f"{gigabytes} GB a donor, {rounds} rounds, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    table = Table("figure", *figures, title=f"frankenmerge {frankenmerge.__version__}: {made}")
    for figure in next(iter(figures.values())):
        table.add_row(figure, *(f"{found[figure]:.3g}" for found in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
