"""Donors whose tensors say whose they are; merges of their blocks, and what these contain."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_memory, written
from safetensors.numpy import load_file, save_file

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.errors import FrankenmergeError

EMBEDDINGS = {
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "gpt_neox.embed_in.weight",
}
IDS = torch.tensor([[0, 7, 30, 7, 12, 41, 3, 3], [5, 5, 2, 47, 19, 1, 8, 0]])


def arrays_of(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, as the safetensors library reads them."""
    return {
        name: array
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def recipe_for(order, **fields) -> Recipe:
    """The recipe of blocks given as (folder, index)."""
    return recipe_of([Block(str(folder), index) for folder, index in order], **fields)


def merged(order, output, *, fields=(), **options):
    return written(recipe_for(order, **dict(fields)), output, **options)


def block_of(name: str) -> tuple[int | None, str]:
    """A tensor's block, and its name with the block left open."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (
        (int(found[0]), name[: found.start()] + "{}" + name[found.end() :])
        if found
        else (None, name)
    )


def expected(order, head: str | None) -> dict[str, np.ndarray]:
    """The tensors of the model of `order`; `head` names the last donor's tensor for its head."""
    donors = {folder: arrays_of(folder) for folder, _ in order}
    first, last = donors[order[0][0]], donors[order[-1][0]]
    result = {name: array for name, array in first.items() if name in EMBEDDINGS}
    for position, (folder, index) in enumerate(order):
        for name, array in donors[folder].items():
            if block_of(name)[0] == index:
                result[block_of(name)[1].format(position)] = array
    heads = ("lm_head.weight", "embed_out.weight")
    result |= {
        name: array
        for name, array in last.items()
        if block_of(name)[0] is None and name not in EMBEDDINGS and name not in heads
    }
    return result | (
        {"embed_out.weight" if head == "embed_out.weight" else "lm_head.weight": last[head]}
        if head
        else {}
    )


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert [
        name
        for name in wanted
        if found[name].dtype != wanted[name].dtype or not np.array_equal(found[name], wanted[name])
    ] == []


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by path; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def load(folder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert {kind: names for kind, names in info.items() if names} == {}
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def virtual(order) -> torch.nn.Module:
    return in_memory(recipe_for(order))


def encoded(source: Path, folder: Path, number: int, shards: int = 1) -> Path:
    """Copy a donor, every tensor filled with a number of its own.

    It is 10,000 times `number`, plus 100 times its block (90: none), plus the tensor's kind.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    arrays = arrays_of(source)
    kinds = sorted({block_of(name)[1] for name in arrays})
    filled = {}
    for name, array in arrays.items():
        block, kind = block_of(name)
        filled[name] = np.full_like(
            array, number * 10_000 + (90 if block is None else block) * 100 + kinds.index(kind)
        )
    names = sorted(filled)
    files = {
        f"model-{shard + 1:05d}-of-{shards:05d}.safetensors": names[shard::shards]
        for shard in range(shards)
    }
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    for file, held in files.items():
        save_file({name: filled[name] for name in held}, folder / file, {"format": "pt"})
    return folder


def refused(recipe: Recipe, output: Path, room: Path, donors=None) -> tuple:
    """The faults of a merge that is refused, and leaves the folder `room` as it was."""
    before = tree(room)
    with pytest.raises(FrankenmergeError) as caught:
        written(recipe, output, donors=donors)
    assert tree(room) == before
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
    return caught.value.faults
