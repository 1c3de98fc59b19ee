"""Greedy search: build an input left to right, each time adding the best token for a feature.

For block `l` and neuron `f`, `a_n = argmax_a O^l_{f,n}(a | a_{0:n-1})` over all tokens `a`, N times
(the source document, see docs/method.md, "Greedy Search Features"). Features whose inputs have the
same prefix share their passes: the vocabulary runs once after every distinct prefix, whose keys and
values are computed once, and no deeper than the deepest block that one of them needs.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from frankenmerge.analysis.features import Feature, check_features, check_single
from frankenmerge.analysis.ranking import merge, pack, unpack
from frankenmerge.errors import Fault, raise_all
from frankenmerge.models.hooks import Site, block_outputs, blocks_of, embedding_of, forward
from frankenmerge.models.passes import ROWS, caches_keys
from frankenmerge.progress import Advance, ignore

Positions = Literal["last", "all"]
Tokens = tuple[int, ...]

BATCH = 1024
SCREEN_DEPTH = 4
"""The screen runs one in this many of a feature's blocks: an input with a high activation there
mostly has one later.
"""
RECALL_SAMPLE = 8
"""Number of features searched exactly to measure the recall of the screen."""
WHY_SINGLE = (
    "use gradient or softmax-prior: this search chooses a token by one neuron at its position"
)


@dataclass(frozen=True)
class GreedyResult:
    """The inputs that a greedy search found, in the order of the features, and what it ran."""

    tokens: np.ndarray
    """Token ids `[features, n]`, int32, without `start`."""
    values: np.ndarray
    """The feature's activation at each of these tokens `[features, n]`, float32."""
    prefixes: tuple[int, ...]
    """How many distinct prefixes were continued at each of the `n` steps."""
    passes: int
    """Passes of the whole vocabulary to the features' full depth: the sum of `prefixes`; with
    `candidates` the first alone, and one for the screen.
    """
    recall: float | None
    """With `candidates`: of the steps after prefixes that an exact search reaches too, the share
    with the same token. The first step, which is not screened, is left out. Measured on a sample of
    the features; None for an exact search.
    """


class _Path(NamedTuple):
    """An input under way: its tokens, and the score of the last one."""

    tokens: Tokens
    score: float


class _Screen(NamedTuple):
    """How candidates are chosen, in addition to their activations early in the model."""

    count: int
    """Number of candidates for each feature."""
    first: Tensor
    """The best first tokens of each feature, `[features, count // 2]`."""


@torch.no_grad()
def greedy_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    *,
    n: int = 4,
    site: Site = "block",
    isolated: bool = False,
    positions: Positions = "last",
    beam: int = 1,
    candidates: int | None = None,
    start: Tokens = (),
    advance: Advance = ignore,
) -> GreedyResult:
    """Build for each feature an input of `n` tokens with a high activation.

    Args:
        model: the donor; activations are compared in float32.
        features: any number of them, each one neuron of any block; the more of them share their
            prefixes, the less each costs.
        n: how many tokens to find.
        site: `block` for the residual stream after the block, `attention` for the output of its
            attention.
        isolated: whether every block is fed the embedding instead of its predecessor's output.
        positions: the score of a token: the feature at the `last` position, or its sum over `all`,
            including those of `start`. The prefix's part of the sum is the same for every token, so
            that both choose the same token unless rounding makes a tie.
        beam: how many inputs to continue at each step, those with the best score; 1 is the greedy
            search.
        candidates: from the second token on, try only this many for each feature (features with the
            same prefix share theirs): half of them are its best first tokens, the others the best
            at a quarter of its depth. None tries all tokens.
        start: tokens put before the searched ones, such as BOS.
        advance: called with the number of inputs run since its last call.

    Raises:
        FrankenmergeError: for features, tokens or lengths that the donor does not have, or
            activations that are not finite.
    """
    counts = {"n": n, "beam": beam, "candidates": 1 if candidates is None else candidates}
    check_search(model, features, n, counts, start)
    runs = _Runs(model, site, isolated, positions, advance)
    tokens, prefixes = _search(runs, features, n, beam, candidates, start)
    recall = None
    if candidates and n > 1:
        sample = np.unique(np.linspace(0, len(features) - 1, RECALL_SAMPLE).round().astype(int))
        exact, _ = _search(runs, [features[row] for row in sample], n, beam, None, start)
        recall = _shared_steps(tokens[sample], exact)
    passes = 2 if candidates else sum(prefixes)
    begun = torch.tensor(start, dtype=torch.long).expand(len(features), -1)
    whole = torch.cat([begun, torch.from_numpy(tokens)], dim=1)
    values = own_activations(model, features, whole, site=site, isolated=isolated)[:, len(start) :]
    return GreedyResult(tokens.astype(np.int32), values.numpy(), prefixes, passes, recall)


def _search(
    runs: "_Runs",
    features: Sequence[Feature],
    n: int,
    beam: int,
    candidates: int | None,
    start: Tokens,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Tokens `[features, n]`, int64, and the number of distinct prefixes at each step."""
    paths = [[_Path(start, 0.0)] for _ in features]
    screen = (
        None
        if candidates is None
        else _Screen(candidates, runs.best(start, features, runs.vocabulary, candidates // 2)[0])
    )
    prefixes = []
    for step in range(n):
        followers = _followers(paths)
        prefixes.append(len(followers))
        paths = _grown(runs, features, followers, beam, screen if step else None)
    return np.array([own[0].tokens[len(start) :] for own in paths], dtype=np.int64), tuple(prefixes)


def _followers(paths: list[list[_Path]]) -> dict[Tokens, list[int]]:
    """The distinct prefixes, each with the rows of the features that continue it."""
    followers: dict[Tokens, list[int]] = {}
    for row, own in enumerate(paths):
        for path in own:
            followers.setdefault(path.tokens, []).append(row)
    return followers


def _grown(
    runs: "_Runs",
    features: Sequence[Feature],
    followers: dict[Tokens, list[int]],
    beam: int,
    screen: _Screen | None,
) -> list[list[_Path]]:
    """The `beam` best inputs of each feature with one more token, best first; ties by lowest id."""
    grown: list[list[_Path]] = [[] for _ in features]
    for prefix, rows in followers.items():
        own = [features[row] for row in rows]
        pool = runs.vocabulary if screen is None else _pool(runs, screen, prefix, own, rows)
        tokens, scores = runs.best(prefix, own, pool, beam)
        for row, ids, values in zip(rows, tokens.tolist(), scores.tolist(), strict=True):
            grown[row] += [
                _Path((*prefix, token), score) for token, score in zip(ids, values, strict=True)
            ]
    return [sorted(own, key=lambda path: (-path.score, path.tokens))[:beam] for own in grown]


def _pool(
    runs: "_Runs", screen: _Screen, prefix: Tokens, features: Sequence[Feature], rows: list[int]
) -> Tensor:
    """The candidates of `features`, at `rows`, after `prefix`: distinct ids, ascending."""
    early = [
        Feature.of(math.ceil(feature.block / SCREEN_DEPTH), feature.neuron) for feature in features
    ]
    fitting, _ = runs.best(prefix, early, runs.vocabulary, screen.count - screen.first.shape[1])
    return (
        torch.cat([fitting.flatten(), screen.first[rows].flatten()])
        .unique()
        .to(runs.vocabulary.device)
    )


def _shared_steps(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the same tokens in both `[features, n]`, of later steps with the same prefix."""
    same = np.cumprod(found == exact, axis=1)
    return float(same[:, 1:].sum() / same[:, :-1].sum())


@dataclass(frozen=True)
class _Runs:
    """Runs the model with the same settings throughout a search."""

    model: PreTrainedModel
    site: Site
    isolated: bool
    positions: Positions
    advance: Advance

    @property
    def vocabulary(self) -> Tensor:
        """Every token id `[v]`."""
        weight = embedding_of(self.model)
        return torch.arange(weight.shape[0], device=weight.device)

    def best(
        self, prefix: Tokens, features: Sequence[Feature], candidates: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """The `k` candidates with the largest score after `prefix`, for each feature.

        Returns:
            Tokens, int64, and scores, float32, both `[features, k]`, best first; of equal scores
            the lowest id.
        """
        best: Tensor | None = None
        with self._collecting(features) as states:
            cache, earlier = self._begin(prefix, features, states)
            size = min(BATCH, math.ceil(len(candidates) / ROWS) * ROWS)
            for tokens in candidates.split(BATCH):
                rows = pad(tokens, (0, size - len(tokens)))
                if cache is None:
                    before = rows.new_tensor(prefix).expand(len(rows), -1)
                    forward(self.model, input_ids=torch.cat([before, rows[:, None]], dim=1))
                else:
                    held = _expanded(cache, len(rows))
                    forward(self.model, input_ids=rows[:, None], past_key_values=held)
                scores = earlier + _activations(states, features)[:, : len(tokens), -1]
                best = merge(best, pack(scores, tokens, f"the tokens {prefix} and one more"), k)
                self.advance(len(tokens))
        assert best is not None
        return unpack(best.cpu())

    def _begin(
        self, prefix: Tokens, features: Sequence[Feature], states: list[Tensor]
    ) -> tuple[DynamicCache | None, Tensor | float]:
        """The keys and values of a prefix, and its part of the scores, `[features, 1]`.

        The cache is None if the prefix must be run with every token.
        """
        if not prefix:
            return None, 0.0
        cache = DynamicCache() if caches_keys(self.model) else None
        forward(
            self.model,
            input_ids=torch.tensor([prefix], device=embedding_of(self.model).device),
            **({} if cache is None else {"past_key_values": cache}),
        )
        return cache, _activations(states, features).sum(2) if self.positions == "all" else 0.0

    def _collecting(self, features: Sequence[Feature]) -> AbstractContextManager[list[Tensor]]:
        """Collects block outputs as deep as the deepest feature."""
        deepest = max(feature.block for feature in features)
        return block_outputs(
            self.model, site=self.site, isolated=self.isolated, last=max(1, deepest)
        )


def _activations(states: list[Tensor], features: Sequence[Feature]) -> Tensor:
    """Features of block outputs: `[features, b, s]`, float32."""
    return torch.stack(
        [states[feature.block][..., feature.neuron].to(states[0].device) for feature in features]
    ).float()


def _expanded(cache: DynamicCache, size: int) -> DynamicCache:
    """A copy of a cache of batch 1 with batch `size`, for a pass to append to."""
    layers: list[Any] = cache.layers
    return DynamicCache(
        (layer.keys.expand(size, -1, -1, -1), layer.values.expand(size, -1, -1, -1))
        for layer in layers
    )


@torch.no_grad()
def own_activations(
    model: PreTrainedModel,
    features: Sequence[Feature],
    inputs: Tensor,
    *,
    site: Site = "block",
    isolated: bool = False,
) -> Tensor:
    """Each feature's activations on its own input: both `[features, s]`, float32."""
    parts = []
    deepest = max(feature.block for feature in features)
    with block_outputs(model, site=site, isolated=isolated, last=max(1, deepest)) as states:
        for first in range(0, len(features), BATCH):
            rows = inputs[first : first + BATCH]
            forward(model, input_ids=rows.to(embedding_of(model).device))
            parts += [
                states[feature.block][row, :, feature.neuron].float().cpu()
                for row, feature in enumerate(features[first : first + BATCH])
            ]
    return torch.stack(parts)


def check_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    n: int,
    counts: Mapping[str, int],
    start: Tokens,
) -> None:
    """Check what a search of inputs of `n` tokens after `start` is asked for.

    `counts` are further numbers of at least 1, by name. Raises FrankenmergeError with every fault.
    """
    vocabulary, width = embedding_of(model).shape
    check_features(features, blocks=len(blocks_of(model)), width=width, tokens=max(n, 1))
    check_single(features, WHY_SINGLE)
    faults = [
        Fault(name, "at least 1", str(count), "ask for more")
        for name, count in counts.items()
        if count < 1
    ]
    if unknown := [token for token in start if not 0 <= token < vocabulary]:
        faults.append(
            Fault(
                "start",
                f"token ids in 0..{vocabulary - 1}",
                str(unknown),
                "use the donor's own tokens",
            )
        )
    longest = model.config.max_position_embeddings
    if len(start) + n > longest:
        faults.append(
            Fault(
                "start and n",
                f"at most {longest} tokens in all",
                str(len(start) + n),
                "ask for fewer tokens",
            )
        )
    raise_all(faults)
