"""How well a model predicts text: bits per byte, perplexity, nats and accuracy per token, over strided windows."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Advance, ignore

POSITIONS = 4096
"""Positions in one forward pass, at most, unless a single window is longer; halved where memory
does not have them.
"""


class Encoded(NamedTuple):
    """A text as a model reads it."""

    ids: np.ndarray
    """Token ids `[s]`; the first is not predicted."""
    bytes: int
    """UTF-8 bytes of the text."""
    ends: np.ndarray | None = None
    """Where in the text each predicted token ends, in bytes, `[s-1]`; None where the tokenizer does
    not tell.
    """


class Loss(NamedTuple):
    """What a text cost a model."""

    nats: np.ndarray
    """Per predicted token, in order, float64 `[tokens]`."""
    bytes: int
    hits: np.ndarray | None = None
    """Whether each was the token the model held most likely, bool `[tokens]`; None where that was
    not asked.
    """
    ends: np.ndarray | None = None
    """As in `Encoded`."""

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return len(self.nats)

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return float(self.nats.mean())

    @property
    def perplexity(self) -> float:
        """`exp` of the mean cross-entropy; infinite past the range of a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total bits over bytes of text: comparable between tokenizers, as the others are not."""
        return float(self.nats.sum()) / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float | None:
        """The share of tokens that the model held most likely."""
        return None if self.hits is None else float(self.hits.mean())

    def as_json(self) -> dict[str, float | int | None]:
        """The figures as JSON."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def encode(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> Encoded:
    """Tokenize a text behind BOS (or, without one, EOS), so that every token of the text is predicted.

    Raises FrankenmergeError for a text without two tokens.
    """
    tells_places = bool(tokenizer.is_fast)
    read: Any = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=tells_places
    )
    ids = read["input_ids"]
    start = start_token(tokenizer)
    line = np.array(ids if start is None else [start, *ids], dtype=np.int64)
    if len(line) < 2:
        raise fail(
            place, "a text of at least two tokens", f"{len(ids)} tokens", "give a longer text"
        )
    ends = None
    if tells_places:
        characters = np.array([stop for _, stop in read["offset_mapping"]])[
            len(ids) - len(line) + 1 :
        ]
        ends = _byte_ends(text)[characters]
    return Encoded(line, len(text.encode()), ends)


def start_token(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The id that stands before a text: BOS, or EOS where there is none, or None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _byte_ends(text: str) -> np.ndarray:
    """The UTF-8 bytes before every character, and those of the whole text, `[characters + 1]`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.concatenate(
        [[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))]
    )


def windows(length: int, context: int) -> tuple[int, list[int]]:
    """How long the windows over `length` tokens are, and where they start; see `measure`."""
    width = min(context, length - 1)
    return width, [*range(0, length - 1 - width, max(1, width // 2)), length - 1 - width]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    encoded: Encoded,
    *,
    context: int,
    advance: Advance = ignore,
) -> Loss:
    """Predict every token of a text once.

    Windows of `context` tokens advance by half of it; only tokens that no earlier window predicted
    count, so every token but those of the first window is seen behind at least half a window. The
    last window is moved back to be as long as the others. As many windows pass the model together
    as `POSITIONS` and memory allow. `advance` is called with the number of tokens done since its
    last call.

    Raises:
        FrankenmergeError: when a loss is not a number, or memory has no room for a single window.
    """
    name, ids = model.name_or_path or "model", torch.from_numpy(encoded.ids)
    if (largest := int(ids.max())) >= (size := embedding_of(model).shape[0]):
        raise fail(
            name,
            f"token ids below {size}, its vocabulary",
            str(largest),
            "use the model's own tokenizer",
        )
    width, starts = windows(len(ids), context)
    nats = torch.full((len(ids) - 1,), torch.nan, dtype=torch.float64)
    hits = torch.zeros(len(ids) - 1, dtype=torch.bool)
    size, done = max(1, POSITIONS // width), 0
    while starts:
        group = starts[:size]
        predicted = _tried(model, torch.stack([ids[start : start + width + 1] for start in group]))
        if predicted is None:
            if len(group) == 1:
                raise fail(
                    name,
                    f"memory for a window of {width} tokens",
                    "less",
                    "shorten --context, or give --device auto",
                )
            clear_device_cache(garbage_collection=True)
            size = len(group) // 2
            continue
        before = done
        for start, losses, right in zip(group, *predicted, strict=True):
            nats[done : start + width], hits[done : start + width] = (
                losses[done - start :],
                right[done - start :],
            )
            done = start + width
        advance(done - before)
        starts = starts[len(group) :]
    if not torch.isfinite(nats).all():
        raise fail(
            name, "finite losses", "NaN or infinity", "evaluate in float32, or check the weights"
        )
    return Loss(nats.numpy(), encoded.bytes, hits.numpy(), encoded.ends)


def _tried(model: PreTrainedModel, rows: Tensor) -> Sequence[Tensor] | None:
    """Nats float64 and hits bool `[b, s-1]` of windows `[b, s]`; None where memory has no room for as many."""
    try:
        logits = model(input_ids=rows[:, :-1].to(model.device), use_cache=False).logits.float()
        targets = rows[:, 1:].to(logits.device)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        ).view(targets.shape)
        return losses.double().cpu(), (logits.argmax(dim=-1) == targets).cpu()
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            return None
        raise
