"""What tokens stand for, whichever way a tokenizer writes them: tokenizers itself is the oracle."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from frankenmerge.donors.token_bytes import token_bytes

TEXT = "the cat sat on the mat, the cat ate the rat; naïve café 日本\n" * 4


def trained(kind: str) -> Tokenizer:
    """A small BPE of a kind; SentencePiece's with a token for every byte."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token="<unk>"))
    special = ["<unk>", "<s>"]
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def parsed(tokenizer: Tokenizer) -> dict:
    data = json.loads(tokenizer.to_str())
    # Bytes are tokens of the vocabulary, as in Llama 2, none that a text can contain.
    data["added_tokens"] = [each for each in data["added_tokens"] if "0x" not in each["content"]]
    return data


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_tokens_of_a_text_stand_for_its_bytes(kind):
    data = parsed(trained(kind))
    found = token_bytes(data, Path("tokenizer.json"))
    text = "the naïve rat 本 ate ~ €\n"
    ids = Tokenizer.from_str(json.dumps(data)).encode(text, add_special_tokens=False).ids
    assert b"".join(found.plain[index] for index in ids) == text.encode()
    assert found.special == {0: "<unk>", 1: "<s>"}
    assert (len(found.single) == 256) is (kind == "sentencepiece")


def test_a_text_has_the_token_that_is_no_single_byte():
    data = parsed(trained("sentencepiece"))
    found, vocabulary = token_bytes(data, Path("tokenizer.json")), data["model"]["vocab"]
    assert found.ids[b"t"] == vocabulary["t"]
    assert found.ids[b"~"] == vocabulary["<0x7E>"]
    assert found.ids[b" the"] == vocabulary["▁the"]
    assert set(found.below(100).plain) | set(found.below(100).special) == set(range(100))


def test_what_continues_a_word_is_told_from_what_begins_one():
    data = {
        "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "rat": 1, "##rat": 2, "▁": 3}},
        "decoder": {"type": "WordPiece"},
        "added_tokens": [
            {"content": "[UNK]", "id": 0, "special": True},
            {"content": "<tag>", "id": 4, "special": False},
        ],
    }
    found = token_bytes(data, Path("tokenizer.json"))
    assert found.plain == {1: b" rat", 2: b"rat", 3: " ▁".encode(), 4: b"<tag>"}
    assert found.special == {0: "[UNK]"}
