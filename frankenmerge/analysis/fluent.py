"""Fluent inputs: a high activation against what the model itself expects to read.

Evolutionary prompt optimisation (Thompson, Straznickas and Rumbelow 2024, "Fluent dreaming for
language models", arXiv:2402.01702): a population with one input for each of several penalties on
the model's cross-entropy of the input. In every generation single tokens of each input are
exchanged for ones with the largest first-order gain, and every penalty keeps the best input of all.
The result is the Pareto front of all inputs that were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.ascent import GRADIENT_COST
from frankenmerge.analysis.decode import embedding_table
from frankenmerge.analysis.descent import frozen
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import Positions, Tokens
from frankenmerge.errors import fail
from frankenmerge.models.hooks import Site, block_outputs
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.progress import Advance, ignore

PENALTIES = (0.0, *torch.logspace(-1.5, 0.5, 7).tolist())
"""Standard deviations of the feature on random inputs that a nat per token costs."""
STEPS = 40
CHILDREN, MUTATIONS = 16, 32
"""New inputs of each member in a generation; tokens at a position that they are sampled from."""
_RANDOM = 256
"""Random inputs by which activations are scaled."""
_POSITIONS = 2048
"""Positions in a pass."""


class FrontPoint(NamedTuple):
    """An input that no other one surpasses in both."""

    tokens: Tokens
    activation: float
    cross_entropy: float
    """Nats per token of the input, by the model itself; the first token of a text without `start`
    is not predicted.
    """


@dataclass(frozen=True)
class FluentResult:
    """The fronts, in the order of the features, and what the search ran."""

    fronts: list[list[FrontPoint]]
    """The highest activation first."""
    inputs: int
    """Number of inputs that were run, to the last block; a gradient counts as `GRADIENT_COST`."""


def fluent_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    found: Tensor,
    *,
    site: Site = "block",
    positions: Positions = "last",
    steps: int = STEPS,
    seed: int = 0,
    start: Tokens = (),
    advance: Advance = ignore,
) -> FluentResult:
    """Search the front of activation against cross-entropy, for each feature.

    Args:
        model: the donor.
        features: any number of them, each one neuron of any block.
        found: inputs with a high activation `[features, n]` to begin with; texts that the model
            generates are added.
        site: `block` or `attention`, as for `ascent_search`.
        positions: whose activation counts, as for `ascent_search`.
        steps: how many generations.
        seed: of the texts and the exchanges.
        start: tokens before the searched ones, such as BOS.
        advance: called with the number of inputs run since its last call.

    Raises:
        FrankenmergeError: for inputs of which no token is predicted.
    """
    if found.shape[1] + len(start) < 2:
        raise fail("--tokens", "at least 2, or --bos", "1", "none of a single token is predicted")
    return _Evolution(model, features, site, positions, start, seed, advance).front(found, steps)


class _Evolution:
    """Populations of all features: one input `[n]` for each penalty."""

    def __init__(
        self,
        model: PreTrainedModel,
        features: Sequence[Feature],
        site: Site,
        positions: Positions,
        start: Tokens,
        seed: int,
        advance: Advance,
    ) -> None:
        self.model, self.features, self.start = model, features, start
        self.site: Site = site
        self.positions, self.advance, self.count = positions, advance, 0
        self.table = embedding_table(model).float()
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.penalties = torch.tensor(PENALTIES)
        self.known: list[dict[Tokens, tuple[float, float]]] = [{} for _ in features]
        """Activation and cross-entropy of the inputs of each feature."""

    def front(self, found: Tensor, steps: int) -> FluentResult:
        """Evolve from `found` `[features, n]`."""
        length = found.shape[1]
        self.scale = self._scale(length)
        texts = self._texts(length)
        for owner in range(len(self.features)):
            self._learn([owner] * (len(texts) + 1), torch.cat([found[owner, None], texts]))
        for _ in range(steps):
            members = [row for owner in range(len(self.features)) for row in self._members(owner)]
            owners = torch.arange(len(self.features)).repeat_interleave(len(PENALTIES))
            owners, children = self._children(owners, torch.tensor(members))
            self._learn(owners.tolist(), children)
        return FluentResult([_front(known) for known in self.known], self.count)

    def _scale(self, length: int) -> Tensor:
        """Each feature's standard deviation on random inputs `[features]`."""
        size = (_RANDOM, length)
        inputs = torch.randint(len(self.table), size, generator=self.generator)
        parts = [
            self._measured([owner] * len(inputs), inputs)[0] for owner in range(len(self.features))
        ]
        return torch.stack(parts).std(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

    def _texts(self, length: int) -> Tensor:
        """Inputs `[penalties, length]` that the model generates: fluent ones to begin with."""
        token = self.start[-1] if self.start else 0
        return sample_tokens(self.model, len(PENALTIES), length + 1, token, self.seed)[:, 1:]

    def _members(self, owner: int) -> list[Tokens]:
        """The best known input of a feature for every penalty."""
        inputs, values = zip(*self.known[owner].items(), strict=True)
        activation, nats = torch.tensor(values).T
        fitness = activation / self.scale[owner] - self.penalties[:, None] * nats
        return [inputs[best] for best in fitness.argmax(dim=1).tolist()]

    def _children(self, owners: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs with one token exchanged, `CHILDREN` of each `[r, n]`, and their features."""
        parts, rows = [], max(1, _POSITIONS // (len(self.start) + inputs.shape[1]) // CHILDREN)
        penalties = self.penalties.repeat(len(self.features))
        for some, own, costs in zip(
            owners.split(rows), inputs.split(rows), penalties.split(rows), strict=True
        ):
            best = (
                self._gains(some.tolist(), own, costs)
                .topk(min(MUTATIONS, len(self.table)), dim=2)
                .indices
            )
            children = own.repeat_interleave(CHILDREN, dim=0)
            which = torch.arange(len(children))
            size = (len(children),)
            places = torch.randint(own.shape[1], size, generator=self.generator)
            picks = torch.randint(best.shape[2], size, generator=self.generator)
            children[which, places] = best[which // CHILDREN, places, picks]
            parts.append(children)
        return owners.repeat_interleave(CHILDREN), torch.cat(parts)

    def _gains(self, owners: list[int], inputs: Tensor, penalties: Tensor) -> Tensor:
        """The first-order gain of exchanging a token `[r, n, v]`, up to a constant of the position.

        A token counts in two places: as an input, and as what is predicted there.
        """
        ids = self._after_start(inputs)
        rows = self.table[ids].requires_grad_()
        with (
            frozen(self.model),
            torch.enable_grad(),
            block_outputs(self.model, site=self.site) as states,
        ):
            logits = self.model(inputs_embeds=rows.to(self.model.dtype), use_cache=False).logits
            likely = self._likely(logits)
            nats = -likely.gather(2, ids[:, -likely.shape[1] :, None])[..., 0].mean(dim=1)
            fitness = self._activations(states, owners) / self.scale[owners].to(nats.device)
            fitness = fitness - penalties.to(nats.device) * nats
            (gradient,) = torch.autograd.grad(fitness.sum(), rows)
        gains = gradient[:, len(self.start) :] @ self.table.T
        predicted = likely.shape[1]
        gains[:, -predicted:] += (
            penalties.to(gains.device)[:, None, None] * likely.detach() / predicted
        )
        self._ran(GRADIENT_COST * len(inputs))
        return gains.cpu()

    def _learn(self, owners: list[int], inputs: Tensor) -> None:
        """Measure inputs `[r, n]` that are not known yet."""
        new = {
            (owner, tuple(tokens))
            for owner, tokens in zip(owners, inputs.tolist(), strict=True)
            if tuple(tokens) not in self.known[owner]
        }
        if not new:
            return
        some, rows = zip(*sorted(new), strict=True)
        activations, nats = self._measured(list(some), torch.tensor(rows))
        for owner, tokens, *values in zip(
            some, rows, activations.tolist(), nats.tolist(), strict=True
        ):
            self.known[owner][tokens] = (values[0], values[1])

    @torch.no_grad()
    def _measured(self, owners: list[int], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and cross-entropies `[r]` of inputs `[r, n]`, float32."""
        parts, size = [], max(1, _POSITIONS // (len(self.start) + inputs.shape[1]))
        with block_outputs(self.model, site=self.site) as states:
            for first in range(0, len(inputs), size):
                ids = self._after_start(inputs[first : first + size])
                likely = self._likely(self.model(input_ids=ids, use_cache=False).logits)
                nats = -likely.gather(2, ids[:, -likely.shape[1] :, None])[..., 0].mean(dim=1)
                activations = self._activations(states, owners[first : first + size])
                parts.append(torch.stack([activations.cpu(), nats.cpu()]))
                self._ran(len(ids))
        activations, nats = torch.cat(parts, dim=1)
        return activations, nats

    def _activations(self, states: list[Tensor], owners: list[int]) -> Tensor:
        """Each row's feature `[r]`, float32."""
        features = [self.features[owner] for owner in owners]
        outputs = torch.stack(
            [states[each.block][row, :, each.neuron] for row, each in enumerate(features)]
        ).float()
        return outputs[:, -1] if self.positions == "last" else outputs.sum(dim=1)

    def _likely(self, logits: Tensor) -> Tensor:
        """Log-probabilities of all tokens where one is predicted, of logits `[r, s, v]`."""
        first = max(len(self.start), 1)
        return logits[:, first - 1 : -1].float().log_softmax(dim=-1)

    def _after_start(self, inputs: Tensor) -> Tensor:
        begun = torch.tensor(self.start, dtype=torch.long).expand(len(inputs), -1)
        return torch.cat([begun, inputs], dim=1).to(self.table.device)

    def _ran(self, count: int) -> None:
        self.count += count
        self.advance(count)


def _front(known: dict[Tokens, tuple[float, float]]) -> list[FrontPoint]:
    """The inputs that none surpasses, the highest activation first."""
    points = sorted(
        (FrontPoint(tokens, *values) for tokens, values in known.items()),
        key=lambda point: (-point.activation, point.cross_entropy, point.tokens),
    )
    front: list[FrontPoint] = []
    for point in points:
        if not front or point.cross_entropy < front[-1].cross_entropy:
            front.append(point)
    return front
