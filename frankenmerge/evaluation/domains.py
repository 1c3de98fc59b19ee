"""Domains: tokens on which models are compared, in rows that share no context.

A domain is a text, what one donor generated, or a task of multiple choice. Its rows belong to
units, which are independent of each other: they are dealt to the parts of a split as wholes, and
resampled as wholes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from frankenmerge.evaluation.items import ItemRows
from frankenmerge.evaluation.language import POSITIONS, Encoded, windows
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.sampling import sample_unprompted

ROWS, LENGTH = 96, 128
"""Rows and tokens that each donor generates."""
FEWEST_UNITS, LONGEST_UNIT = 48, 8
"""A text has so many units where it has as many rows; a unit has at most so many rows."""
TARGET_BYTES = 2 << 30
"""Most memory for the probabilities with which a donor generated its rows."""
MOST_ROWS = 512
"""Rows of a text that are used: of a longer one, evenly spaced pieces."""


class Domain(NamedTuple):
    """Tokens to be predicted."""

    name: str
    ids: Tensor
    """Token ids `[n, s]`; the first of a row is not predicted."""
    counted: Tensor
    """Which of the predicted tokens count, bool `[n, s-1]`."""
    units: np.ndarray
    """The unit of every row, `[n]`: 0, 1 and so on."""
    target: Tensor | None = None
    """The probabilities of the model that generated the rows, `[n, s-1, v]`."""
    right: np.ndarray | None = None
    """Of a task, whose units are items and whose rows are their choices: the right ones, `[n]`."""
    positions: int | None = None
    """Most positions in one forward pass; None for `POSITIONS`."""

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.max()) + 1

    def batches(self) -> list["Domain"]:
        """Its rows in batches of at most so many positions."""
        rows = max(1, (self.positions or POSITIONS) // self.ids.shape[1])
        starts = range(0, len(self.ids), rows)
        return [self.of_rows(slice(start, start + rows)) for start in starts]

    def of_units(self, chosen: np.ndarray) -> "Domain":
        """Those rows whose unit is chosen, with units renumbered."""
        number = np.full(self.size, -1)
        number[chosen] = np.arange(len(chosen))
        made = self.of_rows(np.flatnonzero(number[self.units] >= 0))
        return made._replace(units=number[made.units])

    def of_rows(self, rows: np.ndarray | slice) -> "Domain":
        """Some of its rows; those of a slice share its memory."""
        target = None if self.target is None else self.target[rows]
        right = None if self.right is None else self.right[rows]
        ids, counted = self.ids[rows], self.counted[rows]
        return Domain(self.name, ids, counted, self.units[rows], target, right, self.positions)

    def nats(self, logits: Tensor) -> Tensor:
        """The loss of every predicted token `[n, s-1]`, 0 where it does not count.

        On generated tokens it is the expected loss, the cross-entropy with the probabilities of the
        model that generated them, which the token that was drawn would only estimate.
        """
        predicted = logits[:, :-1].float().log_softmax(-1)
        if self.target is None:
            chosen = self.ids[:, 1:, None].to(predicted.device)
            losses = -predicted.gather(-1, chosen).squeeze(-1)
        else:
            losses = -(self.target.to(predicted.device) * predicted).sum(-1)
        return losses * self.counted.to(predicted.device)

    def losses(self, nats: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every unit, and what it counts for, each `[u]`, of losses `[n, s-1]`.

        A unit of text counts for its tokens. An item of a task counts for 1: its loss is minus the
        logarithm of the right choice's share of the choices' probabilities.
        """
        units = torch.from_numpy(self.units).to(nats.device)
        zeros = nats.new_zeros(self.size)
        rows = nats.sum(1)
        if self.right is None:
            tokens = self.counted.sum(1).to(rows)
            return zeros.index_add(0, units, rows), zeros.index_add(0, units, tokens)
        least = (zeros + torch.inf).scatter_reduce(0, units, rows.detach(), "amin")
        total = zeros.index_add(0, units, (least[units] - rows).exp())
        right = torch.from_numpy(self.right).to(rows)
        return total.log() - least + zeros.index_add(0, units, right * rows), zeros + 1

    def sums(self, nats: np.ndarray) -> np.ndarray:
        """Nats, weight and right answers of every unit, `[3, u]`, of losses `[n, s-1]`."""
        losses, weights = (each.numpy() for each in self.losses(torch.from_numpy(nats)))
        return np.stack([losses, weights, self._answered(nats)])

    def _answered(self, nats: np.ndarray) -> np.ndarray:
        """Whether the right choice of each item is the likeliest, `[u]`; 0 for texts."""
        answered = np.zeros(self.size)
        if self.right is not None:
            rows = nats.sum(1)
            likeliest = np.lexsort((rows, self.units))
            first = likeliest[np.unique(self.units[likeliest], return_index=True)[1]]
            answered[self.units[first]] = self.right[first]
        return answered


def task_domain(name: str, rows: ItemRows) -> Domain:
    """The items of a multiple-choice task; each is a unit."""
    starts = np.searchsorted(rows.items, np.arange(len(rows.answers)))
    right = np.zeros(len(rows.items), dtype=bool)
    right[starts + rows.answers] = True
    ids, counted = torch.from_numpy(rows.ids), torch.from_numpy(rows.counted)
    return Domain(name, ids, counted, rows.items, right=right)


def text_domain(
    name: str,
    documents: np.ndarray | Sequence[np.ndarray | Encoded],
    start: int | None,
    context: int,
) -> Domain:
    """Cut a text into rows of `context` tokens; at most `MOST_ROWS`.

    Neither rows nor units cross documents. Rows of plain text follow each other, each after the
    token `start`. A conversation is cut into windows as `measure` has them: what is answered is
    read with what was asked, as far as a row is long.

    Args:
        name: of the text.
        documents: the token ids of each document, without `start`, or a conversation as the model
            reads it; an array is a single document.
        start: what precedes a text for the model, if anything.
        context: tokens in a row, `start` among them.
    """
    documents = [documents] if isinstance(documents, np.ndarray) else documents
    rows = [
        (number, row)
        for number, document in enumerate(documents)
        for row in (
            _plain_rows(document, start, context)
            if isinstance(document, np.ndarray)
            else _chat_rows(document, context)
        )
    ]
    if len(rows) > MOST_ROWS:
        pieces, length = MOST_ROWS // LONGEST_UNIT, LONGEST_UNIT
        begins = np.linspace(0, len(rows) - length, pieces).astype(int)
        rows = [row for begin in begins for row in rows[begin : begin + length]]
    made = pad_sequence([row.ids for _, row in rows], batch_first=True)
    counted = pad_sequence([row.counted for _, row in rows], batch_first=True)
    unit = int(np.clip(len(rows) // FEWEST_UNITS, 1, LONGEST_UNIT))
    pairs = [(number, place // unit) for place, (number, _) in enumerate(rows)]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    return Domain(name, made, counted, np.array([numbers[pair] for pair in pairs]))


class _Row(NamedTuple):
    """Tokens `[s]`, and which of those after the first count, bool `[s-1]`."""

    ids: Tensor
    counted: Tensor


def _plain_rows(ids: np.ndarray, start: int | None, context: int) -> Iterator[_Row]:
    first = [] if start is None else [start]
    taken = context - len(first)
    for begin in range(0, len(ids), taken):
        row = torch.tensor([*first, *ids[begin : begin + taken]])
        if len(row) > 1:
            yield _Row(row, torch.ones(len(row) - 1, dtype=torch.bool))


def _chat_rows(chat: Encoded, context: int) -> Iterator[_Row]:
    """The windows of a conversation in which something counts, in its order."""
    for window in sorted(windows(chat, context - 1)):
        counted = torch.ones(chat.predicted, dtype=torch.bool)
        if chat.counted is not None:
            counted = torch.from_numpy(chat.counted)
        own = torch.zeros(window.width, dtype=torch.bool)
        own[window.width - window.kept :] = counted[window.place : window.place + window.kept]
        if own.any():
            stop = window.start + window.width + 1
            yield _Row(torch.from_numpy(chat.ids[window.start : stop]), own)


def sampled_domain(name: str, model: PreTrainedModel, seed: int, rows: int = ROWS) -> Domain:
    """What a model generates by itself, rows of `LENGTH` tokens, with its probabilities."""
    return with_target(generated(name, sample_unprompted(model, rows, LENGTH, seed)), model)


def generated(name: str, ids: Tensor) -> Domain:
    """Rows that a model has generated, `[n, s]`; each is a unit."""
    counted = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    return Domain(name, ids, counted, np.arange(len(ids)))


@torch.no_grad()
def with_target(domain: Domain, model: PreTrainedModel) -> Domain:
    """The same with the probabilities by which the model has generated it.

    Where those of all tokens of the vocabulary take more than `TARGET_BYTES`, the tokens that were
    drawn count instead.
    """
    if domain.counted.numel() * embedding_of(model).shape[0] * 4 > TARGET_BYTES:
        return domain
    parts = [
        model(input_ids=batch.ids.to(model.device), use_cache=False).logits[:, :-1]
        for batch in domain.batches()
    ]
    return domain._replace(target=torch.cat([part.float().softmax(-1).cpu() for part in parts]))


def split(domains: Sequence[Domain], parts: int) -> list[list[Domain]]:
    """Deal the units of every domain to `parts` disjoint sets of domains, one after the other."""
    return [
        [domain.of_units(np.arange(part, domain.size, parts)) for domain in domains]
        for part in range(parts)
    ]


def stages(domains: Sequence[Domain], shares: Sequence[float]) -> Iterator[list[Domain]]:
    """Cut every domain into disjoint pieces, each with its share of the units, evenly spaced."""
    places = [_spread(domain.size) for domain in domains]
    edges = np.concatenate([[0], np.cumsum(shares)])
    for low, high in zip(edges, edges[1:], strict=False):
        yield [
            domain.of_units(np.sort(place[round(low * domain.size) : round(high * domain.size)]))
            for domain, place in zip(domains, places, strict=True)
        ]


def _spread(count: int) -> np.ndarray:
    """The numbers below `count` in an order of which every beginning is evenly spaced."""
    return np.argsort(np.arange(count) * ((1 + 5**0.5) / 2) % 1, kind="stable")
