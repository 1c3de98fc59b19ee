"""Analyze a random Llama that is larger than memory, under a limit; report time and peak memory.

The limit is on the address space (`ulimit -v`), so that mapped memory counts too. Weights are
random: time and memory do not depend on them.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.table import Table


class Llama(NamedTuple):
    """The shape of a made-up Llama."""

    width: int = 2048
    inner: int = 5632
    heads: int = 16
    kv_heads: int = 4
    blocks: int = 1
    vocabulary: int = 1024

    @property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a block."""
        keys = self.width * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.inner, self.width),
            "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
            "input_layernorm": (self.width,),
            "post_attention_layernorm": (self.width,),
        }

    @property
    def block(self) -> int:
        """Parameters of a block, of two bytes each."""
        return sum(math.prod(shape) for shape in self.block_shapes.values())


def make_donor(folder: Path, llama: Llama, *, hollow: bool = False) -> int:
    """Write a random bfloat16 Llama, one shard per block; return its size in bytes.

    Of a `hollow` one only the headers are written: its shards have their size, and no data (sparse
    files, which take no space).
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    # bfloat16 is the upper half of float32. All tensors share the same numbers: only sizes matter.
    count = 0 if hollow else max(llama.inner, llama.vocabulary) * llama.width
    stock = (generator.standard_normal(count, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    stock = stock.astype(np.uint16)
    shards = [
        {f"model.layers.{index}.{name}.weight": shape for name, shape in llama.block_shapes.items()}
        for index in range(llama.blocks)
    ]
    table = (llama.vocabulary, llama.width)
    shards.append(
        dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), table)
        | {"model.norm.weight": (llama.width,)}
    )
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for tensor, shape in tensors.items():
            size = 2 * math.prod(shape)
            header[tensor] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [position, position + size],
            }
            position += size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if hollow:
                file.truncate(8 + len(text) + position)
            else:
                for shape in tensors.values():
                    file.write(stock[: math.prod(shape)].tobytes())
        weight_map |= dict.fromkeys(tensors, name)
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_small_files(folder, llama)
    return total


def _write_small_files(folder: Path, llama: Llama) -> None:
    """Write config and tokenizer; the tokenizer is that of a demo donor."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": llama.width,
        "intermediate_size": llama.inner,
        "num_hidden_layers": llama.blocks,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "vocab_size": llama.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Path(__file__).parents[1] / "frankenmerge/demo/donors/base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the donor; removed at the end.",
)
@click.option("--gigabytes", default=8.0, show_default=True, help="Size of the donor.")
@click.option("--vocabulary", default=1024, show_default=True, help="Vocabulary size of the donor.")
@click.option(
    "--limit",
    default=3.0,
    show_default=True,
    help="Limit on the address space of the analysis, in gigabytes.",
)
@click.option("--dtype", default="float32", show_default=True, help="Type to compute in.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    folder: Path, gigabytes: float, vocabulary: int, limit: float, dtype: str, as_json: bool
) -> None:
    """Analyze a random donor in less memory than its size."""
    blocks = max(1, round(gigabytes * 1e9 / (2 * Llama().block)))
    llama = Llama(blocks=blocks, vocabulary=vocabulary)
    try:
        size = make_donor(folder / "donor", llama)
        command = [
            sys.executable,
            "-m",
            "frankenmerge",
            "analyze",
            str(folder / "donor"),
            "-o",
            str(folder / "donor.atlas.safetensors"),
        ]
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        allowed, started = int(limit * 1e9), time.perf_counter()
        done = subprocess.run(
            [*command, "--dtype", dtype, "--json"],
            capture_output=True,
            text=True,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed)),
        )
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise click.ClickException(done.stderr)
    result = {
        "donor_gb": size / 1e9,
        "blocks": blocks,
        "vocabulary": vocabulary,
        "limit_gb": limit,
        "dtype": dtype,
        "seconds": seconds,
        "peak_rss_gb": peak / 1e9,
        "block_gb": llama.block * (4 if dtype == "float32" else 2) / 1e9,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(
        "figure", "value", title="Analysis, block by block, of a donor larger than memory"
    )
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
