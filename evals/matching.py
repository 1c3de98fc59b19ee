"""Permute and rotate a donor's neurons, heads and stream to match another's; outputs do not change.

A block computes the same with the neurons of its FFN in any order, each with its sign in `up` and
`down` flipped or not, with its key-value heads in any order and the query heads of each in any, and
with the values of a key-value head in any orthogonal basis (Ainsworth et al. 2023, Git Re-Basin,
for the orders). Before two donors' weights are averaged, these are chosen so that both compute the
same at the same places: neurons and heads by assignment on their activations on the same tokens,
the stream by one rotation for all depths.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from frankenmerge.donors.architecture import Architecture
from frankenmerge.errors import fail
from frankenmerge.models.hooks import block_outputs, blocks_of, forward
from frankenmerge.splicing.rotation import Rotation, procrustes, rotate_all

HEADS, NEURONS = "self_attn.o_proj", "mlp.down_proj"
"""The maps whose inputs are the outputs of heads and neurons."""


class Inside(NamedTuple):
    """Activations inside one block, at `n` positions."""

    neurons: Tensor
    """The input of `down`, `[n, f]`."""
    heads: Tensor
    """The output of every query head, `[n, h, e]`."""


class Activations(NamedTuple):
    """A donor's activations on some tokens, without every row's first position."""

    stream: list[Tensor]
    """The residual stream before the first block and after every block, `[n, d]` each."""
    inside: list[Inside]
    """By block."""


class Match(NamedTuple):
    """Which of B's parts belongs at each of A's places, in one block."""

    neurons: Tensor
    """`[f]`, B's neuron for each of A's."""
    signs: Tensor
    """`[f]`, 1 or -1: B's neuron may have the opposite sign."""
    groups: Tensor
    """`[g]`, B's key-value head for each of A's."""
    heads: Tensor
    """`[h]`, B's query head for each of A's; those of a group stay together."""
    values: Tensor
    """`[g, e, e]`, orthogonal: the values of B's key-value head at A's place are `v @ values`."""


@torch.no_grad()
def activations(model: PreTrainedModel, ids: Tensor) -> Activations:
    """Run a donor on tokens `[n, s]`.

    Raises FrankenmergeError for one whose blocks are not made of `self_attn.o_proj` and
    `mlp.down_proj` as Llama's are.
    """
    read: dict[str, Tensor] = {}
    sites = {
        f"{index}.{name}": _map(block, name)
        for index, block in enumerate(blocks_of(model))
        for name in (HEADS, NEURONS)
    }
    handles = [
        module.register_forward_pre_hook(_keeping(read, site)) for site, module in sites.items()
    ]
    try:
        with block_outputs(model) as outputs:
            forward(model, input_ids=ids)
            stream = [_flat(states) for states in outputs]
    finally:
        for handle in handles:
            handle.remove()
    heads = model.config.num_attention_heads
    inside = [
        Inside(read[f"{index}.{NEURONS}"], read[f"{index}.{HEADS}"].unflatten(1, (heads, -1)))
        for index in range(len(stream) - 1)
    ]
    return Activations(stream, inside)


def _map(block: nn.Module, name: str) -> nn.Module:
    modules = dict(block.named_modules())
    for needed in (name, name.replace("o_proj", "v_proj").replace("down_proj", "up_proj")):
        if needed not in modules:
            raise fail(
                "blocks",
                f"a map {needed}, as Llama's blocks have",
                "none",
                "average donors with Llama's architecture",
            )
    return modules[name]


def _keeping(read: dict[str, Tensor], name: str) -> Any:
    def keep(_module: nn.Module, args: tuple) -> None:
        read[name] = _flat(args[0])

    return keep


def _flat(states: Tensor) -> Tensor:
    return states[:, 1:].flatten(0, 1)


def joint_rotation(source: Sequence[Tensor], target: Sequence[Tensor]) -> Rotation:
    """Fit one rotation for all depths, with the same weight for every position.

    Its scale is the median over all positions of the ratio of the streams' lengths. Norm layers
    depend on directions alone; in a fit by squares, a few positions of very large norm would
    dominate.

    Args:
        source: the stream of the donor to be rotated, `[n, d]` for every depth.
        target: the other one's at the same depths.
    """
    before, after = (torch.cat(list(stream)).double() for stream in (source, target))
    scale = float((after.norm(dim=1) / before.norm(dim=1).clamp_min(1e-30)).median())
    return Rotation(procrustes(_unit(before, (1,)), _unit(after, (1,))).matrix, scale)


def match(of_a: Inside, of_b: Inside, groups: int) -> Match:
    """Match one block of B to one of A by their activations at the same positions.

    Neurons are matched by the absolute value of their correlation. Heads are matched by how far the
    output of one is a rotation of the other's (the nuclear norm of their cross product over their
    lengths), which does not depend on the basis of the values; groups by their heads in the best
    order.

    Args:
        of_a: the activations of A's block.
        of_b: the activations of B's block.
        groups: how many key-value heads there are.
    """
    return Match(
        *match_neurons(of_a.neurons, of_b.neurons), *_heads(of_a.heads, of_b.heads, groups)
    )


def match_neurons(of_a: Tensor, of_b: Tensor) -> tuple[Tensor, Tensor]:
    """`Match.neurons` and `Match.signs` of neurons `[n, f]`."""
    left, right = (_unit(neurons - neurons.mean(0), (0,)) for neurons in (of_a, of_b))
    correlation = left.T @ right
    rows, order = _assigned(correlation.abs())
    return order, torch.where(correlation[rows, order] < 0, -1, 1)


def _heads(of_a: Tensor, of_b: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    products = torch.einsum("nhi,nkj->hkji", _unit(of_a, (0, 2)), _unit(of_b, (0, 2)))
    alike, each = torch.linalg.matrix_norm(products, "nuc"), len(products) // groups
    pairs = alike.unflatten(0, (groups, each)).unflatten(2, (groups, each)).transpose(1, 2)
    within = [[_assigned(pair) for pair in row] for row in pairs]
    total = torch.tensor(
        [[float(pairs[g, k][within[g][k]].sum()) for k in range(groups)] for g in range(groups)]
    )
    _, order = _assigned(total)
    heads = torch.cat([k * each + within[g][k][1] for g, k in enumerate(order.tolist())])
    left, _, right = torch.linalg.svd(
        products[torch.arange(len(heads)), heads].unflatten(0, (groups, each)).sum(1)
    )
    return order, heads, left @ right


def _unit(states: Tensor, over: tuple[int, ...]) -> Tensor:
    states = states.double()
    return states / states.norm(dim=over, keepdim=True).clamp_min(
        1e-30
    )  # what is always zero stays zero


def _assigned(gain: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = linear_sum_assignment(-gain.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def matched(tensors: Mapping[str, Tensor], found: Match) -> dict[str, Tensor]:
    """The tensors of one of B's blocks with its parts at A's places, in float64.

    Names may be any that end as Llama's do.
    """
    return {name: _placed(name, tensor.double(), found) for name, tensor in tensors.items()}


def _placed(name: str, tensor: Tensor, found: Match) -> Tensor:
    module, kind = name.split(".")[-2:]
    signs, values = found.signs.double(), found.values
    if module == "gate_proj":
        return tensor[found.neurons]
    if module == "up_proj":
        return torch.einsum("f,f...->f...", signs, tensor[found.neurons])
    if module == "down_proj" and kind == "weight":
        return tensor[:, found.neurons] * signs
    if module == "q_proj":
        return tensor.unflatten(0, (len(found.heads), -1))[found.heads].flatten(0, 1)
    if module == "k_proj":
        return tensor.unflatten(0, (len(found.groups), -1))[found.groups].flatten(0, 1)
    if module == "v_proj":
        parts = tensor.unflatten(0, (len(found.groups), -1))[found.groups]
        return torch.einsum("gij,gi...->gj...", values, parts).flatten(0, 1)
    if module == "o_proj" and kind == "weight":
        parts = tensor.unflatten(1, (len(found.heads), -1))[:, found.heads]
        each = len(found.heads) // len(found.groups)
        return torch.einsum("dhi,hij->dhj", parts, values.repeat_interleave(each, 0)).flatten(1, 2)
    return tensor


def matched_model(
    state: Mapping[str, Tensor], architecture: Architecture, found: Sequence[Match]
) -> dict[str, Tensor]:
    """All of B's tensors, by name, with the parts of every block at A's places; in float64."""
    made = {name: tensor.double() for name, tensor in state.items()}
    for index, names in _blocks(state, architecture).items():
        if index is not None:
            made |= matched({name: state[name] for name in names.values()}, found[index])
    return made


def rotated_model(
    state: Mapping[str, Tensor], architecture: Architecture, rotation: Rotation
) -> dict[str, Tensor]:
    """All of a donor's tensors, by name, in another basis of the stream, in float64.

    The norms' gains are moved into the maps. The head must be among the tensors, and is no longer
    tied to the embedding.
    """
    made: dict[str, Tensor] = {}
    for names in _blocks(state, architecture).values():
        result = rotate_all(
            {canonical: state[name] for canonical, name in names.items()}, architecture, rotation
        )
        made |= {name: result[canonical] for canonical, name in names.items()}
    return made


def _blocks(
    state: Mapping[str, Tensor], architecture: Architecture
) -> dict[int | None, dict[str, str]]:
    """Names by canonical names, by block; None for tensors outside the blocks."""
    blocks: dict[int | None, dict[str, str]] = {}
    for name in state:
        _, index, canonical = architecture.role(name)
        blocks.setdefault(index, {})[canonical] = name
    return blocks
