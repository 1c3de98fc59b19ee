"""A donor on disk: its config, its safetensors headers, its bytes. Nothing here imports torch.

Only safetensors are read, pickles being converted first where that is allowed; no code comes from a
donor's folder, and no path leaves it: neither one of the index nor a link, but for links into the
blobs of a hub cache, where its snapshots keep their files.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from frankenmerge.donors.architecture import Architecture
from frankenmerge.donors.config import block_kind, config_faults, family, is_tied, quantity
from frankenmerge.donors.inferred import architecture_of, family_faults
from frankenmerge.donors.pickles import PICKLES, converted, pickles
from frankenmerge.donors.tokens import Tokens, read_settings, tokens_of
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.storage.hub import header, repository_of, resolve
from frankenmerge.storage.safetensors_header import (
    BYTES_OF,
    Tensor,
    read_header,
    read_json,
    tensors_of,
)

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
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
"""Files that make up a tokenizer; the first, or one with the vocabulary, must be there."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
"""Of the files that are read, or copied to a result."""
_WEIGHTS = "*.safetensors"
_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
"""What is fetched of a donor on the hub beside its weights, or their headers."""
_SAMPLED = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A donor whose headers have been read and found consistent."""

    name: str
    """How the user called it."""
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    whole: bool = True
    """Whether the tensors' bytes are at hand: they are not where headers alone were fetched, a LoRA
    is still to be folded in, or a stage to be made.
    """

    @cached_property
    def architecture(self) -> Architecture:
        """The family's table entry, or what is inferred of one that has none."""
        return architecture_of(
            self.config,
            {name: tensor.shape for name, tensor in self.tensors.items()},
            str(self.path / "config.json"),
        )

    @cached_property
    def generation_config(self) -> bytes | None:
        """The bytes of generation_config.json, None without one."""
        path = self.path / "generation_config.json"
        return path.read_bytes() if path.is_file() else None

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return quantity(self.config, "blocks") or 0

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements by type, the most frequent first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.bytes // BYTES_OF[tensor.dtype]
        return dict(counts.most_common())

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(self.dtypes.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that are there."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @property
    def has_tokenizer(self) -> bool:
        """Whether a vocabulary is there."""
        return any((self.path / name).is_file() for name in VOCABULARY_FILES)

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """A hash of the vocabulary file, None without one."""
        for name in VOCABULARY_FILES:
            if (self.path / name).is_file():
                return hashlib.sha256((self.path / name).read_bytes()).hexdigest()[:16]
        return None

    @cached_property
    def tokenizer_json(self) -> Any:
        """The content of tokenizer.json, not to be changed.

        Raises FrankenmergeError for a donor without one, or with one that is no JSON.
        """
        return read_json(
            self.path / "tokenizer.json",
            "a tokenizer.json, to match rows of the embedding by their tokens",
        )

    @cached_property
    def tokens(self) -> Tokens:
        """The ids of all tokens of tokenizer.json, not to be changed.

        Raises FrankenmergeError for a donor without a tokenizer.json, or with one that has no list
        or mapping of tokens.
        """
        return tokens_of(self.tokenizer_json, self.path / "tokenizer.json")

    @cached_property
    def tokenizer_settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, not to be changed; empty without one.

        Raises FrankenmergeError for one that is not a JSON object.
        """
        path = self.path / "tokenizer_config.json"
        return read_settings(path) if path.is_file() else {}

    @cached_property
    def by_role(self) -> dict[tuple[str, int | None], dict[str, str]]:
        """Tensor names by role: `{(role, block index or None): {canonical name: name in the file}}`."""
        table: dict[tuple[str, int | None], dict[str, str]] = {}
        for name in self.tensors:
            role, index, canonical = self.architecture.role(name)
            table.setdefault((role, index), {})[canonical] = name
        return table

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config, the headers and three pages of every tensor.

        It tells donors and their versions apart without reading them whole; it is no proof against
        forgery.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        handles = {
            file: file.open("rb") for file in {tensor.file for tensor in self.tensors.values()}
        }
        try:
            for name, tensor in sorted(self.tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                for position in sorted(
                    {
                        tensor.start,
                        (tensor.start + tensor.stop) // 2,
                        max(tensor.start, tensor.stop - _SAMPLED),
                    }
                ):
                    handles[tensor.file].seek(position)
                    digest.update(handles[tensor.file].read(min(_SAMPLED, tensor.stop - position)))
        finally:
            for handle in handles.values():
                handle.close()
        return digest.hexdigest()[:32]


def open_checkpoint(
    name: str, *, download: bool = False, allow_pickle: bool = False, weights: bool = True
) -> Checkpoint:
    """Open a local folder or a hub id, reading its config and its headers alone.

    Args:
        name: a folder, `org/name` or `org/name@revision`.
        download: whether a hub id that is not in the local cache may be fetched.
        allow_pickle: whether a donor that has nothing but `pytorch_model*.bin` is first converted,
            once, and opened from the cache.
        weights: whether they will be read. Without, nothing but the headers of a donor's weights is
            fetched.

    Raises:
        FrankenmergeError: naming every fault found, for a folder that is not a complete, consistent
            checkpoint.
    """
    path = resolve(name, (*_PATTERNS, _WEIGHTS) if weights else _PATTERNS, download)
    read = partial(tensors_in, repository=repository_of(name, weights), download=download)
    if allow_pickle and not (path / INDEX_NAME).exists() and read(path / SINGLE_NAME) is None:
        path = resolve(name, (*_PATTERNS, _WEIGHTS, PICKLES), download)
        raise_all(link_faults(path, {*_SUFFIXES, ".bin"}))
        path = (
            converted(path, (file for file in path.iterdir() if file.suffix in _SUFFIXES))
            if pickles(path)
            else path
        )
    raise_all(link_faults(path))
    config = read_json(path / "config.json", "a checkpoint's config.json")
    if not isinstance(config, dict):
        raise fail(
            str(path / "config.json"),
            "a JSON object",
            type(config).__name__,
            "restore the donor's config.json",
        )
    raise_all(family_faults(config, str(path / "config.json")))
    for quantity_name in ("blocks", "width", "heads", "vocabulary"):
        if type(value := quantity(config, quantity_name)) is not int or value < 1:
            key = getattr(family(config).keys, quantity_name)
            raise fail(
                f"{path / 'config.json'}: {key}",
                "a positive whole number",
                repr(value),
                "restore the donor's config.json",
            )
    raise_all(config_faults(config, str(path / "config.json")))
    tensors = _read_tensors(path, read)
    checkpoint = Checkpoint(
        name,
        path,
        config,
        tensors,
        all(file.exists() for file in {tensor.file for tensor in tensors.values()}),
    )
    raise_all(_structure_faults(checkpoint))
    return checkpoint


def tensors_in(file: Path, repository: str | None, download: bool) -> dict[str, Tensor] | None:
    """The tensors of a file, or by its header alone of one that is in a `repository` of the hub; None where there is no such file."""
    if file.exists():
        return read_header(file)
    if repository and (found := header(repository, file, download)):
        return tensors_of(found.text, found.size, file)
    return None


def link_faults(path: Path, suffixes: Iterable[str] = frozenset(_SUFFIXES)) -> Iterator[Fault]:
    """Tell the links that lead out of the folder: what they lead to would end up in a result that is then given away."""
    for file in sorted(
        file for file in path.iterdir() if file.is_symlink() and file.suffix in suffixes
    ):
        target = Path(
            os.path.realpath(file)
        )  # Path.resolve raises for links in a circle; they lead nowhere
        in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(
            "models--"
        )
        if not in_hub_cache and not target.is_relative_to(path.resolve()):
            yield Fault(
                str(file),
                "a file in the donor's folder, or a link into a hub cache",
                f"a link to {target}",
                "if you trust it, put the file itself there, or give the folder in which it lies",
            )


def _read_tensors(
    path: Path, read: Callable[[Path], dict[str, Tensor] | None]
) -> dict[str, Tensor]:
    index_path = path / INDEX_NAME
    # Where both are there, transformers reads the single file, and so does this.
    whole = index_path.exists() and any(path.glob(_WEIGHTS)) and not (path / SINGLE_NAME).exists()
    if not whole and (single := read(path / SINGLE_NAME)) is not None:
        return single
    if not index_path.exists():
        others = sorted(file.name for file in path.glob("*.bin"))
        found = f"only pickle files ({', '.join(others)})" if others else "no safetensors"
        remedy = "convert or download the donor's weights as safetensors"
        remedy += ", or have them converted with --allow-pickle" if pickles(path) else ""
        raise fail(str(path), f"{SINGLE_NAME} or {INDEX_NAME}", found, remedy)
    index = read_json(index_path, "a safetensors index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise fail(
            f"{index_path}: weight_map",
            "an object of tensor and file names",
            type(weight_map).__name__,
            "restore the index",
        )
    shards = sorted(set(weight_map.values()))
    headers: dict[str, dict[str, Tensor]] = {}
    faults: list[Fault] = []

    def attempt(shard: str) -> None:
        try:
            if Path(shard).name != shard:
                raise fail(
                    f"{index_path}: {shard}",
                    "the name of a file in this folder",
                    "a path",
                    "do not use this donor",
                )
            if (found := read(path / shard)) is None:
                raise fail(
                    str(path / shard),
                    "a shard that the checkpoint needs",
                    "no such file",
                    "download the missing shard",
                )
            headers[shard] = found
        except FrankenmergeError as error:
            faults.extend(error.faults)

    with ThreadPoolExecutor(8) as pool:  # a shard of the hub is two answers to wait for
        list(pool.map(attempt, shards))
    raise_all(sorted(faults))
    faults = [
        Fault(
            f"{path / shard}: {name}",
            "a tensor that the index places here",
            "not in the header",
            "download the shard and the index again",
        )
        for name, shard in weight_map.items()
        if name not in headers[shard]
    ]
    stored = Counter(name for header in headers.values() for name in header)
    faults += [
        Fault(
            f"{path}: {name}",
            "each tensor once, and in the index",
            "stored twice" if count > 1 else "not in the index",
            "download the shards and the index again",
        )
        for name, count in stored.items()
        if count > 1 or name not in weight_map
    ]
    raise_all(faults)
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _structure_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Hold the tensors against the config: every block there and alike, embedding, norm and head of the right shape."""
    roles, where = checkpoint.by_role, str(checkpoint.path)
    remedy = "use a complete checkpoint whose config.json belongs to its weights"
    known = {name for names in roles.values() for name in names.values()}
    for name in sorted(set(checkpoint.tensors) - known):
        yield Fault(
            f"{where}: {name}",
            "each tensor under one name",
            "another name of the same tensor beside it",
            remedy,
        )
    present = {index for role, index in roles if role == "block"}
    if checkpoint.blocks > len(checkpoint.tensors):
        yield Fault(
            where,
            f"tensors of {checkpoint.blocks:,} blocks",
            f"{len(checkpoint.tensors):,} in all",
            remedy,
        )
        return
    if missing := sorted(set(range(checkpoint.blocks)) - present):
        yield Fault(
            where,
            f"tensors of {checkpoint.blocks} blocks",
            f"none of block {', '.join(map(str, missing))}",
            remedy,
        )
    if extra := sorted(
        index for index in present if index is not None and index >= checkpoint.blocks
    ):
        yield Fault(
            where,
            f"tensors of {checkpoint.blocks} blocks",
            f"some of block {', '.join(map(str, extra))}",
            remedy,
        )
    shapes = {
        index: {canonical: checkpoint.tensors[name].shape for canonical, name in names.items()}
        for (role, index), names in roles.items()
        if role == "block" and index is not None and index < checkpoint.blocks
    }
    kinds: dict[tuple, dict[int, dict[str, tuple[int, ...]]]] = {}
    for index, names in sorted(shapes.items()):
        kinds.setdefault(block_kind(checkpoint.config, index), {})[index] = names
    for alike in kinds.values():
        yield from _block_faults(alike, where, remedy)
    for part, index in (
        (part, index)
        for part in checkpoint.architecture.per_block
        if part.marker
        for index in shapes
    ):
        told, held = (
            bool(part.of(checkpoint.config, index)),
            any(str(part.marker) in canonical for canonical in shapes[index]),
        )
        if told != held:
            expected, found = (
                f"{'' if there else 'no '}{part.marker} in block {index}" for there in (told, held)
            )
            yield Fault(f"{where}: {part.key}", expected, found, remedy)
    width, vocabulary = (
        quantity(checkpoint.config, "width"),
        quantity(checkpoint.config, "vocabulary"),
    )
    for role, needed in (
        ("embedding", True),
        ("final", True),
        ("head", not is_tied(checkpoint.config)),
    ):
        names = roles.get((role, None), {})
        if needed and not names:
            yield Fault(where, f"tensors of the {role}", "none", remedy)
        for canonical, name in names.items():
            shape = checkpoint.tensors[name].shape
            is_positions = role == "embedding" and canonical.removeprefix(
                checkpoint.architecture.root
            ).startswith(checkpoint.architecture.embedding[1:])
            rows = quantity(checkpoint.config, "positions" if is_positions else "vocabulary")
            if shape and shape[-1] not in (width, vocabulary):
                yield Fault(
                    f"{where}: {name}",
                    f"last axis {width}, the width in config.json",
                    f"shape {shape}",
                    remedy,
                )
            if len(shape) == 2 and shape[0] != rows:
                yield Fault(
                    f"{where}: {name}",
                    f"first axis {rows}, as in config.json",
                    f"shape {shape}",
                    remedy,
                )


def _block_faults(
    shapes: dict[int, dict[str, tuple[int, ...]]], where: str, remedy: str
) -> Iterator[Fault]:
    """Hold the tensors of blocks that should be alike, canonical names and shapes by index, against each other."""
    usual = Counter(canonical for names in shapes.values() for canonical in names)
    for index, names in sorted(shapes.items()):
        for canonical, count in usual.items():
            usually = 2 * count >= len(shapes)
            if usually and canonical not in names:
                yield Fault(
                    f"{where}: {canonical.format(index)}",
                    "a tensor that other blocks have",
                    "not there",
                    remedy,
                )
            if not usually and canonical in names:
                yield Fault(
                    f"{where}: {canonical.format(index)}",
                    "a tensor of most blocks",
                    f"only in {count} of {len(shapes)}",
                    remedy,
                )
    typical = {
        canonical: Counter(
            names[canonical] for names in shapes.values() if canonical in names
        ).most_common(1)[0][0]
        for canonical in usual
    }
    for index, names in sorted(shapes.items()):
        for canonical, shape in names.items():
            if shape != typical[canonical]:
                yield Fault(
                    f"{where}: {canonical.format(index)}",
                    f"shape {typical[canonical]}, as in the other blocks",
                    f"shape {shape}",
                    remedy,
                )
