"""Exchanges of single maps: put back afterwards, and ranked."""

import numpy as np
import pytest
import torch
from module_swaps import Measured, exchanged, rho, swaps_of, tables
from torch import nn


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 3)}) for _ in range(count))


def test_every_map_is_exchanged_with_those_of_neighbours():
    swaps = swaps_of(blocks(3), blocks(3))
    assert [(swap.block, swap.other) for swap in swaps] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip


def test_an_exchange_ends_with_its_context():
    a, b = blocks(2), blocks(2)
    own, guest = a[0]["up"], b[1]["up"]
    with exchanged(a, b, swaps_of(a, b)[1]):
        assert a[0]["up"] is guest
    assert a[0]["up"] is own


def test_rho_is_one_for_scores_that_fall_as_the_cost_rises():
    cost = torch.rand(30).numpy()
    assert rho(-(cost**3), cost)[0] == pytest.approx(1)
    swaps = swaps_of(blocks(8), blocks(8))
    costs = np.arange(22.0)
    found = tables(Measured(costs, costs, {"good": -costs, "constant": 0 * costs}), swaps)
    assert found["all"]["loss"]["good"][0] == 1 and "constant" not in found["all"]["loss"]
