"""Do two donors' weights average better in one basis, with their heads and neurons matched?

B is aligned with A on tokens that both generate; the averages are measured on windows from the end
of a text: raw, with B's stream rotated, with its heads and neurons matched, and with both. Neither
changes what B computes. Nothing is written.
"""

import json
import statistics
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import torch
from matching import (
    Activations,
    activations,
    joint_rotation,
    match,
    match_neurons,
    matched_model,
    rotated_model,
)
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from frankenmerge.donors.architecture import Architecture
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import shared_context
from frankenmerge.evaluation.documents import read_text
from frankenmerge.evaluation.language import encode
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.splicing.gauge_fitting import SAMPLED_LENGTH
from frankenmerge.splicing.methods.combine import combine
from frankenmerge.splicing.methods.inputs import Operand
from frankenmerge.splicing.rotation import Rotation

ROWS = 64
"""Rows of tokens that each donor generates."""
State = Mapping[str, Tensor]


@click.command()
@click.option(
    "--donor-a", required=True, help="The donor whose basis, heads and neurons stay in place."
)
@click.option(
    "--donor-b",
    required=True,
    help="The donor to align with it, of the same shape and with the same tokens.",
)
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text; may be repeated.",
)
@click.option(
    "--windows",
    default=16,
    show_default=True,
    help="Number of windows to measure on, over all texts.",
)
@click.option(
    "--t",
    "shares",
    default=[0.25, 0.5, 0.75],
    show_default=True,
    multiple=True,
    help="B's share of the average; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    windows: int,
    shares: tuple[float, ...],
    as_json: bool,
) -> None:
    """Measure averages of two donors' weights, in nats per token."""
    checkpoints = [open_checkpoint(name) for name in (donor_a, donor_b)]
    a, b = (load_model(checkpoint).requires_grad_(False) for checkpoint in checkpoints)
    shapes = [
        {name: tensor.shape for name, tensor in model.state_dict().items()} for model in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise click.UsageError(
            "only donors of the same shape can be averaged; tensors' names or shapes differ"
        )
    tokenizer = load_tokenizer(checkpoints[0])
    start: Any = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    length = min(SAMPLED_LENGTH, shared_context(checkpoints))
    contents = [encode(tokenizer, read_text(text).content, str(text)).ids for text in texts]
    tested = torch.cat(
        [_last_windows(ids, start, length, windows // len(texts)) for ids in contents]
    )
    shown = torch.cat(
        [sample_tokens(model, ROWS, length, start, seed) for seed, model in enumerate((a, b))]
    )
    result: dict[str, Any] = {"donor_a_nats": _loss(a, tested), "donor_b_nats": _loss(b, tested)}
    of_a, of_b = activations(a, shown), activations(b, shown)
    result["likeness"] = _likeness(of_a, of_b)
    for name, (left, right) in _alignments(a, b, checkpoints[0].architecture, of_a, of_b).items():
        result[name] = {
            method: {
                str(t): _loss(_filled(a, _average(method, left, right, t)), tested) for t in shares
            }
            for method in ("linear", "slerp")
        }
    click.echo(json.dumps(result)) if as_json else _print(result)


def _alignments(
    a: PreTrainedModel,
    b: PreTrainedModel,
    architecture: Architecture,
    of_a: Activations,
    of_b: Activations,
) -> dict[str, tuple[State, State]]:
    """A's and B's tensors as they are averaged, by how B was aligned with A."""
    groups = a.config.num_key_value_heads
    found = [
        match(left, right, groups) for left, right in zip(of_a.inside, of_b.inside, strict=True)
    ]
    rotation = joint_rotation(of_b.stream, of_a.stream)
    state_a, state_b = a.state_dict(), b.state_dict()
    # Where B is rotated, A's gains have to be in the maps as well.
    plain_a = rotated_model(
        state_a, architecture, Rotation(torch.eye(len(rotation.matrix), dtype=torch.float64))
    )
    matched_b = matched_model(state_b, architecture, found)
    return {
        "raw": (state_a, state_b),
        "gauge": (plain_a, rotated_model(state_b, architecture, rotation)),
        "matched": (state_a, matched_b),
        "gauge_matched": (plain_a, rotated_model(matched_b, architecture, rotation)),
    }


def _likeness(of_a: Activations, of_b: Activations) -> dict[str, list[float]]:
    """Compare what the donors compute on the same tokens.

    `lengths` are ratios of the length of B's stream to A's, the median over positions at every
    depth; `neurons` a block's mean correlation of matched neurons, and `shuffled` the same by
    chance, over shuffled positions.
    """
    lengths = [
        float((b.norm(dim=1) / a.norm(dim=1)).median())
        for a, b in zip(of_a.stream, of_b.stream, strict=True)
    ]
    order = torch.randperm(len(of_b.stream[0]), generator=torch.Generator().manual_seed(0))
    pairs = [(a.neurons, b.neurons) for a, b in zip(of_a.inside, of_b.inside, strict=True)]
    return {
        "lengths": lengths,
        "neurons": [_correlation(a, b) for a, b in pairs],
        "shuffled": [_correlation(a, b[order]) for a, b in pairs],
    }


def _correlation(of_a: Tensor, of_b: Tensor) -> float:
    places, _ = match_neurons(of_a, of_b)
    together = torch.stack([of_a.T, of_b.T[places]], 1).double()
    return statistics.fmean(
        abs(float(torch.corrcoef(pair)[0, 1].nan_to_num())) for pair in together
    )


def _average(method: str, left: State, right: State, t: float) -> dict[str, Tensor]:
    """Average tensors as a merge does: `(1 - t)` of the left one, `t` of the right one."""
    made = {}
    for name, tensor in left.items():
        weights, parameters = (
            ([{"weight": 1 - t}, {"weight": t}], {}) if method == "linear" else ([{}, {}], {"t": t})
        )
        parts = [
            _part(of, weight) for of, weight in zip((tensor, right[name]), weights, strict=True)
        ]
        base = parts.pop(0) if method == "slerp" else None
        chunks = combine(
            method, parts, base, shape=tuple(tensor.shape), parameters=parameters, name=name, seed=0
        )
        made[name] = torch.cat([chunk.clone() for chunk in chunks]).view(tensor.shape)
    return made


def _part(tensor: Tensor, weight: Mapping[str, float]) -> Operand:
    flat = tensor.detach().float().flatten()
    return Operand(lambda start, stop: flat[start:stop].clone(), weight)


def _filled(like: PreTrainedModel, state: State) -> PreTrainedModel:
    """A model of these tensors, its head not tied to its embedding."""
    config = deepcopy(like.config)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _last_windows(ids: Any, start: int, length: int, count: int) -> Tensor:
    """Windows from the end of a text, each after the token `start`, `[count, length]`."""
    rows = torch.from_numpy(ids[1:]).unfold(0, length - 1, length - 1)[-count:]
    return torch.cat([torch.full((len(rows), 1), start), rows], 1)


@torch.no_grad()
def _loss(model: PreTrainedModel, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits
    return float(
        functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    )


def _print(result: dict[str, Any]) -> None:
    a, b = result.pop("donor_a_nats"), result.pop("donor_b_nats")
    click.echo(f"Loss in nats per token (donor A: {a:.3f}, donor B: {b:.3f})")
    for name, values in result.pop("likeness").items():
        click.echo(f"{name:14} " + " ".join(f"{value:.2f}" for value in values))
    for name, methods in result.items():
        for method, nats in methods.items():
            click.echo(
                f"{name:14} {method:7}"
                + "".join(f"  t={t} {value:.3f}" for t, value in nats.items())
            )


if __name__ == "__main__":
    main()
