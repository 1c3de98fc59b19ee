"""Losses on text, compared with transformers' own loss and a loop over single tokens."""

import math

import numpy as np
import pytest
import torch
from conftest import DEMO
from transformers import PreTrainedTokenizerFast

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation import language
from frankenmerge.evaluation.language import Encoded, Loss, encode, measure
from frankenmerge.models.loading import Placement, load_model, load_tokenizer


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def loaded(path):
    return load_model(open_checkpoint(str(path)))


@pytest.fixture(params=["a", "g"])
def model(request, donors):
    return loaded(donors[request.param])


def line(length: int, seed: int = 0) -> Encoded:
    """Random tokens of the tests' vocabulary."""
    return Encoded(np.random.default_rng(seed).integers(0, 48, length), length)


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 3, 20, 64])
def test_a_text_of_one_window_costs_what_transformers_says(model, length):
    encoded = line(length)
    ids = torch.from_numpy(encoded.ids)[None]
    loss = measure(model, encoded, context=64)
    assert loss.tokens == length - 1 and loss.nats.dtype == np.float64
    assert loss.nats_per_token == pytest.approx(
        model(input_ids=ids, labels=ids).loss.item(), abs=1e-5
    )


@torch.no_grad()
def one_by_one(model, ids: np.ndarray, context: int) -> tuple[list[float], list[bool]]:
    """Nats and hits of every token, each from a pass over the first window that reaches it."""
    width = min(context, len(ids) - 1)
    starts = [
        start for start in range(0, len(ids), max(1, width // 2)) if start + width < len(ids) - 1
    ]
    starts.append(len(ids) - 1 - width)
    nats, hits = [], []
    for target in range(1, len(ids)):
        start = next(start for start in starts if target <= start + width)
        logits = model(input_ids=torch.from_numpy(ids[start:target])[None]).logits[0, -1].double()
        nats.append(float(-torch.log_softmax(logits, 0)[ids[target]]))
        hits.append(int(logits.argmax()) == ids[target])
    return nats, hits


@pytest.mark.parametrize(
    "context, length",
    [(1, 6), (2, 9), (3, 20), (8, 33), (16, 17), (16, 18), (16, 25), (16, 41), (64, 150)],
)
def test_longer_texts_cost_what_the_windows_say_token_by_token(model, context, length):
    encoded = line(length)
    nats, hits = one_by_one(model, encoded.ids, context)
    loss = measure(model, encoded, context=context)
    np.testing.assert_allclose(loss.nats, nats, rtol=1e-4, atol=1e-5)
    assert loss.hits.tolist() == hits
    assert loss.accuracy == sum(hits) / len(hits)


@pytest.mark.parametrize("context, length", [(8, 40), (16, 100), (64, 65), (64, 66)])
def test_past_the_first_window_every_token_sees_half_a_window(donors, context, length):
    """The loss of a token depends on tokens within its window, and on none before it."""
    model, ids = loaded(donors["a"]), line(length).ids
    before = measure(model, Encoded(ids, 1), context=context).nats
    for changed in range(0, length - 1, 7):
        other = ids.copy()
        other[changed] = (other[changed] + 1) % 48
        after = measure(model, Encoded(other, 1), context=context).nats
        touched = np.flatnonzero(np.abs(after - before) > 1e-9) + 1
        assert set(range(changed + 1, min(changed + context // 2, length - 1) + 1)) <= set(
            touched.tolist()
        )
        assert touched.max() <= changed + context


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 32, 33, 100])
def test_every_token_is_counted_once(model, length):
    done = []
    loss = measure(model, line(length), context=16, advance=done.append)
    assert loss.tokens == sum(done) == length - 1
    assert min(done) > 0
    assert np.isfinite(loss.nats).all()


@pytest.mark.parametrize("positions", [1, 16, 50, 10_000])
def test_how_windows_are_batched_changes_nothing(model, monkeypatch, positions):
    encoded = line(300)
    expected = measure(model, encoded, context=16).nats
    monkeypatch.setattr(language, "POSITIONS", positions)
    np.testing.assert_allclose(
        measure(model, encoded, context=16).nats, expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("room", [1, 3])
def test_fewer_windows_pass_together_where_memory_is_short(model, room):
    encoded, sizes = line(300), []
    expected = measure(model, encoded, context=16)

    def short(_module, _args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = model.register_forward_pre_hook(short, with_kwargs=True)
    loss = measure(model, encoded, context=16)
    handle.remove()
    np.testing.assert_allclose(loss.nats, expected.nats, rtol=1e-5, atol=1e-6)
    assert (loss.hits == expected.hits).all()
    assert sizes[0] > room >= max(sizes[-3:]) and sum(size for size in sizes if size <= room) == 37


def test_too_little_memory_for_one_window_is_reported(model):
    def short(*_args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.register_forward_pre_hook(short)
    with pytest.raises(FrankenmergeError, match="memory for a window of 16 tokens"):
        measure(model, line(300), context=16)


def test_other_errors_are_not_taken_for_short_memory(model):
    def broken(*_args):
        raise RuntimeError("something else")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="something else"):
        measure(model, line(300), context=16)


@pytest.mark.parametrize(
    "text", ["Once upon a time\n    def go(self): return 1", "naïve café, 東京 — 😀!"]
)
def test_tokens_end_where_their_bytes_end(text):
    """Byte-level tokens: if all ends are known, the tokens' own bytes are the text's."""
    tokenizer = load_tokenizer(open_checkpoint(str(DEMO / "donors" / "code")))
    encoded = encode(tokenizer, text, "text")
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    spelled = [
        bytes(alphabet[character] for character in token)
        for token in tokenizer.convert_ids_to_tokens(encoded.ids[1:])
    ]
    assert b"".join(spelled) == text.encode() and encoded.bytes == len(text.encode())
    ends = np.cumsum([len(token) for token in spelled])
    # A token that ends within a character is reported to end with it.
    characters = np.cumsum([len(character.encode()) for character in text])
    assert encoded.ends.tolist() == [
        int(characters[np.searchsorted(characters, end)]) for end in ends
    ]


def test_measuring_twice_gives_the_same(model):
    one, two = (measure(model, line(100), context=16) for _ in range(2))
    assert (one.nats == two.nats).all()


def test_a_model_that_knows_nothing_costs_the_logarithm_of_the_vocabulary(donors):
    model = loaded(donors["a"])
    model.lm_head.weight.data.zero_()
    loss = measure(model, line(50), context=16)
    np.testing.assert_allclose(loss.nats, math.log(48), rtol=1e-6)
    assert loss.perplexity == pytest.approx(48)


def test_the_figures_are_their_formulas():
    loss = Loss(np.array([0.5, 1.5, 4.0]), 8, np.array([True, False, True]))
    assert loss.tokens == 3
    assert loss.nats_per_token == 2.0
    assert loss.perplexity == pytest.approx(7.38905609893065)
    assert loss.bits_per_byte == pytest.approx(6.0 / 0.6931471805599453 / 8)
    assert loss.as_json() == {
        "bits_per_byte": loss.bits_per_byte,
        "perplexity": loss.perplexity,
        "nats_per_token": 2.0,
        "accuracy": 2 / 3,
        "tokens": 3,
        "bytes": 8,
    }


def test_two_bits_a_byte_are_two():
    assert Loss(np.full(10, 2 * math.log(2)), 10).bits_per_byte == pytest.approx(2)


def test_perplexity_past_the_range_of_a_float_is_infinite():
    assert Loss(np.array([1e4]), 1).perplexity == math.inf


def test_a_text_is_read_after_bos_and_counted_in_utf8_bytes(donors):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    encoded = encode(tokenizer, "ab é", "text")
    assert encoded.ids.tolist() == [0, 1, 2, 27]  # the tokenizer has no é
    assert encoded.bytes == 5
    assert encode(tokenizer, "<s>", "text").ids.tolist()[0] == 0


def test_a_text_is_read_after_eos_where_there_is_no_bos(donors):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    tokenizer.bos_token = None
    tokenizer.eos_token = "z"
    assert encode(tokenizer, "ab", "text").ids.tolist() == [26, 1, 2]


def without_specials(donors) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


def test_without_either_the_first_token_is_not_predicted(donors):
    assert encode(without_specials(donors), "abc", "text").ids.tolist() == [1, 2, 3]


def test_an_empty_text_is_refused(donors):
    with pytest.raises(FrankenmergeError) as refused:
        encode(load_tokenizer(open_checkpoint(str(donors["a"]))), "", "empty.txt")
    assert [fault.place for fault in refused.value.faults] == ["empty.txt"]


@pytest.mark.parametrize("text", ["", "a"])
def test_fewer_than_two_tokens_are_refused(donors, text):
    with pytest.raises(FrankenmergeError, match="two tokens"):
        encode(without_specials(donors), text, "short.txt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(donors, value):
    model = loaded(donors["a"])
    model.lm_head.weight.data[3, 3] = value
    with pytest.raises(FrankenmergeError, match="finite losses"):
        measure(model, line(40), context=16)


def test_one_position_that_is_no_number_is_enough(donors):
    model = loaded(donors["g"])
    model.transformer.wpe.weight.data[15] = torch.nan
    assert measure(model, line(40), context=15).tokens == 39
    with pytest.raises(FrankenmergeError, match="finite losses"):
        measure(model, line(40), context=16)


def test_tokens_of_another_vocabulary_are_refused(model):
    with pytest.raises(FrankenmergeError, match="token ids below 48"):
        measure(model, Encoded(np.array([0, 5, 48, 2]), 4), context=16)


@torch.no_grad()
def test_half_precision_logits_are_weighed_in_float32(donors):
    model = load_model(open_checkpoint(str(donors["a"])), Placement("bfloat16"))
    encoded = line(16)
    ids = torch.from_numpy(encoded.ids)[None]
    logits = model(input_ids=ids[:, :-1]).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert measure(model, encoded, context=64).nats_per_token == pytest.approx(
        expected.item(), abs=1e-5
    )


def test_real_models_predict_real_text(real):
    """A trained model takes less than half of log2(512) bits per token."""
    checkpoint = open_checkpoint(str(real[0]))
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big dog."
    )
    loss = measure(
        load_model(checkpoint), encode(load_tokenizer(checkpoint), text, "text"), context=256
    )
    assert loss.bytes == len(text)
    assert loss.nats_per_token < math.log(512) / 2
    assert loss.bits_per_byte == pytest.approx(loss.nats.sum() / math.log(2) / len(text))
