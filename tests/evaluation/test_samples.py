"""Samples are greedy continuations token by token; words and runs are counted as documented."""

import numpy as np
import pytest
import torch
from conftest import DEMO

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.samples import (
    PROMPT_WORDS,
    TOKENS,
    Sample,
    greedy_tokens,
    invalid_rate,
    read_words,
    repetition,
    sample_prompts,
    sampled,
    words_of,
)
from frankenmerge.models.loading import load_model, load_tokenizer


def demo_donor(name: str):
    checkpoint = open_checkpoint(str(DEMO / "donors" / name))
    return load_model(checkpoint), load_tokenizer(checkpoint)


@torch.no_grad()
@pytest.mark.parametrize("name", ["code", "gpt2"])
def test_greedy_tokens_are_those_of_whole_passes(name):
    model, tokenizer = demo_donor(name)
    ids = [tokenizer.bos_token_id or 0, *tokenizer("The file object").input_ids]
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    found = greedy_tokens(model, ids, 20)
    assert found == expected[len(ids) :]
    assert greedy_tokens(model, ids, 20, ends=[found[5]]) == found[: found.index(found[5])]


def test_a_sample_goes_on_from_its_prompt():
    model, tokenizer = demo_donor("prose")
    (sample,) = sampled(model, tokenizer, ["This module provides"], frozenset({"the"}), context=128)
    ids = [
        tokenizer.bos_token_id,
        *tokenizer("This module provides", add_special_tokens=False).input_ids,
    ]
    tokens = greedy_tokens(model, ids, TOKENS)
    assert len(tokens) == TOKENS
    assert sample.prompt == "This module provides"
    assert tokenizer.decode(ids[1:] + tokens) == sample.prompt + sample.text
    words = list(words_of(sample.text))
    assert sample.words in (len(words), len(words) - 1)
    assert sample.invalid == [word for word in words[: sample.words] if word != "the"]
    assert sample.grams == TOKENS - 3
    runs = [tuple(tokens[at : at + 4]) for at in range(TOKENS - 3)]
    assert sample.repeated == sum(run in runs[:at] for at, run in enumerate(runs))


def test_prompt_and_sample_together_are_no_longer_than_the_window():
    model, tokenizer = demo_donor("gpt2")  # whose positions are learned
    (sample,) = sampled(
        model, tokenizer, ["word " * 500], frozenset(), context=model.config.n_positions
    )
    assert sample.grams > 0


def test_an_empty_prompt_is_refused_where_nothing_precedes_it():
    model, tokenizer = demo_donor("code")
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(FrankenmergeError, match="prompt"):
        sampled(model, tokenizer, [""], frozenset(), context=128)


def test_words_are_runs_of_letters_without_case():
    assert list(words_of("Don't stop_me 2day, the CAFÉ's x-ray_12 o’clock")) == [
        "don't",
        "stop",
        "me",
        "day",
        "the",
        "café's",
        "ray",
        "o’clock",
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "cut", "words"),
    [
        ("the ca", "t sat", False, ["cat", "sat"]),
        ("the ca", "t sat", True, ["cat"]),
        ("the cat", " sat.", True, ["sat"]),
        ("the cat", "", False, []),
        ("the cat", ", a", True, []),
    ],
)
def test_words_that_end_in_the_sample_count(prompt, text, cut, words):
    from frankenmerge.evaluation.samples import _written

    assert _written(prompt, text, cut=cut) == words


def test_rates_are_of_all_samples_together():
    samples = [Sample("", "", 10, ["xq"], 6, 3), Sample("", "", 30, ["zz", "zz", "yy"], 14, 2)]
    assert invalid_rate(samples) == 4 / 40
    assert repetition(samples) == 5 / 20
    assert invalid_rate([]) is None and repetition([]) is None


def test_prompts_are_taken_from_the_texts_in_turn():
    texts = [" ".join(f"{name}{number}" for number in range(100)) for name in ("one", "two")]
    prompts = sample_prompts(texts, 5, 7)
    assert prompts == sample_prompts(texts, 5, 7) != sample_prompts(texts, 5, 8)
    for number, prompt in enumerate(prompts):
        assert prompt in texts[number % 2] and len(prompt.split()) == PROMPT_WORDS
    assert len(set(prompts)) == 5
    assert sample_prompts(["short text"], 1, 0) == ["short text"]
    assert np.ptp([int(prompt.split()[0][3:]) for prompt in sample_prompts(texts, 40, 0)]) > 50


def test_a_list_of_words_is_read(tmp_path):
    (tmp_path / "words").write_text("Apple\nbanana's\nx\n")
    assert read_words(tmp_path / "words") == {"apple", "banana's"}
    (tmp_path / "empty").write_text("1 2 3")
    for name in ("empty", "missing"):
        with pytest.raises(FrankenmergeError, match=name):
            read_words(tmp_path / name)
