"""A donor on disk: its config, its safetensors headers, its bytes. Nothing here imports torch.

Only safetensors are read; pickles are converted first if that is allowed. No code from a donor's
folder is executed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.donors.architecture import LEFT_OUT, VALUE_HEADS, Architecture
from frankenmerge.donors.config import STORAGE_KEYS, config_faults, family, is_tied, quantity
from frankenmerge.donors.inferred import architecture_of, family_faults
from frankenmerge.donors.library import completed
from frankenmerge.donors.pickles import PICKLES, converted, pickles
from frankenmerge.donors.quantisation import Scheme, gguf_fault, scheme
from frankenmerge.donors.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    SUFFIXES,
    TEMPLATES_FOLDER,
    link_faults,
    plain_name,
    read_tensors,
    tensors_in,
    weight_map,
)
from frankenmerge.donors.structure import structure_faults
from frankenmerge.donors.tokens import Tokens, read_settings, tokens_of
from frankenmerge.errors import FrankenmergeError, fail, raise_all
from frankenmerge.storage.hub import is_folder, repository_of, resolve
from frankenmerge.storage.safetensors_header import BYTES_OF, Tensor, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer, next to the chat templates in `TEMPLATES_FOLDER`."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a multimodal model's processor."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""The files of which a tokenizer needs at least one."""
_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
"""The files of a donor on the hub that are fetched in addition to its weights or their headers."""
_SAMPLED = 4096
"""Bytes of each of the three samples of a tensor in a fingerprint."""


Roles = dict[tuple[str, int | None], dict[str, str]]
"""Tensor names by (role, block index or None): `{canonical name: name in the file}`."""


class View(NamedTuple):
    """A donor's tensors as another one names them."""

    architecture: Architecture
    """The other one's."""
    by_role: Roles


@dataclass(frozen=True)
class Checkpoint:
    """A donor whose headers have been read and found consistent."""

    name: str
    """The name that the user gave."""
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    whole: bool = True
    """Whether the tensors' bytes are available: not if only headers were fetched, if a LoRA is not
    folded in yet, or if a stage is not computed yet.
    """
    identity: Callable[[], str] | None = None
    """What identifies it instead of its bytes: a stage's key."""
    written: dict[str, Any] | None = None
    """The config as it is in config.json, where `config` is completed by transformers."""
    remarks: tuple[str, ...] = ()
    """Worth knowing; they forbid nothing."""
    view: View | None = None
    """Where it is seen in the kind of another donor: see `views.seen_as`."""

    @cached_property
    def architecture(self) -> Architecture:
        """The family's entry in the table, or what is inferred for a family that has none."""
        if self.view:
            return self.view.architecture
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        found = architecture_of(self.config, shapes)
        return replace(found, left_out=VALUE_HEADS) if self.quantisation else found

    # Above the property `bytes`, which hides the builtin.
    @cached_property
    def generation_config(self) -> bytes | None:
        """The bytes of generation_config.json; None without one."""
        path = self.path / "generation_config.json"
        return path.read_bytes() if path.is_file() else None

    @property
    def blocks(self) -> int:
        """Number of blocks; of tensors with a block's index where config.json does not say."""
        if (stated := quantity(self.config, "blocks")) is not None:
            return stated
        return len({index for role, index in self.by_role if role == "block"})

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix.

        In families that are not in the table a head in the file counts, whatever config.json says:
        not all of them tie it, and transformers does not where both are there and differ.
        """
        stored = f"{self.architecture.head}weight" in self.by_role.get(("head", None), {})
        return is_tied(self.config) and (self.architecture.listed or not stored)

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements by type, the most frequent first; buffers that no loader reads do not count."""
        counts: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if not re.search(self.architecture.unread, name):
                counts[tensor.dtype] += tensor.bytes // BYTES_OF[tensor.dtype]
        return dict(counts.most_common())

    @property
    def left_out(self) -> list[str]:
        """Tensors that are no part of the model, such as a reward head."""
        return sorted(name for name in self.tensors if re.search(self.architecture.left_out, name))

    @cached_property
    def quantisation(self) -> Scheme | None:
        """How it is quantised; None for plain weights."""
        read = (name for name in self.tensors if not re.search(LEFT_OUT, name))
        return scheme(self.config, {self.tensors[name].dtype for name in read})

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors but buffers."""
        return sum(self.dtypes.values())

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer that exist."""
        named = [self.path / name for name in TOKENIZER_FILES]
        more = sorted((self.path / TEMPLATES_FOLDER).glob("*.jinja"))
        return [path for path in (*named, *more) if path.is_file()]

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a file with a vocabulary."""
        return any((self.path / name).is_file() for name in VOCABULARY_FILES)

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """A hash of the vocabulary file; None without one."""
        for name in VOCABULARY_FILES:
            if (self.path / name).is_file():
                return hashlib.sha256((self.path / name).read_bytes()).hexdigest()[:16]
        return None

    @cached_property
    def tokenizer_json(self) -> Any:
        """The content of tokenizer.json; not to be modified.

        Raises FrankenmergeError for a donor without one, or with one that is not valid JSON.
        """
        return read_json(
            self.path / "tokenizer.json",
            "a tokenizer.json, to match rows of the embedding by their tokens",
        )

    @cached_property
    def tokens(self) -> Tokens:
        """The ids of all tokens of tokenizer.json; not to be modified.

        Raises FrankenmergeError for a donor without a tokenizer.json, or with one that has no list
        or mapping of tokens.
        """
        return tokens_of(self.tokenizer_json, self.path / "tokenizer.json")

    @cached_property
    def tokenizer_settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, empty without one; not to be modified.

        Raises FrankenmergeError for one that is not a JSON object.
        """
        path = self.path / "tokenizer_config.json"
        return read_settings(path) if path.is_file() else {}

    @cached_property
    def by_role(self) -> Roles:
        """Its tensors by what they are part of."""
        if self.view:
            return self.view.by_role
        table: Roles = {}
        for name in self.tensors:
            role, index, canonical = self.architecture.role(name)
            table.setdefault((role, index), {})[canonical] = name
        return table

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config, the headers and three samples of every tensor.

        It distinguishes donors and their versions without reading all of their bytes; it does not
        protect against forgery.
        """
        if self.identity:
            return self.identity()
        config = self.config if self.written is None else self.written
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        in_order = sorted(self.tensors.items())
        # One file at a time: neighbours in the order of names are mostly in one shard.
        for file, group in groupby(in_order, key=lambda item: item[1].file):
            with file.open("rb") as handle:
                for name, tensor in group:
                    digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                    middle = (tensor.start + tensor.stop) // 2
                    last = max(tensor.start, tensor.stop - _SAMPLED)
                    for position in sorted({tensor.start, middle, last}):
                        handle.seek(position)
                        digest.update(handle.read(min(_SAMPLED, tensor.stop - position)))
        return digest.hexdigest()[:32]


def open_checkpoint(
    name: str, *, download: bool = False, allow_pickle: bool = False, weights: bool = True
) -> Checkpoint:
    """Open a local folder or a hub id; only its config and its headers are read.

    Args:
        name: a folder, `org/name` or `org/name@revision`.
        download: whether a hub id that is not in the local cache may be fetched.
        allow_pickle: whether a donor that only has `pytorch_model*.bin` is converted once, and then
            opened from the cache.
        weights: whether the weights will be read. If not, only their headers are fetched.

    Raises:
        FrankenmergeError: naming every fault found, for a folder that is not a complete, consistent
            checkpoint.
    """
    if fault := gguf_fault(name):
        raise FrankenmergeError(fault)
    path = _fetched(name, download) if weights else resolve(name, _PATTERNS, download)
    read = partial(tensors_in, repository=repository_of(name, weights), download=download)
    if allow_pickle and not (path / INDEX_NAME).exists() and read(path / SINGLE_NAME) is None:
        path = resolve(name, (*_PATTERNS, PICKLES), download)
        raise_all(link_faults(path, {*SUFFIXES, ".bin"}))
        path = (
            converted(path, (file for file in path.iterdir() if file.suffix in SUFFIXES))
            if pickles(path)
            else path
        )
    raise_all(link_faults(path))
    written = _read_config(path / "config.json")
    config = written if family(written).listed else _completed(written)
    tensors = read_tensors(path, read)
    checkpoint = Checkpoint(
        name,
        path,
        config,
        tensors,
        all(file.exists() for file in {tensor.file for tensor in tensors.values()}),
        written=None if config is written else written,
    )
    raise_all(structure_faults(checkpoint))
    return checkpoint


def _fetched(name: str, download: bool) -> Path:
    """A donor's folder with the weights that are read, and no other copy of them.

    Those are the single file or, if there is none, the files that the index names.
    """
    path = resolve(name, (*_PATTERNS, SINGLE_NAME), download)
    if is_folder(name) or (path / SINGLE_NAME).exists() or not (path / INDEX_NAME).exists():
        return path
    shards = {shard for shard in weight_map(path / INDEX_NAME).values() if plain_name(shard)}
    return resolve(name, (*_PATTERNS, *sorted(shards)), download)


def _read_config(path: Path) -> dict[str, Any]:
    """Read a config.json of a family that is known or can be inferred."""
    config = read_json(path, "a checkpoint's config.json")
    remedy = "restore the donor's config.json"
    if not isinstance(config, dict):
        raise fail(str(path), "a JSON object", type(config).__name__, remedy)
    raise_all(family_faults(config, str(path)))
    needed = ("blocks", "width", "heads", "vocabulary") if family(config).listed else ()
    for name in needed:
        if type(value := quantity(config, name)) is not int or value < 1:
            key = getattr(family(config).keys, name)
            raise fail(f"{path}: {key}", "a positive whole number", repr(value), remedy)
    raise_all(config_faults(config, str(path)))
    return config


def _completed(written: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers completes it, with what says how the file was stored."""
    if (full := completed(written)) is None:
        return written
    return full | {key: written[key] for key in STORAGE_KEYS if key in written}
