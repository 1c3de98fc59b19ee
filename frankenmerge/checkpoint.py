"""A donor on disk: its config, its safetensors headers, its bytes. Nothing here imports torch.

Only safetensors are read, pickles being converted first where that is allowed; no code comes from a donor's folder, and no path
leaves it: neither one of the index nor a link, but for links into the blobs of a hub cache, where its snapshots keep their files.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.architectures import block_kind, config_faults, family, is_tied, quantity
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.families import Architecture
from frankenmerge.inferred import architecture_of, family_faults
from frankenmerge.pickles import PICKLES, converted, pickles

BYTES_OF = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element takes, by the name safetensors gives its type."""

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
HEADER_LIMIT = 100_000_000
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that make up a tokenizer; the first, or one with the vocabulary, must be there."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
"""Of the files that are read, or copied to a result."""
_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
"""What is fetched of a donor on the hub."""
_SAMPLED = 4096


class Tensor(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    dtype: str
    """As safetensors names it: `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.stop - self.start


@dataclass(frozen=True)
class Checkpoint:
    """A donor whose headers have been read and found consistent."""

    name: str
    """How the user called it."""
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @cached_property
    def architecture(self) -> Architecture:
        """The family's table entry, or what is inferred of one that has none."""
        return architecture_of(self.config, {name: tensor.shape for name, tensor in self.tensors.items()}, str(self.path / "config.json"))

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

        It tells donors and their versions apart without reading them whole; it is no proof against forgery.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        handles = {file: file.open("rb") for file in {tensor.file for tensor in self.tensors.values()}}
        try:
            for name, tensor in sorted(self.tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                for position in sorted({tensor.start, (tensor.start + tensor.stop) // 2, max(tensor.start, tensor.stop - _SAMPLED)}):
                    handles[tensor.file].seek(position)
                    digest.update(handles[tensor.file].read(min(_SAMPLED, tensor.stop - position)))
        finally:
            for handle in handles.values():
                handle.close()
        return digest.hexdigest()[:32]


def open_checkpoint(name: str, *, download: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Open a local folder or a hub id, reading its config and its headers alone.

    With `allow_pickle`, a donor that has nothing but `pytorch_model*.bin` is first converted, once, and opened from the cache.

    Raises FrankenmergeError, naming every fault found, for a folder that is not a complete, consistent checkpoint.
    """
    path = resolve(name, _PATTERNS, download)
    if allow_pickle and not _has_safetensors(path):
        path = resolve(name, (*_PATTERNS, PICKLES), download)
        raise_all(link_faults(path, {*_SUFFIXES, ".bin"}))
        path = converted(path, (file for file in path.iterdir() if file.suffix in _SUFFIXES)) if pickles(path) else path
    raise_all(link_faults(path))
    config = read_json(path / "config.json", "a checkpoint's config.json")
    if not isinstance(config, dict):
        raise fail(str(path / "config.json"), "a JSON object", type(config).__name__, "restore the donor's config.json")
    raise_all(family_faults(config, str(path / "config.json")))
    for quantity_name in ("blocks", "width", "heads", "vocabulary"):
        if type(value := quantity(config, quantity_name)) is not int or value < 1:
            key = getattr(family(config).keys, quantity_name)
            raise fail(f"{path / 'config.json'}: {key}", "a positive whole number", repr(value), "restore the donor's config.json")
    raise_all(config_faults(config, str(path / "config.json")))
    checkpoint = Checkpoint(name, path, config, _read_tensors(path))
    raise_all(_structure_faults(checkpoint))
    return checkpoint


def _has_safetensors(path: Path) -> bool:
    return (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()


def resolve(name: str, patterns: Iterable[str], download: bool) -> Path:
    """Find the folder of a local path, `org/name` or `org/name@revision`; of the hub, the files that fit `patterns`.

    Raises FrankenmergeError when there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise fail(name, "a checkpoint's folder", "a file", "give the folder that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise fail(name, "a checkpoint's folder or a hub id such as org/name", "neither", "check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns), local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        remedy = "check the name and the network" if download else "give the path of a folder, or allow the download with --download"
        raise fail(name, "a folder, or a hub id that is in the local cache", "neither", remedy) from error


def link_faults(path: Path, suffixes: Iterable[str] = frozenset(_SUFFIXES)) -> Iterator[Fault]:
    """Tell the links that lead out of the folder: what they lead to would end up in a result that is then given away."""
    for file in sorted(file for file in path.iterdir() if file.is_symlink() and file.suffix in suffixes):
        target = file.resolve()
        in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not in_hub_cache and not target.is_relative_to(path.resolve()):
            yield Fault(
                str(file), "a file in the donor's folder, or a link into a hub cache", f"a link to {target}",
                "if you trust it, put the file itself there, or give the folder in which it lies",
            )  # fmt: skip


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file. Raises FrankenmergeError when it is absent, no JSON, or gives a name twice."""
    if path.exists() and not path.is_file():
        raise fail(str(path), what, "no ordinary file", "restore the file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise fail(str(path), what, "no such file", "give the folder of a complete checkpoint") from error
    except (ValueError, RecursionError, OSError) as error:
        raise fail(str(path), what, f"{error}", "restore the file") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    index_path = path / INDEX_NAME
    # Where both are there, transformers reads the single file, and so does this.
    if (path / SINGLE_NAME).exists():
        return read_header(path / SINGLE_NAME)
    if not index_path.exists():
        others = sorted(file.name for file in path.glob("*.bin"))
        found = f"only pickle files ({', '.join(others)})" if others else "no safetensors"
        remedy = "convert or download the donor's weights as safetensors"
        remedy += ", or have them converted with --allow-pickle" if pickles(path) else ""
        raise fail(str(path), f"{SINGLE_NAME} or {INDEX_NAME}", found, remedy)
    index = read_json(index_path, "a safetensors index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise fail(f"{index_path}: weight_map", "an object of tensor and file names", type(weight_map).__name__, "restore the index")
    headers: dict[str, dict[str, Tensor]] = {}
    faults = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            faults.append(Fault(f"{index_path}: {shard}", "the name of a file in this folder", "a path", "do not use this donor"))
            continue
        try:
            headers[shard] = read_header(path / shard)
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    faults = [
        Fault(
            f"{path / shard}: {name}", "a tensor that the index places here", "not in the header", "download the shard and the index again"
        )
        for name, shard in weight_map.items()
        if name not in headers[shard]
    ]
    stored = Counter(name for header in headers.values() for name in header)
    faults += [
        Fault(f"{path}: {name}", "each tensor once, and in the index", "stored twice" if count > 1 else "not in the index",
              "download the shards and the index again")
        for name, count in stored.items() if count > 1 or name not in weight_map
    ]  # fmt: skip
    raise_all(faults)
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file's header and hold every entry against the file.

    Raises FrankenmergeError for a missing or truncated file and for offsets that overlap, leave gaps or run past the end.
    """
    if file.exists() and not file.is_file():
        raise fail(str(file), "a safetensors file", "no ordinary file", "download the shard again")
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                found = f"{size:,} bytes, and a header said to take {length:,}"
                raise fail(str(file), "a complete safetensors file", found, "download the shard again")
            header = json.loads(handle.read(length), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise fail(str(file), "a shard that the checkpoint needs", "no such file", "download the missing shard") from error
    except (ValueError, RecursionError, OSError) as error:
        raise fail(str(file), "a safetensors header", str(error), "download the shard again") from error
    if not isinstance(header, dict):
        raise fail(str(file), "a safetensors header, a JSON object", type(header).__name__, "download the shard again")
    header.pop("__metadata__", None)
    tensors, faults = {}, []
    for name, entry in header.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
            if not isinstance(shape, list) or any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
                raise ValueError
            if end - begin != BYTES_OF[entry["dtype"]] * math.prod(shape):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            faults.append(
                Fault(f"{file}: {name}", "dtype, shape and offsets that agree", json.dumps(entry)[:200], "download the shard again")
            )
            continue
        tensors[name] = Tensor(file, entry["dtype"], tuple(shape), 8 + length + begin, 8 + length + end)
    raise_all(faults)
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            raise fail(f"{file}: {name}", f"its bytes to begin at {position:,}", f"{tensor.start:,}", "download the shard again")
        position = tensor.stop
    if position != size:
        found = f"{size:,} bytes ({'truncated' if size < position else 'bytes too many'})"
        raise fail(str(file), f"{position:,} bytes, as its header says", found, "download the shard again")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := [name for name, _ in pairs]) != len(set(names)):
        raise ValueError("a name stands twice")
    "".join(names).encode()  # raises ValueError for lone surrogates, which are no text
    return dict(pairs)


def _structure_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Hold the tensors against the config: every block there and alike, embedding, norm and head of the right shape."""
    roles, where = checkpoint.by_role, str(checkpoint.path)
    remedy = "use a complete checkpoint whose config.json belongs to its weights"
    known = {name for names in roles.values() for name in names.values()}
    for name in sorted(set(checkpoint.tensors) - known):
        yield Fault(f"{where}: {name}", "each tensor under one name", "another name of the same tensor beside it", remedy)
    present = {index for role, index in roles if role == "block"}
    if missing := sorted(set(range(checkpoint.blocks)) - present):
        yield Fault(where, f"tensors of {checkpoint.blocks} blocks", f"none of block {', '.join(map(str, missing))}", remedy)
    if extra := sorted(index for index in present if index is not None and index >= checkpoint.blocks):
        yield Fault(where, f"tensors of {checkpoint.blocks} blocks", f"some of block {', '.join(map(str, extra))}", remedy)
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
    for part, index in ((part, index) for part in checkpoint.architecture.per_block if part.marker for index in shapes):
        told, held = bool(part.of(checkpoint.config, index)), any(str(part.marker) in canonical for canonical in shapes[index])
        if told != held:
            expected, found = (f"{'' if there else 'no '}{part.marker} in block {index}" for there in (told, held))
            yield Fault(f"{where}: {part.key}", expected, found, remedy)
    width, vocabulary = quantity(checkpoint.config, "width"), quantity(checkpoint.config, "vocabulary")
    for role, needed in (("embedding", True), ("final", True), ("head", not is_tied(checkpoint.config))):
        names = roles.get((role, None), {})
        if needed and not names:
            yield Fault(where, f"tensors of the {role}", "none", remedy)
        for canonical, name in names.items():
            shape = checkpoint.tensors[name].shape
            is_positions = role == "embedding" and canonical.removeprefix(checkpoint.architecture.root).startswith(
                checkpoint.architecture.embedding[1:]
            )
            rows = quantity(checkpoint.config, "positions" if is_positions else "vocabulary")
            if shape and shape[-1] not in (width, vocabulary):
                yield Fault(f"{where}: {name}", f"last axis {width}, the width in config.json", f"shape {shape}", remedy)
            if len(shape) == 2 and shape[0] != rows:
                yield Fault(f"{where}: {name}", f"first axis {rows}, as in config.json", f"shape {shape}", remedy)


def _block_faults(shapes: dict[int, dict[str, tuple[int, ...]]], where: str, remedy: str) -> Iterator[Fault]:
    """Hold the tensors of blocks that should be alike, canonical names and shapes by index, against each other."""
    usual = Counter(canonical for names in shapes.values() for canonical in names)
    for index, names in sorted(shapes.items()):
        for canonical, count in usual.items():
            usually = 2 * count >= len(shapes)
            if usually and canonical not in names:
                yield Fault(f"{where}: {canonical.format(index)}", "a tensor that other blocks have", "not there", remedy)
            if not usually and canonical in names:
                yield Fault(f"{where}: {canonical.format(index)}", "a tensor of most blocks", f"only in {count} of {len(shapes)}", remedy)
    typical = {
        canonical: Counter(names[canonical] for names in shapes.values() if canonical in names).most_common(1)[0][0] for canonical in usual
    }
    for index, names in sorted(shapes.items()):
        for canonical, shape in names.items():
            if shape != typical[canonical]:
                yield Fault(
                    f"{where}: {canonical.format(index)}", f"shape {typical[canonical]}, as in the other blocks", f"shape {shape}", remedy
                )
