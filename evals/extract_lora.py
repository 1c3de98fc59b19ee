"""Extract LoRAs with frankenmerge and with mergekit: the same products, seconds, peak memory.

Parity: tiny float32 donors of several families, decomposed exactly by both. For every linear map
that both extract: the difference of the two products `B A` over the norm of the difference of the
donors, and both errors beside the optimum of Eckart and Young.

Cost: random bf16 Llamas, the model a low-rank change and noise away from its base in every matrix
of the blocks. Each program runs in its own process, start-up included, with warm caches, one after
the other in each round; the errors are computed here from the files, in float64.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_merge import blocks_for, timed, warm, write_donor
from mergekit_peer import checked_run, environment_option, peer_python, peer_version, tensors_of
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "phi3": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PREFIX = "base_model.model."


def command_of(program: str, model: Path, base: Path, output: Path, rank: int) -> list[str]:
    """The command line of a program; mergekit's is the path of its script."""
    if program == "ours":
        ours = [sys.executable, "-m", "frankenmerge", "extract-lora"]
        return [*ours, str(model), str(base), str(output), "--rank", str(rank)]
    named = ["--model", str(model), "--base-model", str(base), "--out-path", str(output)]
    return [program, *named, "--max-rank", str(rank), "--no-write-model-card"]


def write_family(folder: Path, family: str, seed: int) -> Path:
    """A tiny float32 donor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def changed_donor(folder: Path, base: Path) -> Path:
    """A bf16 donor: the base with a change of rank 16 and noise in every matrix of the blocks."""
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        made = {}
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                weight = handle.get_tensor(name)
                if "layers" in name and weight.dim() == 2:
                    rows, columns = weight.shape
                    left = torch.randn(rows, 16, generator=random) * 0.002
                    change = left @ torch.randn(16, columns, generator=random)
                    change += 0.001 * torch.randn(rows, columns, generator=random)
                    weight = (weight.float() + change).bfloat16()
                made[name] = weight
        save_file(made, folder / file.name, {"format": "pt"})
    return folder


def products(adapter: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The change of each linear map by its name, float64."""
    for name, tensor in adapter.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix(PREFIX).partition(".lora_A.")[0]
        rank = tensor.shape[0]
        alphas = config.get("alpha_pattern") or {}
        alpha = next((a for key, a in alphas.items() if module.endswith(key)), config["lora_alpha"])
        other = adapter[name.replace("lora_A", "lora_B")]
        yield module, alpha / rank * other.double() @ tensor.double()


def compared(
    model: Path, base: Path, outputs: dict[str, Path], rank: int, *, at_most: int | None = None
) -> dict[str, float]:
    """Errors of both programs and the difference of their products; medians and largest values."""
    found = {
        program: dict(
            products(tensors_of(path), json.loads((path / "adapter_config.json").read_text()))
        )
        for program, path in outputs.items()
    }
    one, two = (tensors_of(path) for path in (model, base))
    names = sorted(set(found["ours"]) & set(found["mergekit"]))[:at_most]
    rows = []
    for name in names:
        change = one[f"{name}.weight"].double() - two[f"{name}.weight"].double()
        norm = change.norm()
        errors = {
            program: float((change - mine[name]).norm() / norm) for program, mine in found.items()
        }
        sizes = torch.linalg.svdvals(change.float()).double()
        optimum = float(sizes[rank:].norm() / norm)
        apart = float((found["ours"][name] - found["mergekit"][name]).norm() / norm)
        rows.append((apart, errors["ours"], errors["mergekit"], optimum))
    columns = np.array(rows).T
    return {
        "maps": len(rows),
        "products_apart": float(columns[0].max()),
        "ours_error": float(np.median(columns[1])),
        "mergekit_error": float(np.median(columns[2])),
        "optimum": float(np.median(columns[3])),
    }


def parity(folder: Path, script: Path) -> dict[str, dict[str, float]]:
    """Both programs on tiny donors of every family, at rank 4."""
    rows = {}
    for family in FAMILIES:
        model, base = (write_family(folder / f"{family}{seed}", family, seed) for seed in (1, 2))
        outputs = {name: folder / f"{family}-{name}" for name in ("ours", "mergekit")}
        for name, output in outputs.items():
            program = "ours" if name == "ours" else str(script)
            checked_run(command_of(program, model, base, output, 4))
        rows[family] = compared(model, base, outputs, 4)
    return rows


def cost(
    folder: Path, script: Path, gigabytes: float, rank: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and peak memory of both, and their errors in the first maps."""
    base = write_donor(folder / "base", blocks_for(gigabytes), 0)
    model = changed_donor(folder / "model", base)
    runs: dict[str, list] = {"ours": [], "mergekit": []}
    outputs = {name: folder / f"out-{name}" for name in runs}
    for number in range(rounds):
        for name, output in outputs.items():
            place = output if number == rounds - 1 else folder / f"{name}-{number}"
            program = "ours" if name == "ours" else str(script)
            warm(base, model)
            command = command_of(program, model, base, place, rank)
            runs[name].append(timed(command, folder / "log"))
    figures = {
        f"{name}_{field}": statistics.median(getattr(run, field) for run in runs[name])
        for name in runs
        for field in ("seconds", "rss_mb")
    }
    pairs = list(zip(runs["mergekit"], runs["ours"], strict=True))
    figures["faster"] = statistics.median(one.seconds / two.seconds for one, two in pairs)
    figures["memory_ratio"] = statistics.median(two.rss_mb / one.rss_mb for one, two in pairs)
    return figures, compared(model, base, outputs, rank, at_most=3)


@click.command()
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of each donor; 0 for none.")
@click.option("--rank", default=32, show_default=True, help="Rank of the LoRAs of large donors.")
@click.option("--rounds", default=1, show_default=True, help="How often everything is timed.")
@environment_option
@click.option(
    "--scratch", type=click.Path(path_type=Path, exists=True), help="For temporary files."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    gigabytes: float,
    rank: int,
    rounds: int,
    environment: Path,
    scratch: Path | None,
    as_json: bool,
) -> None:
    """Extract LoRAs with both programs."""
    python = peer_python(environment.absolute())
    script = python.with_name("mergekit-extract-lora")
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        found: dict[str, Any] = {"parity": parity(folder, script)}
        if gigabytes:
            found["cost"], found["errors"] = cost(folder, script, gigabytes, rank, rounds)
    found["mergekit"] = peer_version(python)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = Console()
    for title, rows in found.items():
        if not isinstance(rows, dict):
            continue
        rows = rows if title == "parity" else {title: rows}
        table = Table("figure", *rows, title=title)
        for figure in next(iter(rows.values())):
            table.add_row(figure, *(f"{row[figure]:.3g}" for row in rows.values()))
        console.print(table)


if __name__ == "__main__":
    main()
