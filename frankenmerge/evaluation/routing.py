"""Whether the gates of a mixture route prompts that they were not made from to the right experts.

Every positive prompt is held out once: gates made from the others route it, in the mixture that has
these gates. The base is read block by block, experts one at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.functional import linear

from frankenmerge.artefacts.mixture import Mixture
from frankenmerge.errors import Fault
from frankenmerge.evaluation.intervals import Interval
from frankenmerge.models.passes import Passage, replaced
from frankenmerge.models.streaming import each_block, read_tensor
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import computed_tensors, splice_tokenizer
from frankenmerge.splicing.gates import (
    Tokens,
    Vectors,
    entering,
    gate_rows,
    prompt_vectors,
    prompts_of,
    tokens_of_prompts,
)
from frankenmerge.splicing.mixtures import Maps, expert_maps
from frankenmerge.splicing.operations import Copy, Gate
from frankenmerge.splicing.resolve import Splice

FOLDS = 2
"""Gates are made from every other prompt, and once more from the rest."""


class ExpertRouting(NamedTuple):
    """Where one expert's held-out prompts go."""

    name: str
    prompts: int
    right: int
    """Prompts of which it is the first choice of most tokens in all blocks."""
    interval: Interval
    """Of the share of right prompts: 95 %, Wilson's score interval."""
    tokens: float
    """Share of tokens in all blocks whose first choice it is."""


class Routing(NamedTuple):
    """Where held-out prompts go."""

    experts: tuple[ExpertRouting, ...]
    blocks: tuple[float, ...]
    """For each block the share of tokens whose first choice is the prompt's own expert."""

    @property
    def chance(self) -> float:
        """What routing at random would give, of prompts and of tokens."""
        return 1 / len(self.experts)

    @property
    def total(self) -> ExpertRouting:
        """All experts together."""
        prompts, right = (
            sum(getattr(each, key) for each in self.experts) for key in ("prompts", "right")
        )
        tokens = float(np.mean([each.tokens for each in self.experts]))
        return ExpertRouting("all", prompts, right, _wilson(right, prompts), tokens)

    def as_json(self) -> dict:
        """The figures as JSON."""
        return {
            "chance": self.chance,
            **_figures(self.total),
            "experts": [{"name": each.name, **_figures(each)} for each in self.experts],
            "blocks": list(self.blocks),
        }


def _figures(found: ExpertRouting) -> dict:
    figures = found._asdict()
    figures.pop("name")
    return figures | {"interval": list(found.interval), "accuracy": found.right / found.prompts}


def routing_faults(mixture: Mixture, place: str) -> Iterable[Fault]:
    """Experts with too few prompts to hold any out."""
    folds = [_held(mixture, fold) for fold in range(FOLDS)]
    for number, expert in enumerate(mixture.experts):
        prompts = set(expert.positive_prompts or ())
        if not prompts or any(prompts <= held for held in folds):
            where = f"{place}: experts[{number}].positive_prompts"
            expected = f"{FOLDS} or more of its own, of which some are held out to measure"
            yield Fault(where, expected, str(len(prompts)), "add prompts, or omit --measure")


def _held(mixture: Mixture, fold: int) -> set[str]:
    """The prompts that gates are not made from."""
    return {
        prompt
        for expert in mixture.experts
        for prompt in (expert.positive_prompts or ())[fold::FOLDS]
    }


@torch.no_grad()
def measured_routing(
    splice: Splice, *, device: str = "cpu", progress: Progress = silent
) -> Routing:
    """Route every positive prompt by gates that it has no part in; computes in float32.

    Args:
        splice: of a mixture without `routing_faults` whose donors have their weights.
        device: a torch device.
        progress: in blocks.
    """
    mixture = splice.recipe.mixture
    assert mixture
    vectors = prompt_vectors(splice, device=device, progress=progress)
    tokens = tokens_of_prompts(splice, prompts_of(mixture))
    first = 1 if splice_tokenizer(splice).bos_token else 0
    choices: dict[str, Tensor] = {}
    for fold in range(FOLDS):
        held = _held(mixture, fold)
        chosen = {prompt: tokens[prompt] for prompt in held}
        gates = _gates(splice, mixture, vectors, held, device)
        choices |= _first_choices(splice, chosen, gates, device, progress)
    # BOS has the same state in every prompt.
    kept = {
        prompt: row[:, first if row.shape[1] > first else 0 :] for prompt, row in choices.items()
    }
    return _routing(mixture, kept)


class _BlockGates(NamedTuple):
    experts: Tensor
    """`[experts, d]`."""
    shared: Tensor | None
    """`[1, d]`; None for a shared expert without a gate, or none."""


def _gates(
    splice: Splice, mixture: Mixture, vectors: Vectors, held: set[str], device: str
) -> list[_BlockGates]:
    """The gates of every block, made without the prompts `held`."""
    made: dict[tuple[int, bool], Tensor] = {}
    for gate in splice.operations:
        if isinstance(gate, Gate):
            without = () if gate.shared else held
            rows = gate_rows(gate, mixture, vectors, without)
            made[gate.block, gate.shared] = torch.from_numpy(rows).to(device)
    return [
        _BlockGates(made[index, False], made.get((index, True)))
        for index in range(splice.base.blocks)
    ]


def _first_choices(
    splice: Splice,
    tokens: Tokens,
    gates: Sequence[_BlockGates],
    device: str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Run prompts through the mixture; the first expert of each token in each block, `[l, s]`."""
    base, mixture = splice.base, splice.recipe.mixture
    assert mixture
    donor, batches = entering(base, tokens, device)
    firsts: dict[str, list[Tensor]] = {prompt: [] for prompt in tokens}
    with progress("held-out prompts through the mixture", base.blocks, "blocks") as advance:
        for index, block in each_block(donor):
            inputs = [_before_mlp(passage, index, block) for _, passage in batches]
            routed = [_routed(each, gates[index - 1], mixture) for each in inputs]
            for (prompts, _), (scores, _) in zip(batches, routed, strict=True):
                best = scores.argmax(-1).cpu()
                for row, prompt in enumerate(prompts):
                    firsts[prompt].append(best[row, : len(tokens[prompt])])
            for number, maps in enumerate(expert_maps(splice, index - 1)):
                mlp = _mlp(block, maps)
                for (_, passage), given, (_, weights) in zip(batches, inputs, routed, strict=True):
                    weight = weights[..., number]
                    taken = weight != 0
                    written = mlp(given[taken]) * weight[taken, None]
                    passage.states[taken] += written
            advance(1)
    return {prompt: torch.stack(rows) for prompt, rows in firsts.items()}


def _before_mlp(passage: Passage, index: int, block: nn.Module) -> Tensor:
    """Run a block without its MLP; returns what this would read, `[n, s, d]`."""
    read: list[Tensor] = []
    mlp = block.get_submodule("mlp")

    def nothing(states: Tensor) -> Tensor:
        read.append(states)
        return torch.zeros_like(states)

    with replaced(mlp, nothing):
        for _ in passage.through(index, block):
            pass
    return torch.cat(read)


def _routed(given: Tensor, gates: _BlockGates, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Scores of experts `[n, s, experts]`, and weights of these and the shared one."""
    scores = linear(given, gates.experts)
    top, chosen = scores.softmax(-1).topk(mixture.experts_per_token, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    weights = torch.zeros_like(scores).scatter_(-1, chosen, top)
    if mixture.shared_experts:
        own = scores.new_ones(*scores.shape[:-1], 1)
        own = own if gates.shared is None else linear(given, gates.shared).sigmoid()
        weights = torch.cat([weights, own], dim=-1)
    return scores, weights


def _mlp(block: nn.Module, maps: Maps) -> nn.Module:
    """The block's MLP with an expert's weights, as the result has them."""
    given = next(block.parameters())
    weights = {}
    for name, operation in maps.operations.items():
        if isinstance(operation, Copy):
            made = read_tensor(operation.tensor)
        else:
            ((_, made),) = computed_tensors([operation])
        weights[f"{name}.weight"] = made.to(given.device, given.dtype)
    mlp = block.get_submodule("mlp")  # whose own weights are not needed
    mlp.load_state_dict(weights, assign=True)
    return mlp


def _routing(mixture: Mixture, choices: Mapping[str, Tensor]) -> Routing:
    count, found, hits = len(mixture.experts), [], []
    for number, expert in enumerate(mixture.experts):
        own = [choices[prompt] for prompt in expert.positive_prompts or ()]
        right = sum(
            int(torch.bincount(rows.flatten(), minlength=count).argmax()) == number for rows in own
        )
        hit = torch.cat([rows == number for rows in own], dim=1).double()
        hits.append(hit.mean(1))
        interval = _wilson(right, len(own))
        tokens = float(hit.mean())
        found.append(ExpertRouting(expert.source_model, len(own), right, interval, tokens))
    return Routing(tuple(found), tuple(torch.stack(hits).mean(0).tolist()))


def _wilson(right: int, count: int) -> Interval:
    low, high = binomtest(right, count).proportion_ci(0.95, "wilson")
    return Interval(float(low), float(high))
