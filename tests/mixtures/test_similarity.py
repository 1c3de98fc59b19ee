"""Donors whose weights are nearly the same are found from samples of their bytes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frankenmerge.splicing.similarity import alike
from frankenmerge.storage.safetensors_header import read_header


@pytest.fixture
def write(tmp_path):
    """Write a donor of blocks with one matrix each; returns its tensors by block."""

    def call(name: str, blocks: list[torch.Tensor]):
        file = tmp_path / f"{name}.safetensors"
        save_file({f"{number}.w": block for number, block in enumerate(blocks)}, file)
        header = read_header(file)
        return [[header[f"{number}.w"]] for number in range(len(blocks))]

    return call


def blocks(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(128, 96, generator=generator) for _ in range(3)]


def test_rounding_makes_no_difference(write):
    own = blocks(0)
    rounded = [block.bfloat16() for block in own]
    ((one, other, difference),) = alike({"a": write("a", own), "b": write("b", rounded)})
    assert (one, other) == ("a", "b") and difference == pytest.approx(0.0017, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_one_block_that_differs_is_enough(write, dtype):
    own, other = blocks(0), blocks(0)
    other[2] = other[2] * 1.01
    pair = {"a": write("a", own), "b": write("b", [each.to(dtype) for each in other])}
    assert list(alike(pair)) == []
    same = {"a": write("c", own), "b": write("d", [each.to(dtype) for each in own])}
    assert len(list(alike(same))) == 1


def test_every_pair_is_compared(write):
    donors = {name: write(name, blocks(seed)) for name, seed in (("a", 1), ("b", 2), ("c", 1))}
    assert [pair[:2] for pair in alike(donors)] == [("a", "c")]
    assert np.isclose(next(alike(donors))[2], 0)
