"""How well a model predicts text: bits per byte, perplexity, nats per token and accuracy."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Advance, ignore

POSITIONS = 4096
"""Most positions in one forward pass, unless a window is longer; halved if memory is short."""


class Encoded(NamedTuple):
    """A text as a model reads it."""

    ids: np.ndarray
    """Token ids `[s]`; the first is not predicted."""
    bytes: int
    """UTF-8 bytes of the text."""
    ends: np.ndarray | None = None
    """Byte offset where each predicted token ends, `[s-1]`; None if the tokenizer has none."""


class Loss(NamedTuple):
    """The losses of a model on a text."""

    nats: np.ndarray
    """Per predicted token, in order, float64 `[tokens]`."""
    bytes: int
    hits: np.ndarray | None = None
    """Whether each token was the likeliest one, bool `[tokens]`; None if that was not measured."""
    ends: np.ndarray | None = None
    """As in `Encoded`."""

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
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
        """Total bits over bytes of text: unlike the others comparable between tokenizers."""
        return float(self.nats.sum()) / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float | None:
        """The share of tokens that were the likeliest one."""
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
    """Tokenize a text after BOS (or EOS without BOS), so that every token of it is predicted.

    Raises FrankenmergeError for fewer than two tokens, including BOS.
    """
    has_offsets = bool(tokenizer.is_fast)
    encoding: Any = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=has_offsets
    )
    ids = encoding["input_ids"]
    start = start_token(tokenizer)
    line = np.array(ids if start is None else [start, *ids], dtype=np.int64)
    if len(line) < 2:
        raise fail(
            place, "a text of at least two tokens", f"{len(ids)} tokens", "give a longer text"
        )
    ends = None
    if has_offsets:
        characters = np.array([stop for _, stop in encoding["offset_mapping"]])[
            len(ids) - len(line) + 1 :
        ]
        ends = _byte_ends(text)[characters]
    return Encoded(line, len(text.encode()), ends)


def start_token(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The id that precedes a text: BOS, or EOS if there is no BOS, or None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _byte_ends(text: str) -> np.ndarray:
    """The UTF-8 bytes before every character, and those of the whole text, `[characters + 1]`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.concatenate(
        [[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))]
    )


def windows(length: int, context: int) -> tuple[int, list[int]]:
    """Width and starts of the windows over `length` tokens; see `measure`."""
    width = min(context, length - 1)
    return width, [*range(0, length - 1 - width, max(1, width // 2)), length - 1 - width]


def measure(
    model: PreTrainedModel,
    encoded: Encoded,
    *,
    context: int,
    advance: Advance = ignore,
) -> Loss:
    """Predict every token of a text once.

    Windows of `context` tokens advance by half of it; only tokens that no earlier window predicted
    count, so every token after the first window has at least half a window of context. The last
    window is moved back to be as long as the others. `advance` is called with
    the number of tokens done since its last call.

    Raises:
        FrankenmergeError: for a loss that is not finite, or too little memory for a single window.
    """
    ids = torch.from_numpy(encoded.ids)
    width, starts = windows(len(ids), context)
    nats = torch.full((len(ids) - 1,), torch.nan, dtype=torch.float64)
    hits, done = torch.zeros(len(ids) - 1, dtype=torch.bool), 0
    remaining = iter(starts)
    for batch in predictions(model, [ids[start : start + width + 1] for start in starts]):
        before = done
        for losses, right in zip(*batch, strict=True):
            start = next(remaining)
            nats[done : start + width], hits[done : start + width] = (
                losses[done - start :],
                right[done - start :],
            )
            done = start + width
        advance(done - before)
    check_finite(model, nats)
    return Loss(nats.numpy(), encoded.bytes, hits.numpy(), encoded.ends)


@torch.no_grad()
def predictions(model: PreTrainedModel, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict rows of token ids, each `[s]`, after their first token, in batches.

    Yields nats float64 and hits bool, `[b, s-1]`, for the next `b` rows. Shorter rows of a batch
    are padded on the right: what is predicted there means nothing. A batch has as many rows as
    `POSITIONS` and memory allow.

    Raises:
        FrankenmergeError: for ids that the model lacks, or too little memory for a single row.
    """
    size = embedding_of(model).shape[0]
    if (largest := max((int(row.max()) for row in rows), default=0)) >= size:
        expected = f"token ids below {size}, its vocabulary"
        raise fail(_name(model), expected, str(largest), "use the model's own tokenizer")
    positions = POSITIONS
    while rows:
        width = max(1, len(rows[0]) - 1)
        group = rows[: max(1, positions // width)]
        predicted = _batch_losses(model, pad_sequence(list(group), batch_first=True))
        if predicted is not None:
            yield predicted
            rows = rows[len(group) :]
        elif len(group) > 1:
            clear_device_cache(garbage_collection=True)
            positions = len(group) // 2 * width
        else:
            raise fail(
                _name(model),
                f"memory for a window of {width} tokens",
                "less",
                "use a shorter --context, or --device auto",
            )


def check_finite(model: PreTrainedModel, nats: Tensor) -> None:
    """Raise FrankenmergeError for losses that are not finite."""
    if not torch.isfinite(nats).all():
        remedy = "evaluate in float32, or check the weights"
        raise fail(_name(model), "finite losses", "NaN or infinity", remedy)


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or "model"


def _batch_losses(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Nats float64 and hits bool `[b, s-1]` of windows `[b, s]`; None if memory is too small."""
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
