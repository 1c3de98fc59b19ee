"""Ascent: exchange single tokens of an input for better ones.

Coordinate ascent over the positions of an input. From several starts (greedy search's input and
random ones; only these where the vocabulary is large) each position is given the best of some
candidates, which the gradient at the one-hot token chooses (to first order, as in GCG: Zou et al.
2023, arXiv:2307.15043). The best starts climb on, and the best input of each feature is then given
the best of all tokens at every position, and climbs by those that were best there. All activations
are exact: candidates are run after the keys and values of the tokens before their position, and
inputs of several features that differ in that position alone are run once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from frankenmerge.analysis.decode import embedding_table
from frankenmerge.analysis.descent import frozen
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.greedy import (
    BATCH,
    Positions,
    Tokens,
    check_search,
    greedy_search,
    own_activations,
)
from frankenmerge.analysis.ranking import merge, pack, unpack
from frankenmerge.models.hooks import Site, block_outputs, embedding_of, forward
from frankenmerge.models.passes import caches_keys
from frankenmerge.progress import Advance, ignore

STARTS = 8
"""Inputs to climb from, for each feature."""
KEPT = 2
"""How many of them, the best after one visit of every position, climb on."""
EXPLORED = 16
"""Candidates at a position of every start, before all tokens are tried in the best one."""
REMEMBERED = 64
"""The best of all tokens at a position, which are tried when others have changed."""
RECALL_SAMPLE = 8
"""Number of exchanges that are also made exactly, to measure the recall of the screen."""
GRADIENT_COST = 3
"""Inputs that a forward and a backward pass of one input count as."""
_GRADIENT_ROWS = 64
"""Inputs whose gradients are computed at once."""


@dataclass(frozen=True)
class AscentResult:
    """The inputs that ascent found, in the order of the features, and what it ran."""

    tokens: np.ndarray
    """Token ids `[features, n]`, int32, without `start`."""
    values: np.ndarray
    """The feature's activation at each of these tokens `[features, n]`, float32."""
    inputs: int
    """Number of inputs that were run; a gradient counts as `GRADIENT_COST`."""
    passes: float
    """The same in passes of the whole vocabulary."""
    recall: float | None
    """With `candidates`: the share of exchanges in the starts for which the best of all tokens was
    a candidate, on a sample of them, which `inputs` does not count; else None.
    """


def ascent_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    *,
    n: int = 4,
    site: Site = "block",
    isolated: bool = False,
    positions: Positions = "last",
    candidates: int | None = None,
    starts: int = STARTS,
    seed: int = 0,
    start: Tokens = (),
    advance: Advance = ignore,
) -> AscentResult:
    """Find for each feature an input of `n` tokens that hardly an exchange of one improves.

    Args:
        model: the donor; activations are compared in float32.
        features: any number of them, each one neuron of any block.
        n: how many tokens to find.
        site: `block` for the residual stream after the block, `attention` for the output of its
            attention.
        isolated: whether every block is fed the embedding instead of its predecessor's output.
        positions: what to maximise: the feature at the `last` position, or its sum over `all`,
            including those of `start`.
        candidates: try only this many tokens at a position, and omit what runs all tokens: greedy
            search, and the end. For large vocabularies.
        starts: how many inputs to climb from: the one that greedy search finds, and random ones.
        seed: of the random starts.
        start: tokens before the searched ones, such as BOS.
        advance: called with the number of inputs run since its last call.

    Raises:
        FrankenmergeError: for features, tokens or lengths that the donor does not have, or
            activations that are not finite.
    """
    counts = {"n": n, "starts": starts, "candidates": 1 if candidates is None else candidates}
    check_search(model, features, n, counts, start)
    runs = Runs(model, features, start, site, isolated, positions, advance)
    begun = _starts(runs, n, starts, candidates is None, seed)
    owners, screen = torch.arange(len(features)), _screened(runs, candidates or EXPLORED)
    several = owners.repeat_interleave(starts)
    climbed = _best(KEPT, *climb(runs, several, begun, screen, rounds=1), len(features))
    kept = owners.repeat_interleave(len(climbed) // len(features))
    found = _best(1, *climb(runs, kept, climbed, screen), len(features))
    if candidates is None:
        found = _polished(runs, owners, found)
    inputs = runs.total
    recall = None if candidates is None else _recall(runs, several, begun, candidates)
    values = own_activations(model, features, runs.after_start(found), site=site, isolated=isolated)
    return AscentResult(
        found.numpy().astype(np.int32),
        values[:, len(start) :].numpy(),
        inputs,
        inputs / len(embedding_of(model)),
        recall,
    )


def _starts(runs: "Runs", n: int, starts: int, greedy: bool, seed: int) -> Tensor:
    """Tokens `[features * starts, n]`, random, but the first of each feature if `greedy`."""
    size, generator = (len(runs.features), starts, n), torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(embedding_of(runs.model)), size, generator=generator)
    if greedy:
        found = greedy_search(
            runs.model,
            runs.features,
            n=n,
            site=runs.site,
            isolated=runs.isolated,
            positions=runs.positions,
            start=runs.start,
            advance=runs.ran,
        )
        tokens[:, 0] = torch.from_numpy(found.tokens)
    return tokens.flatten(0, 1)


def _best(count: int, inputs: Tensor, scores: Tensor, features: int) -> Tensor:
    """The `count` best inputs of each feature, of as many `[r, n]` for each."""
    scores = scores.view(features, -1)
    best = scores.topk(min(count, scores.shape[1]), dim=1).indices
    rows = best + torch.arange(features)[:, None] * scores.shape[1]
    return inputs[rows.flatten()]


def _polished(runs: "Runs", owners: Tensor, inputs: Tensor) -> Tensor:
    """Try all tokens at every position of the features' inputs `[features, n]`, then climb.

    Where others have changed since, the tokens are tried that were the best then.
    """
    inputs, count = inputs.clone(), min(REMEMBERED, len(runs.table))
    best = inputs.new_empty((*inputs.shape, count))
    for position in reversed(range(inputs.shape[1])):
        best[:, position], _ = runs.exchange(owners, inputs, position, None, count)
        inputs[:, position] = best[:, position, 0]
    climbed, _ = climb(runs, owners, inputs, lambda some, _inputs, position: best[some, position])
    return climbed


Propose = Callable[[Tensor, Tensor, int], Tensor]
"""Candidates `[r, c]` for a position, from features' indices `[r]` and their inputs `[r, n]`."""


def _screened(runs: "Runs", count: int) -> Propose:
    """Candidates with the largest first-order change, and the token itself."""

    def propose(owners: Tensor, inputs: Tensor, position: int) -> Tensor:
        gains = runs.gains(owners, inputs)[:, position]
        best = gains.topk(min(count, gains.shape[1]), dim=1).indices
        return torch.cat([inputs[:, position, None], best], dim=1)

    return propose


def climb(
    runs: "Runs",
    owners: Tensor,
    inputs: Tensor,
    propose: Propose,
    rounds: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exchange single tokens for the best candidates until no exchange improves an input.

    Positions are visited from the last to the first: the last has the most influence, and its
    candidates follow the longest cached prefix. A position is visited again once another changed.

    Args:
        runs: runs the model.
        owners: the index of each input's feature `[r]`.
        inputs: token ids `[r, n]`.
        propose: chooses candidates.
        rounds: visit every position at most so many times.

    Returns:
        Inputs `[r, n]` and their scores `[r]`, float32.
    """
    inputs = inputs.clone()
    scores = torch.full((len(inputs),), -torch.inf)
    settled = torch.zeros_like(inputs, dtype=torch.bool)
    for _ in count() if rounds is None else range(rounds):
        if settled.all():
            break
        for position in reversed(range(inputs.shape[1])):
            rows = (~settled[:, position]).nonzero()[:, 0]
            if not len(rows):
                continue
            some, own = owners[rows], inputs[rows]
            best = runs.exchange(some, own, position, propose(some, own, position))
            tokens, values = (each[:, 0] for each in best)
            better = values > scores[rows]  # strictly, so that it ends
            moved = rows[better & (tokens != own[:, position])]
            inputs[rows[better], position] = tokens[better]
            scores[rows[better]] = values[better]
            settled[moved] = False
            settled[rows, position] = True
    return inputs, scores


def _recall(runs: "Runs", owners: Tensor, inputs: Tensor, candidates: int) -> float:
    """The share of a sample of exchanges for which the best of all tokens is a candidate."""
    sample = np.unique(np.linspace(0, len(inputs) - 1, RECALL_SAMPLE).round().astype(int))
    rows, hits = torch.from_numpy(sample), []
    for position in range(inputs.shape[1]):
        some = rows[position :: inputs.shape[1]]
        if len(some):
            screen = _screened(runs, candidates)(owners[some], inputs[some], position)
            best, _ = runs.exchange(owners[some], inputs[some], position, None)
            hits += (screen == best).any(dim=1).tolist()
    return float(np.mean(hits))


@dataclass
class Runs:
    """Runs the model on inputs of features with the same settings throughout a search."""

    model: PreTrainedModel
    features: Sequence[Feature]
    start: Tokens
    site: Site
    isolated: bool
    positions: Positions
    advance: Advance
    total: int = 0
    """Inputs run so far, a gradient counted as `GRADIENT_COST`."""
    table: Tensor = field(init=False)
    """Every token as `inputs_embeds` `[v, d]`, float32."""

    def __post_init__(self) -> None:
        self.table = embedding_table(self.model).float()

    def ran(self, count: int) -> None:
        """Count inputs that were run."""
        self.total += count
        self.advance(count)

    def after_start(self, inputs: Tensor) -> Tensor:
        """Inputs `[r, s]` with the tokens of `start` before them."""
        begun = torch.tensor(self.start, dtype=torch.long).expand(len(inputs), -1)
        return torch.cat([begun, inputs], dim=1)

    @torch.no_grad()
    def exchange(
        self,
        owners: Tensor,
        inputs: Tensor,
        position: int,
        candidates: Tensor | None,
        k: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The `k` best candidates for one position of each input.

        Args:
            owners: the index of each input's feature `[r]`.
            inputs: token ids `[r, n]`.
            position: where to exchange the token.
            candidates: token ids `[r, c]`, at least `k` different ones; all tokens if None.
            k: how many to return.

        Returns:
            Tokens, int64, and their scores, float32, both `[r, k]`, best first; of equal scores the
            lowest id.
        """
        contexts = self._contexts(owners, inputs, position, candidates)
        tokens = torch.cat([context.tokens for context in contexts])
        ends = np.cumsum([len(context.tokens) for context in contexts]).tolist()
        best: list[Tensor | None] = [None] * len(inputs)
        for first in range(0, len(tokens), BATCH):
            ids = tokens[first : first + BATCH]
            spans = [
                _Span(
                    context, max(0, end - len(context.tokens) - first), min(len(ids), end - first)
                )
                for context, end in zip(contexts, ends, strict=True)
                if end > first and end - len(context.tokens) < first + len(ids)
            ]
            self._rank(spans, ids, owners, best, k)
            self.ran(len(ids))
        return unpack(torch.cat([keys for keys in best if keys is not None]))

    def _contexts(
        self, owners: Tensor, inputs: Tensor, position: int, candidates: Tensor | None
    ) -> list["_Context"]:
        """The distinct contexts of one position, by depth, each with its inputs' candidates."""
        rows_of: dict[Tokens, list[int]] = {}
        for row, (*tokens,) in enumerate(inputs.tolist()):
            del tokens[position]
            rows_of.setdefault(tuple(tokens), []).append(row)
        contexts = [
            _Context(
                (*self.start, *others[:position]),
                others[position:],
                rows,
                torch.arange(len(self.table)) if candidates is None else candidates[rows].unique(),
                max(self.features[int(owners[row])].block for row in rows),
            )
            for others, rows in rows_of.items()
        ]
        return sorted(contexts, key=lambda context: context.block)

    def _rank(
        self,
        spans: list["_Span"],
        ids: Tensor,
        owners: Tensor,
        best: list[Tensor | None],
        k: int,
    ) -> None:
        """Run candidates `[b]`, each in its span's context, and update the rows' `k` best keys."""
        device = self.table.device
        place = torch.cat(
            [torch.full((span.end - span.begin,), number) for number, span in enumerate(spans)]
        ).to(device)
        before = torch.tensor([span.context.before for span in spans], device=device)
        after = torch.tensor([span.context.after for span in spans], device=device)
        ids = torch.cat([ids[:, None].to(device), after.long()[place]], dim=1)
        earlier = None
        with self._collecting(spans[-1].context.block) as states:
            if before.shape[1] and caches_keys(self.model):
                cache = DynamicCache()
                forward(self.model, input_ids=before, past_key_values=cache)
                earlier = list(states)
                forward(self.model, input_ids=ids, past_key_values=_chosen(cache, place))
            else:
                forward(self.model, input_ids=torch.cat([before.long()[place], ids], dim=1))
        for number, span in enumerate(spans):
            for row in span.context.rows:
                feature = self.features[int(owners[row])]
                outputs = states[feature.block][span.begin : span.end, :, feature.neuron].float()
                scores = self._scores(outputs)
                if earlier is not None and self.positions == "all":
                    scores = (
                        scores + earlier[feature.block][number, :, feature.neuron].float().sum()
                    )
                keys = pack(scores[None].cpu(), ids[span.begin : span.end, 0].cpu(), str(feature))
                best[row] = merge(best[row], keys, k)

    def gains(self, owners: Tensor, inputs: Tensor) -> Tensor:
        """The first-order change of scores by exchanging a token, up to a constant of the position.

        Args:
            owners: the index of each input's feature `[r]`.
            inputs: token ids `[r, n]`.

        Returns:
            `[r, n, v]`, float32, on the CPU.
        """
        parts = []
        for some, ids in zip(
            owners.split(_GRADIENT_ROWS), inputs.split(_GRADIENT_ROWS), strict=True
        ):
            features = [self.features[owner] for owner in some.tolist()]
            rows = self.table[self.after_start(ids).to(self.table.device)].requires_grad_()
            deepest = max(feature.block for feature in features)
            with frozen(self.model), torch.enable_grad(), self._collecting(deepest) as states:
                forward(self.model, inputs_embeds=rows.to(self.model.dtype))
                outputs = [
                    states[feature.block][row, :, feature.neuron].float()
                    for row, feature in enumerate(features)
                ]
                scores = self._scores(torch.stack([each.to(rows.device) for each in outputs]))
                (gradient,) = torch.autograd.grad(scores.sum(), rows)
            parts.append((gradient[:, len(self.start) :] @ self.table.T).cpu())
            self.ran(GRADIENT_COST * len(ids))
        return torch.cat(parts)

    def _scores(self, activations: Tensor) -> Tensor:
        """Scores `[b]` of activations `[b, s]`."""
        return activations[:, -1] if self.positions == "last" else activations.sum(dim=1)

    def _collecting(self, deepest: int) -> AbstractContextManager[list[Tensor]]:
        """Collects block outputs as deep as `deepest`."""
        return block_outputs(
            self.model, site=self.site, isolated=self.isolated, last=max(1, deepest)
        )


class _Context(NamedTuple):
    """Inputs that differ in one position alone."""

    before: Tokens
    after: Tokens
    rows: list[int]
    """Which inputs they are."""
    tokens: Tensor
    """The candidates `[c]` for the position."""
    block: int
    """The deepest that one of them needs."""


class _Span(NamedTuple):
    """The candidates `[begin, end)` of a batch that are of one context."""

    context: _Context
    begin: int
    end: int


def _chosen(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache with these rows of another, for a pass to append to."""
    layers: list[Any] = cache.layers
    return DynamicCache((layer.keys[rows], layer.values[rows]) for layer in layers)
