"""Convert a GGUF file into a checkpoint: `python -m evals.real.convert FILE OUT`."""

from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from frankenmerge.models.quiet import quiet


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(file: Path, out: Path) -> None:
    """Write the weights of FILE in bfloat16, with config and tokenizer, to the folder OUT."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
