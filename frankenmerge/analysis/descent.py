"""Descent on inputs of a model: many at once, each with its own loss; the model is unchanged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Optimizer = Literal["descent", "adam"]
_OPTIMIZERS = {"descent": torch.optim.SGD, "adam": torch.optim.Adam}


class Descended(NamedTuple):
    """Where a descent ended."""

    rows: Tensor
    """After the last step, `[n, ...]`."""
    losses: Tensor
    """Of each row, before every step and after the last, `[steps + 1, n]`."""


def descend(
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    optimizer: Optimizer,
    rates: tuple[float, float],
) -> Descended:
    """Lower the loss of every row by its gradient.

    The losses are added and differentiated in one pass. Both optimizers work element by element, so
    a row moves as it would alone, up to rounding.

    Args:
        start: `[n, ...]`, the initial rows.
        loss: from rows `[n, ...]` to the loss of each, `[n]`, none depending on another's row.
        steps: how many to take.
        optimizer: `descent` (plain) or `adam`.
        rates: step size at the first and at the last step, linear between.
    """
    rows = start.detach().clone().requires_grad_()
    stepper = _OPTIMIZERS[optimizer]([rows], lr=rates[0])
    losses = []
    for rate in torch.linspace(*rates, steps).tolist():
        stepper.param_groups[0]["lr"] = rate
        current = loss(rows)
        (rows.grad,) = torch.autograd.grad(current.sum(), [rows])
        stepper.step()
        losses.append(current.detach())
    with torch.no_grad():
        losses.append(loss(rows))
    return Descended(rows.detach(), torch.stack(losses))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients of the parameters, which an input's gradient does not need."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
