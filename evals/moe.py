"""Compare mixtures of experts with mergekit-moe's: tensors of tiny donors, time of large ones.

Parity: every kind of mixture that both write, in bfloat16, gates from prompts. Tensors of experts
and base must be equal bit by bit (mergekit 0.1.5 packs the experts of Mixtral; they are unpacked).
mergekit computes hidden gates in bfloat16, we in float32: reported are the smallest cosine between
gates' rows and the largest difference of an element.

Speed: a base and experts of random bf16 Llamas, hidden gates of a few prompts. Programs run
alternately in processes of their own, start-up included, until the bytes are on the disk.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import yaml
from bench_merge import blocks_for, timed, warm, write_donor
from mergekit_peer import checked_run, environment_option, peer_python, peer_version, tensors_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

TOKENIZER = Path(__file__).parents[1] / "frankenmerge" / "demo" / "donors" / "base"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS = {
    "mixtral": ("llama", None),
    "mixtral of mistral": ("mistral", None),
    "qwen3_moe": ("qwen3", None),
    "qwen2_moe": ("qwen2", ["What is this?"]),
    "qwen2_moe of llama": ("llama", ["What is this?"]),
    "deepseek": ("llama", []),
}
"""By what they become: the donors' family, and the shared expert's prompts, None without one."""
PROMPTS = (
    ["def read(path):", "import numpy as np", "for index in range(10):"],
    ["It was a dark and stormy night", "She had never seen him before"],
    ["The theorem follows from the lemma", "Let x be a real number"],
)


def tiny_donors(folder: Path, family: str) -> list[Path]:
    """Four random donors of a family in bfloat16, with the tokenizer of the demo."""
    from transformers import AutoConfig, AutoModelForCausalLM

    donors = []
    for seed in range(4):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SHAPE, head_dim=16)
        donor = folder / f"{family}{seed}"
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(donor)
        for file in TOKENIZER.glob("tokenizer*.json"):
            shutil.copy(file, donor)
        donors.append(donor)
    return donors


def mixture(donors: list[Path], mode: str, shared: list[str] | None) -> dict[str, Any]:
    """The YAML that both programs read."""
    base, *experts = map(str, donors)
    data: dict[str, Any] = {"base_model": base, "gate_mode": mode, "dtype": "bfloat16"}
    data["experts"] = [
        {"source_model": expert, "positive_prompts": prompts}
        for expert, prompts in zip(experts, PROMPTS, strict=False)
    ]
    data["experts"][0]["negative_prompts"] = PROMPTS[1][:1]
    if shared is not None:
        data["shared_experts"] = [{"source_model": base, "residual_scale": 0.5}]
        if shared:
            data["shared_experts"][0]["positive_prompts"] = shared
    return data


def unpacked(tensors: dict[str, Tensor], inner: str, maps: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of experts one by one; `inner` and the names `maps` are those of our checkpoint."""
    first, second, last = maps.split()
    for name, tensor in tensors.items():
        prefix, _, packed = name.partition(".mlp.experts.")
        start = f"{prefix}.{inner}.experts"
        if packed == "gate_up_proj":
            for number, both in enumerate(tensor):
                halves = both.chunk(2)
                yield f"{start}.{number}.{first}.weight", halves[0]
                yield f"{start}.{number}.{second}.weight", halves[1]
        elif packed == "down_proj":
            for number, one in enumerate(tensor):
                yield f"{start}.{number}.{last}.weight", one
        else:
            yield name.replace(".mlp.gate.", f".{inner}.gate."), tensor


def compared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """How far two mixtures are apart."""
    mixtral = any("block_sparse_moe" in name for name in ours)
    names = ("block_sparse_moe", "w1 w3 w2") if mixtral else ("mlp", "gate_proj up_proj down_proj")
    theirs = dict(unpacked(theirs, *names))
    # mergekit gives Qwen2-MoE zeros where donors have no biases; our config says there are none.
    absent = {name: theirs[name] for name in theirs.keys() - ours.keys()}
    added = sum(name.endswith("_proj.bias") and not tensor.any() for name, tensor in absent.items())
    gates = [name for name in ours if name.endswith("gate.weight")]
    other = [name for name in ours if name not in gates and name in theirs]
    cosines, largest = [], 0.0
    for name in gates:
        one, two = ours[name].float(), theirs[name].float()
        cosines.append(float(torch.cosine_similarity(one, two, dim=1).min()))
        largest = max(largest, float((one - two).abs().max()))
    return {
        "tensors": len(ours),
        "equal": sum(torch.equal(ours[name], theirs[name]) for name in other),
        "unequal": [name for name in other if not torch.equal(ours[name], theirs[name])],
        "only_ours": sorted(ours.keys() - theirs.keys()),
        "only_theirs": len(absent) - added,
        "zero_biases_of_mergekit": added,
        "gates": len(gates),
        "smallest_cosine": min(cosines),
        "largest_difference": largest,
    }


def parity(folder: Path, mergekit: Path) -> list[dict[str, Any]]:
    """Write every kind of mixture with both programs, and compare."""
    donors = {family: tiny_donors(folder, family) for family, _ in KINDS.values()}
    rows = []
    for number, (kind, (family, shared)) in enumerate(KINDS.items()):
        for mode in ("hidden", "cheap_embed"):
            config = folder / f"{number}-{mode}.yaml"
            config.write_text(yaml.safe_dump(mixture(donors[family], mode, shared)))
            ours, theirs = (config.with_suffix(f".{name}") for name in ("ours", "theirs"))
            checked_run([sys.executable, "-m", "frankenmerge", "moe", config, ours])
            checked_run([mergekit / "mergekit-moe", config, theirs, "--device", "cpu"])
            rows.append(
                {"kind": kind, "gate_mode": mode} | compared(tensors_of(ours), tensors_of(theirs))
            )
    return rows


def speed(folder: Path, mergekit: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Time both programs on a base and two experts, alternately, and `cp` of the result."""
    blocks, log = blocks_for(gigabytes), folder / "log"
    donors = [write_donor(folder / name, blocks, seed) for seed, name in enumerate("abc")]
    prompts = (["w5 w6 w7", "w8 w9 w10 w11"], ["w100 w200 w300", "w400 w500"])
    data: dict[str, Any] = {"base_model": str(donors[0]), "dtype": "bfloat16"}
    data["experts"] = [
        {"source_model": str(donor), "positive_prompts": each}
        for donor, each in zip(donors[1:], prompts, strict=True)
    ]
    figures: dict[str, Any] = {}
    for mode in ("hidden", "cheap_embed", "random"):
        config, out, kept = folder / "moe.yaml", folder / "out", folder / "kept"
        config.write_text(yaml.safe_dump(data | {"gate_mode": mode}))
        ours = [sys.executable, "-m", "frankenmerge", "moe", str(config), str(out)]
        commands = {
            "ours": [*ours, "--no-reflink"],
            "mergekit": [str(mergekit / "mergekit-moe"), str(config), str(out), "--device", "cpu"],
            "cp": ["cp", "-r", str(kept), str(out)],
        }
        timed([*ours, "--dry-run"], log)
        runs: dict[str, list] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                warm(*([kept] if name == "cp" else donors))
                runs[name].append(timed(command, log))
                if name == "ours":
                    shutil.rmtree(kept, ignore_errors=True)
                    out.rename(kept)
                else:
                    shutil.rmtree(out)
        written = sum(file.stat().st_size for file in kept.glob("*.safetensors"))
        shutil.rmtree(kept)

        def median(name: str, field: str, runs: dict[str, list] = runs) -> float:
            return statistics.median(getattr(run, field) for run in runs[name])

        figures[mode] = {
            "written_gb": written / 1e9,
            **{f"{name}_s": median(name, "seconds") for name in commands},
            **{f"{name}_mb": median(name, "rss_mb") for name in ("ours", "mergekit")},
            "times_faster": statistics.median(
                peer.seconds / own.seconds
                for peer, own in zip(runs["mergekit"], runs["ours"], strict=True)
            ),
            "share_of_memory": median("ours", "rss_mb") / median("mergekit", "rss_mb"),
        }
    return figures


@click.command()
@environment_option
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of each large donor.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of timing; 0 for none.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True),
    help="Folder for temporary donors and results.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    environment: Path, gigabytes: float, rounds: int, scratch: Path | None, as_json: bool
) -> None:
    """Compare `frankenmerge moe` with mergekit-moe."""
    python = peer_python(environment.absolute())
    with TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        rows = parity(folder, python.parent)
        timings = speed(folder, python.parent, gigabytes, rounds) if rounds else {}
    if as_json:
        versions = {"mergekit": peer_version(python), "torch": torch.__version__}
        click.echo(json.dumps({"parity": rows, "speed": timings, "versions": versions}, indent=2))
        return
    console = Console()
    shown = ("kind", "gate_mode", "tensors", "equal", "gates", "smallest_cosine")
    shown += ("largest_difference",)
    table = Table(*shown, title=f"Tensors compared with mergekit-moe {peer_version(python)}")
    for row in rows:
        values = (row[key] for key in shown)
        table.add_row(*(f"{each:.6f}" if isinstance(each, float) else str(each) for each in values))
        if row["unequal"] or row["only_ours"] or row["only_theirs"]:
            console.print(f"{row['kind']} {row['gate_mode']}: not the same tensors: {row}")
    console.print(table)
    if timings:
        title = f"A base and two experts of {gigabytes:g} GB, medians of {rounds} rounds"
        table = Table("figure", *timings, title=title)
        for figure in next(iter(timings.values())):
            table.add_row(figure, *(f"{found[figure]:.3g}" for found in timings.values()))
        console.print(table)


if __name__ == "__main__":
    main()
