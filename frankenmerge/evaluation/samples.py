"""What a model writes when it always takes the likeliest token, and what is wrong with that: invented words, repetition."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.evaluation.language import start_token
from frankenmerge.progress import Advance, ignore

TOKENS = 64
"""Tokens of a sample, at most."""
PROMPT_WORDS = 16
GRAM = 4
_WORD = re.compile(r"[^\W\d_](?:['’]?[^\W\d_])+")
"""A run of at least two letters; an apostrophe may stand within."""


class Sample(NamedTuple):
    """What a model wrote behind a prompt."""

    prompt: str
    text: str
    words: int
    """How many words it wrote; one that the end of the sample cut off does not count."""
    invalid: list[str]
    """Those of them that the reference vocabulary lacks, each as often as it stands there."""
    grams: int
    """Runs of `GRAM` tokens."""
    repeated: int
    """Those of them that stand in the sample before."""


def words_of(text: str) -> Iterator[str]:
    """The words of a text, as they are compared: without case."""
    return (match[0].casefold() for match in _WORD.finditer(text))


def read_words(path: Path) -> frozenset[str]:
    """The words of a word list, or of any text. Raises FrankenmergeError when it cannot be read or holds none."""
    try:
        words = frozenset(words_of(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a UTF-8 list of words", str(error), "give another file") from error
    if not words:
        raise fail(str(path), "a list of words", "none", "give another file")
    return words


def sample_prompts(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts of `PROMPT_WORDS` words (runs without white space), from the texts in turn, each at a random place."""
    generator, prompts = np.random.default_rng(seed), []
    for number in range(count):
        text = texts[number % len(texts)]
        places = [match.span() for match in re.finditer(r"\S+", text)]
        first = int(generator.integers(max(1, len(places) - PROMPT_WORDS)))
        prompts.append(text[places[first][0] : places[first : first + PROMPT_WORDS][-1][1]])
    return prompts


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    vocabulary: frozenset[str],
    *,
    context: int,
    advance: Advance = ignore,
) -> list[Sample]:
    """Let a model write behind every prompt.

    Args:
        model: which writes.
        tokenizer: its own.
        prompts: read behind BOS or EOS, as texts are; of a long one the end.
        vocabulary: the words that are none of its inventions, without case.
        context: tokens of prompt and sample together, at most.
        advance: called with the number of prompts done since its last call.
    """
    samples = []
    for prompt in prompts:
        samples.append(_sample(model, tokenizer, prompt, vocabulary, context))
        advance(1)
    return samples


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    vocabulary: frozenset[str],
    context: int,
) -> Sample:
    count, start = min(TOKENS, max(1, context // 2)), start_token(tokenizer)
    given: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"][
        -max(1, context - count - 1) :
    ]  # pyright: ignore
    given = given if start is None else [start, *given]
    if not given:
        raise fail("prompt", "a text of at least one token", repr(prompt), "give another --prompt")
    ends = [
        *_listed(tokenizer.eos_token_id),
        *_listed(getattr(model.generation_config, "eos_token_id", None)),
    ]
    tokens = greedy_tokens(model, given, count, ends)
    text = _decoded(tokenizer, given, tokens)
    words = _written(prompt, text, cut=len(tokens) == count)
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    invalid = [word for word in words if word not in vocabulary]
    return Sample(prompt, text, len(words), invalid, len(grams), len(grams) - len(set(grams)))


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel, given: Sequence[int], count: int, ends: Sequence[int] = ()
) -> list[int]:
    """The `count` likeliest tokens behind `given`, one after another, up to one of `ends`, which is left out."""
    cache, found, ids = DynamicCache(config=model.config), [], list(given)
    while len(found) < count:
        logits = model(
            input_ids=torch.tensor([ids], device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        ids = [token]
    return found


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _decoded(tokenizer: PreTrainedTokenizerBase, given: list[int], tokens: list[int]) -> str:
    """The text of `tokens` as it goes on behind that of `given`: a token's space is lost where it is decoded alone."""
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (given, [*given, *tokens])
    )
    return (
        whole[len(before) :]
        if whole.startswith(before)
        else str(tokenizer.decode(tokens, skip_special_tokens=True))
    )


def _written(prompt: str, text: str, *, cut: bool) -> list[str]:
    """The words that end in a sample: one that the prompt begins is among them, one at the end of a sample that was cut is not."""
    whole = prompt + text
    found = [match for match in _WORD.finditer(whole) if match.end() > len(prompt)]
    if cut and found and found[-1].end() == len(whole):
        found.pop()
    return [match[0].casefold() for match in found]


def invalid_rate(samples: Iterable[Sample]) -> float | None:
    """The share of words that the reference vocabulary lacks, in all samples together; None where there are no words."""
    samples = list(samples)
    words = sum(sample.words for sample in samples)
    return sum(len(sample.invalid) for sample in samples) / words if words else None


def repetition(samples: Iterable[Sample]) -> float | None:
    """The share of runs of `GRAM` tokens that stand in their sample before, in all samples together; None where there are none."""
    samples = list(samples)
    grams = sum(sample.grams for sample in samples)
    return sum(sample.repeated for sample in samples) / grams if grams else None
