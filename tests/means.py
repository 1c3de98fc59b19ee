"""Splices of two donors whose tensors are weighted means, and what is written of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from conftest import resolved
from safetensors.torch import load_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.splicing.operations import Combine, Copy, Input
from frankenmerge.splicing.resolve import Splice

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAME = "model.layers.2.mlp.up_proj.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def combined(
    copies: Sequence[Copy],
    second: Checkpoint,
    *,
    dtype: str | None = None,
    weights=(0.25, 0.75),
    every: int = 1,
) -> list:
    """Make every so many copies weighted means with the same tensors of another donor."""
    made = []
    for number, copy in enumerate(copies):
        if number % every:
            made.append(copy)
            continue
        inputs = (
            Input(copy.donor, copy.source, copy.tensor, {"weight": weights[0]}),
            Input(second.name, copy.source, second.tensors[copy.source], {"weight": weights[1]}),
        )
        made.append(
            Combine(
                copy.name,
                dtype or copy.dtype,
                copy.shape,
                "linear",
                inputs,
                None,
                {"normalize": True},
                0,
            )
        )
    return made


def linear_splice(first: Path, second: Path, **how) -> Splice:
    """The splice of a whole donor, combined tensor by tensor with another one."""
    splice = resolved(recipe_of([Block(str(first), index) for index in range(4)]))
    operations = combined(splice.operations, open_checkpoint(str(second)), **how)
    return replace(splice, operations=tuple(operations))
