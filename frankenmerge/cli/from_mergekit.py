"""Options that a command line written for mergekit may have: taken as meant, or answered."""

from collections.abc import Callable
from typing import Any

import click

from frankenmerge.cli.console import print_remarks

SAID: dict[str, str] = {
    "--allow-crimes/--no-allow-crimes": "donors that do not fit are refused; `inspect A B` says "
    "why, and `widen` and `transplant-tokenizer` help some",
    "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings": "rows are matched by their "
    "tokens with tokenizer_source, or made by `transplant-tokenizer`",
    "--trust-remote-code/--no-trust-remote-code": "no code of a donor is run",
    "--lazy-unpickle/--no-lazy-unpickle": "weights are read in pieces; donors that have only "
    "pickles are converted with --allow-pickle",
    "--low-cpu-memory/--no-low-cpu-memory": "weights are read and written in pieces",
    "--read-to-gpu/--no-read-to-gpu": "what a GPU computes is read to it piece by piece",
    "--multi-gpu/--no-multi-gpu": "start one process for each GPU: accelerate launch -m "
    "frankenmerge merge ...",
    "--async-write/--no-async-write": "reading, computing and writing overlap",
    "--clone-tensors/--no-clone-tensors": "a repeated block is written as often as it is used",
    "--copy-tokenizer/--no-copy-tokenizer": "the tokenizer is always written",
    "--write-model-card/--no-write-model-card": "the card is always written",
    "--safe-serialization/--no-safe-serialization": "weights are always written as safetensors",
    "--i-understand-this-is-not-useful-without-training": "--measure says what its gates do",
    "--load-in-4bit": "the base runs block by block, in its own type",
    "--load-in-8bit": "the base runs block by block, in its own type",
}
"""Flags without effect here, and what is done instead."""
SAID_OF_VALUES: dict[str, str] = {
    "--lora-merge-cache": "LoRAs are folded in while merging; nothing is stored",
    "--lora-merge-dtype": "LoRAs are folded in float32 and rounded once",
    "--transformers-cache": "set HF_HOME to store downloads elsewhere",
    "--write-threads": "as many threads are used as there are cores",
    "--num-threads": "as many threads are used as there are cores",
}
"""The same for options that have a value."""


def mergekit_options(command: Callable) -> Callable:
    """Add the options of mergekit's commands, hidden; `device` becomes `cuda` with `--cuda`."""
    for names, said in SAID.items():
        command = click.option(
            names,
            is_flag=True,
            default=None,
            hidden=True,
            expose_value=False,
            callback=_answer(said),
        )(command)
    for name, said in SAID_OF_VALUES.items():
        names = [name, "-j"] if name == "--num-threads" else [name]
        command = click.option(*names, hidden=True, expose_value=False, callback=_answer(said))(
            command
        )
    return click.option("--cuda/--no-cuda", "cuda", hidden=True)(
        click.option("--gpu-rich", "cuda", flag_value=True, hidden=True)(command)
    )


def _answer(said: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def answer(_context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            print_remarks([f"{parameter.opts[0]} has no effect: {said}"])

    return answer
