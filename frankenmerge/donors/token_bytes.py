"""The bytes that a tokenizer's tokens stand for, so that different tokenizers can be compared.

One writes a space as `Ġ`, another as `▁`, a third marks what continues a word with `##`; bytes are
the same for all. Reads a parsed tokenizer.json alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.donors.tokens import tokens_of

SPACE = "▁"
"""How SentencePiece writes a space."""


class TokenBytes(NamedTuple):
    """What the tokens of a tokenizer stand for."""

    plain: dict[int, bytes]
    """The bytes of every token of text, by its id."""
    single: frozenset[int]
    """Those of `plain` that stand for a byte of text that no other token covers (`<0x0A>`)."""
    special: dict[int, str]
    """Tokens that mark something in a text and stand for none of it, by id."""

    @property
    def ids(self) -> dict[bytes, int]:
        """The id of every text; of several the one that is no byte on its own, then the least."""
        order = sorted(self.plain, key=lambda index: (index in self.single, index))
        return {self.plain[index]: index for index in reversed(order)}

    def below(self, rows: int) -> "TokenBytes":
        """Without tokens that a matrix of so many rows has none for."""
        plain = {index: text for index, text in self.plain.items() if index < rows}
        special = {index: text for index, text in self.special.items() if index < rows}
        return TokenBytes(plain, self.single, special)


def token_bytes(tokenizer: Any, path: Path) -> TokenBytes:
    """What the tokens of a parsed tokenizer.json stand for.

    Args:
        tokenizer: the content of the file.
        path: the file, for messages.

    Raises:
        FrankenmergeError: if it has no list or mapping of tokens.
    """
    tokens = tokens_of(tokenizer, path)
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or []}
    kinds = {step.get("type") for step in _steps(tokenizer)}
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    plain: dict[int, bytes] = {}
    single: set[int] = set()
    special: dict[int, str] = {}
    for token, index in tokens.items():
        if token in added and added[token].get("special"):
            special[index] = token
        elif token in added:
            plain[index] = token.encode()
        elif fallback and (byte := _byte(token)) is not None:
            plain[index] = byte
            single.add(index)
        elif "ByteLevel" in kinds and all(letter in LETTERS for letter in token):
            plain[index] = bytes(LETTERS[letter] for letter in token)
        elif "WordPiece" in kinds:
            plain[index] = (token[2:] if token.startswith("##") else f" {token}").encode()
        else:
            plain[index] = token.replace(SPACE, " ").encode()
    return TokenBytes(plain, frozenset(single), special)


def roles(tokenizer_settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json by what they are: `bos_token` and so on."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = tokenizer_settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _steps(tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps by which a tokenizer cuts text and puts it together again, sequences unpacked."""
    for part in ("pre_tokenizer", "decoder"):
        waiting = [tokenizer.get(part)]
        while waiting:
            step = waiting.pop()
            if isinstance(step, dict):
                yield step
                waiting += [*step.get("pretokenizers", []), *step.get("decoders", [])]


def _byte(token: str) -> bytes | None:
    """The byte of a token such as `<0x0A>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _letters() -> dict[str, int]:
    """The bytes that the letters of a byte-level vocabulary stand for, as GPT-2 has them.

    A byte with a visible character in Latin-1 is written as that; the others in order from U+0100.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }


LETTERS = _letters()
"""Bytes by the letters of a byte-level vocabulary."""
