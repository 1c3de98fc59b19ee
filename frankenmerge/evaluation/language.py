"""How well a model predicts text: bits per byte, perplexity, nats per token, over strided windows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.models import embedding_of

POSITIONS = 4096
"""Positions in one forward pass, at most, unless a single window is longer."""


class Encoded(NamedTuple):
    """A text as a model reads it."""

    ids: np.ndarray
    """Token ids `[s]`; the first is not predicted."""
    bytes: int
    """UTF-8 bytes of the text."""


class Loss(NamedTuple):
    """What a text cost a model."""

    nats: np.ndarray
    """Per predicted token, in order, float64 `[tokens]`."""
    bytes: int

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

    def as_json(self) -> dict[str, float | int]:
        """The figures as JSON."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def encode(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> Encoded:
    """Tokenize a text behind BOS (or, without one, EOS), so that every token of the text is predicted.

    Raises FrankenmergeError for a text without two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    line = np.array(ids if start is None else [start, *ids], dtype=np.int64)
    if len(line) < 2:
        raise fail(place, "a text of at least two tokens", f"{len(ids)} tokens", "give a longer text")
    return Encoded(line, len(text.encode()))


def windows(length: int, context: int) -> tuple[int, list[int]]:
    """How long the windows over `length` tokens are, and where they start; see `measure`."""
    width = min(context, length - 1)
    return width, [*range(0, length - 1 - width, max(1, width // 2)), length - 1 - width]


@torch.no_grad()
def measure(model: PreTrainedModel, encoded: Encoded, *, context: int, progress: Callable[[int], None] = lambda _: None) -> Loss:
    """Predict every token of a text once.

    Windows of `context` tokens advance by half of it; only tokens that no earlier window predicted count, so every token
    but those of the first window is seen behind at least half a window. The last window is moved back to be as long as
    the others. `progress` is called with the number of tokens done since its last call.

    Raises:
        FrankenmergeError: when a loss is not a number.
    """
    ids = torch.from_numpy(encoded.ids)
    if (largest := int(ids.max())) >= (size := embedding_of(model).shape[0]):
        raise fail(model.name_or_path or "model", f"token ids below {size}, its vocabulary", str(largest), "use the model's own tokenizer")
    width, starts = windows(len(ids), context)
    nats = torch.full((len(ids) - 1,), torch.nan, dtype=torch.float64)
    size = max(1, POSITIONS // width)
    done = 0
    for first in range(0, len(starts), size):
        group = starts[first : first + size]
        rows = torch.stack([ids[start : start + width + 1] for start in group])
        logits = model(input_ids=rows[:, :-1].to(model.device), use_cache=False).logits.float()
        losses = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten().to(logits.device), reduction="none")
        for start, row in zip(group, losses.view(len(group), width).double().cpu(), strict=True):
            nats[done : start + width] = row[done - start :]
            progress(start + width - done)
            done = start + width
    if not torch.isfinite(nats).all():
        raise fail(model.name_or_path or "model", "finite losses", "NaN or infinity", "evaluate in float32, or check the weights")
    return Loss(nats.numpy(), encoded.bytes)
