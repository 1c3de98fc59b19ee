"""Greedy continuations of prompts, and their faults: invalid words and repetition."""

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
"""Most tokens of a sample."""
PROMPT_WORDS = 16
GRAM = 4
_WORD = re.compile(r"[^\W\d_](?:['’]?[^\W\d_])+")
"""A run of at least two letters, possibly with an apostrophe inside."""


class Sample(NamedTuple):
    """A model's continuation of a prompt."""

    prompt: str
    text: str
    words: int
    """Number of words; one that the end of the sample cuts off does not count."""
    invalid: list[str]
    """The words that the reference vocabulary lacks, each as often as it occurs."""
    grams: int
    """Number of runs of `GRAM` tokens."""
    repeated: int
    """Number of runs that occurred in the sample before."""


def words_of(text: str) -> Iterator[str]:
    """The words of a text, case-folded."""
    return (match[0].casefold() for match in _WORD.finditer(text))


def read_words(path: Path) -> frozenset[str]:
    """The words of a word list, or of any text; raises FrankenmergeError if there are none."""
    try:
        words = frozenset(words_of(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a UTF-8 list of words", str(error), "give another file") from error
    if not words:
        raise fail(str(path), "a list of words", "none", "give another file")
    return words


def sample_prompts(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts of `PROMPT_WORDS` words, from random places of the texts in turn."""
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
    """Continue every prompt with the likeliest tokens.

    Args:
        model: the model.
        tokenizer: its own.
        prompts: preceded by BOS or EOS, as texts are; long ones are cut at the beginning.
        vocabulary: valid words, case-folded.
        context: most tokens of prompt and sample together.
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
    """The `count` likeliest tokens after `given`, one by one, or those before an end token."""
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
    """The text of `tokens` after that of `given`: decoded alone, the first would lose its space."""
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (given, [*given, *tokens])
    )
    return (
        whole[len(before) :]
        if whole.startswith(before)
        else str(tokenizer.decode(tokens, skip_special_tokens=True))
    )


def _written(prompt: str, text: str, *, cut: bool) -> list[str]:
    """The words that end in a sample; the last one does not count if the sample was cut there."""
    whole = prompt + text
    found = [match for match in _WORD.finditer(whole) if match.end() > len(prompt)]
    if cut and found and found[-1].end() == len(whole):
        found.pop()
    return [match[0].casefold() for match in found]


def invalid_rate(samples: Iterable[Sample]) -> float | None:
    """The share of invalid words in all samples together; None if there are no words."""
    samples = list(samples)
    words = sum(sample.words for sample in samples)
    return sum(len(sample.invalid) for sample in samples) / words if words else None


def repetition(samples: Iterable[Sample]) -> float | None:
    """The share of repeated runs of `GRAM` tokens in all samples; None if there are no runs."""
    samples = list(samples)
    grams = sum(sample.grams for sample in samples)
    return sum(sample.repeated for sample in samples) / grams if grams else None
