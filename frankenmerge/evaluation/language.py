"""How well a model predicts text: bits per byte, perplexity, nats per token and accuracy."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.evaluation.chats import chat_tokens
from frankenmerge.evaluation.documents import Document, Text, predicted_text, text_of
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Advance, ignore

POSITIONS = 4096
"""Most positions in one forward pass, unless a window is longer; halved if memory is short."""
LOGITS_BYTES = 1 << 29
"""Most memory for the logits of one pass, in float32: of large vocabularies fewer positions."""

PARTS = 16
"""Parts of a window whose losses are compared."""


class Encoded(NamedTuple):
    """A text as a model reads it."""

    ids: np.ndarray
    """Token ids `[s]`; the first is not predicted."""
    bytes: int
    """UTF-8 bytes of the text that is predicted."""
    ends: np.ndarray | None = None
    """Byte offset where each token that counts ends, `[tokens]`; None if the tokenizer has none."""
    starts: tuple[int, ...] = (0,)
    """Where documents begin in `ids`; their first tokens are not predicted."""
    bounds: np.ndarray | None = None
    """Byte offsets where documents begin, and the last ends, `[documents + 1]`; None for one."""
    counted: np.ndarray | None = None
    """Which of the predicted tokens count, bool `[s - documents]`; None for all."""

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return len(self.ids) - len(self.starts)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens that count."""
        return self.predicted if self.counted is None else int(self.counted.sum())


class Window(NamedTuple):
    """Tokens of a document that are read at once."""

    start: int
    """Its first token, in the ids of a text."""
    width: int
    """Number of predicted tokens: it has `width + 1` ids."""
    kept: int
    """How many of them count, at its end."""
    place: int
    """The number of the first that counts, among the text's predicted tokens."""

    @property
    def whole(self) -> bool:
        """Whether all of its predictions count."""
        return self.kept == self.width


class Loss(NamedTuple):
    """The losses of a model on a text."""

    nats: np.ndarray
    """Per predicted token, in order, float64 `[tokens]`."""
    bytes: int
    hits: np.ndarray | None = None
    """Whether each token was the likeliest one, bool `[tokens]`; None if that was not measured."""
    ends: np.ndarray | None = None
    """As in `Encoded`."""
    bounds: np.ndarray | None = None
    """As in `Encoded`."""
    by_position: np.ndarray | None = None
    """Mean loss in `PARTS` equal parts of each window of full length, `[windows, PARTS]`."""

    @property
    def documents(self) -> int:
        """Number of documents, which share no context."""
        return 1 if self.bounds is None else len(self.bounds) - 1

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
    return encode_text(tokenizer, Text(place, text))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoded:
    """Tokenize the documents of a text: each after BOS, or through the model's chat template.

    Raises FrankenmergeError where no token is predicted, and for a conversation that has no
    template.
    """
    documents = encode_documents(tokenizer, text)
    encoded = documents[0] if len(documents) == 1 else concatenated(documents)
    if encoded.predicted < 1:
        found = f"{len(encoded.ids)} tokens"
        raise fail(text.name, "a text of at least two tokens", found, "give a longer text")
    return encoded


def encode_documents(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[Encoded]:
    """Tokenize the documents of a text one by one.

    Raises FrankenmergeError for a document without tokens, unless it is the only one.
    """
    found = list(_encoded_documents(tokenizer, text))
    for number, each in enumerate(found, 1):
        if len(found) > 1 and not len(each.ids):
            place = f"{text.name}, document {number}"
            raise fail(place, "a document with tokens", "none", "leave it out")
    return found


def limited(tokenizer: PreTrainedTokenizerBase, text: Text, tokens: int) -> Text:
    """The beginning of a text: documents of at most so many predicted tokens, the last one cut.

    A conversation is not cut: it ends the text where it does not fit.

    Raises FrankenmergeError for a tokenizer that does not know where its tokens end, and for a
    first conversation that does not fit.
    """
    kept: list[Document] = []
    pairs = zip(text.documents, _encoded_documents(tokenizer, text), strict=True)
    for document, encoded in pairs:
        if encoded.tokens <= tokens:
            kept.append(document)
            tokens -= encoded.tokens
            continue
        if isinstance(document, str) and tokens:
            if encoded.ends is None:
                expected, found = "a fast tokenizer", "one that has no offsets"
                raise fail(f"--tokens on {text.name}", expected, found, "leave it out")
            part = document.encode()[: int(encoded.ends[tokens - 1])].decode()
            kept += [part] if part.strip() else []
        if kept:
            return text_of(text.name, kept)
        place, found = f"--tokens on {text.name}", f"{encoded.tokens} tokens"
        raise fail(place, f"a first document of at most {tokens} tokens", found, "allow more")
    return text


def concatenated(documents: Sequence[Encoded]) -> Encoded:
    """One text of documents that were encoded one by one."""
    bounds = np.cumsum([0, *(each.bytes for each in documents)])
    starts = np.cumsum([0, *(len(each.ids) for each in documents)])
    ends = [first + _own_ends(each) for first, each in zip(bounds, documents, strict=False)]
    counted = None
    if any(each.counted is not None for each in documents):
        counted = np.concatenate([_counted(each) for each in documents])
    return Encoded(
        np.concatenate([each.ids for each in documents]),
        int(bounds[-1]),
        np.concatenate(ends),
        tuple(starts[:-1].tolist()),
        bounds,
        counted,
    )


def _counted(document: Encoded) -> np.ndarray:
    """Which of a document's predicted tokens count, bool `[s-1]`."""
    every = np.ones(document.predicted, dtype=bool)
    return every if document.counted is None else document.counted


def _own_ends(document: Encoded) -> np.ndarray:
    """Where the tokens of a document end, all in its own bytes; equally long if not known."""
    if document.ends is None:
        return np.linspace(0, document.bytes, document.tokens + 1)[1:]
    return np.maximum(document.ends, 1)


def _encoded_documents(tokenizer: PreTrainedTokenizerBase, text: Text) -> Iterator[Encoded]:
    for number, document in enumerate(text.documents, 1):
        if isinstance(document, str):
            yield _encoded_string(tokenizer, document)
        else:
            ids, mask = chat_tokens(tokenizer, document, f"{text.name}, document {number}")
            size = len(predicted_text(document).encode())
            yield Encoded(ids, size, counted=mask[1:])


def _encoded_string(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    has_offsets = bool(tokenizer.is_fast)
    encoding: Any = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=has_offsets
    )
    ids = encoding["input_ids"]
    start = start_token(tokenizer)
    line = np.array(ids if start is None else [start, *ids], dtype=np.int64)
    ends = None
    if has_offsets and len(line):
        characters = np.array([stop for _, stop in encoding["offset_mapping"]], dtype=np.int64)
        ends = _byte_ends(text)[characters[len(ids) - len(line) + 1 :]]
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


def windows(encoded: Encoded, context: int) -> list[Window]:
    """The windows over the documents of a text, the longest first; see `measure`."""
    made = []
    edges = [*encoded.starts, len(encoded.ids)]
    for number, (begin, end) in enumerate(pairwise(edges)):
        last = end - begin - 1
        width = min(context, last)
        offsets = [*range(0, last - width, max(1, width // 2)), last - width] if width else []
        before = 0
        for offset in offsets:
            kept = offset + width - before
            made.append(Window(begin + offset, width, kept, begin - number + before))
            before += kept
    return sorted(made, key=lambda window: -window.width)


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
    window of a document is moved back to be as long as its others; none crosses documents.
    `advance` is called with the number of tokens done since its last call.

    Raises:
        FrankenmergeError: for a loss that is not finite, or too little memory for a single window.
    """
    ids, placed = torch.from_numpy(encoded.ids), windows(encoded, context)
    nats = torch.full((encoded.predicted,), torch.nan, dtype=torch.float64)
    hits, remaining = torch.zeros(len(nats), dtype=torch.bool), iter(placed)
    rows = [ids[each.start : each.start + each.width + 1] for each in placed]
    by_position = []
    for batch in predictions(model, rows):
        done = 0
        for losses, right in zip(*batch, strict=True):
            window = next(remaining)
            counted = slice(window.width - window.kept, window.width)
            target = slice(window.place, window.place + window.kept)
            nats[target], hits[target] = losses[counted], right[counted]
            done += window.kept
            if window.width == context >= PARTS:
                parts = losses[: window.width].tensor_split(PARTS)
                by_position.append([float(part.mean()) for part in parts])
        advance(done)
    check_finite(model, nats)
    loss = loss_of(encoded, nats.numpy(), hits.numpy())
    return loss._replace(by_position=np.array(by_position).reshape(-1, PARTS))


def loss_of(encoded: Encoded, nats: np.ndarray, hits: np.ndarray | None = None) -> Loss:
    """The losses of a text, of those `[s - documents]` of its predicted tokens."""
    if encoded.counted is not None:
        nats, hits = nats[encoded.counted], None if hits is None else hits[encoded.counted]
    return Loss(nats, encoded.bytes, hits, encoded.ends, encoded.bounds)


def positions_for(vocabulary: int) -> int:
    """Most positions in one forward pass of a model with so many tokens in its vocabulary."""
    return min(POSITIONS, max(1, LOGITS_BYTES // (4 * vocabulary)))


@torch.no_grad()
def predictions(model: PreTrainedModel, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict rows of token ids, each `[s]`, after their first token, in batches.

    Yields nats float64 and hits bool, `[b, s-1]`, for the next `b` rows. Shorter rows of a batch
    are padded on the right: what is predicted there means nothing. A batch has as many rows as
    `positions_for` and memory allow.

    Raises:
        FrankenmergeError: for ids that the model lacks, or too little memory for a single row.
    """
    size = embedding_of(model).shape[0]
    if (largest := max((int(row.max()) for row in rows), default=0)) >= size:
        expected = f"token ids below {size}, its vocabulary"
        raise fail(_name(model), expected, str(largest), "use the model's own tokenizer")
    positions = positions_for(size)
    while rows:
        width = max(1, len(rows[0]) - 1)
        group = rows[: max(1, positions // width)]
        # Any id will do; transformers warns of rows that end in the model's padding token.
        padding = float(group[0][0])
        padded = pad_sequence(list(group), batch_first=True, padding_value=padding)
        predicted = _batch_losses(model, padded)
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
