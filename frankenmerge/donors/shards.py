"""The tensors of a donor's folder: its single file or its index and shards, read by their headers.

No path leaves the folder: neither one of the index nor a link, except links into the blobs of a hub
cache, where its snapshots have their files.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from frankenmerge.donors.pickles import pickles
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.storage.hub import header
from frankenmerge.storage.safetensors_header import Tensor, read_header, read_json, tensors_of

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = "*.safetensors"
SUFFIXES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja"})
"""Of the files that are read, or copied to a result."""
TEMPLATES_FOLDER = "additional_chat_templates"
"""The folder of a tokenizer's chat templates other than the default."""

Read = Callable[[Path], dict[str, Tensor] | None]
"""Reads the tensors of a file; None if there is no such file."""


def tensors_in(file: Path, repository: str | None, download: bool) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file, or None if there is no such file.

    Args:
        file: a local path.
        repository: the repository of the hub that has the file if it is not local; only its header
            is fetched.
        download: whether the header may be fetched.
    """
    if file.exists():
        return read_header(file)
    if repository and (found := header(repository, file, download)):
        return tensors_of(found.text, found.size, file)
    return None


def link_faults(path: Path, suffixes: Iterable[str] = SUFFIXES) -> Iterator[Fault]:
    """Report links that lead out of the folder.

    Their targets would become part of a result that is then published.
    """
    folder = path / TEMPLATES_FOLDER
    inner = folder.iterdir() if folder.is_dir() else ()
    for file in sorted(
        file
        for file in (*path.iterdir(), *inner)
        if file.suffix in suffixes and (file.is_symlink() or folder.is_symlink())
    ):
        # Path.resolve raises for circular links, which lead nowhere.
        target = Path(os.path.realpath(file))
        in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(
            "models--"
        )
        if not in_hub_cache and not target.is_relative_to(path.resolve()):
            yield Fault(
                str(file),
                "a file in the donor's folder, or a link into a hub cache",
                f"a link to {target}",
                "if you trust it, replace the link by the file, or give the folder of the file",
            )


def read_tensors(path: Path, read: Read) -> dict[str, Tensor]:
    """The tensors of a donor's folder by name.

    Args:
        path: the folder.
        read: the reader of one file.

    Raises:
        FrankenmergeError: if there are no safetensors, if a shard is missing or broken, or if the
            shards lack a tensor of the index.
    """
    index_path = path / INDEX_NAME
    # If both exist, transformers reads the single file, and so does this.
    sharded = index_path.exists() and any(path.glob(WEIGHTS)) and not (path / SINGLE_NAME).exists()
    if not sharded and (single := read(path / SINGLE_NAME)) is not None:
        return single
    if not index_path.exists():
        others = sorted(file.name for file in path.glob("*.bin"))
        found = f"only pickle files ({', '.join(others)})" if others else "no safetensors"
        remedy = "convert or download the donor's weights as safetensors"
        remedy += ", or have them converted with --allow-pickle" if pickles(path) else ""
        raise fail(str(path), f"{SINGLE_NAME} or {INDEX_NAME}", found, remedy)
    shards = weight_map(index_path)
    headers = _shard_headers(index_path, sorted(set(shards.values())), read)
    raise_all(_index_faults(path, shards, headers))
    stored = {name: each for shard in sorted(headers) for name, each in headers[shard].items()}
    # In the order of the index, then what it leaves out.
    return {name: stored[name] for name in dict.fromkeys([*shards, *stored])}


def plain_name(shard: str) -> bool:
    """Whether an index names a file of its own folder, and no pattern."""
    return Path(shard).name == shard and not set(shard) & set("*?[")


def weight_map(index_path: Path) -> dict[str, str]:
    """The shard of each tensor by the index."""
    index = read_json(index_path, "a safetensors index")
    found = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(found, dict) and all(isinstance(shard, str) for shard in found.values()):
        return found
    raise fail(
        f"{index_path}: weight_map",
        "an object of tensor and file names",
        type(found).__name__,
        "restore the index",
    )


def _shard_headers(
    index_path: Path, shards: Iterable[str], read: Read
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each shard."""
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
            if (tensors := read(index_path.parent / shard)) is None:
                raise fail(
                    str(index_path.parent / shard),
                    "a shard that the checkpoint needs",
                    "no such file",
                    "download the missing shard",
                )
            headers[shard] = tensors
        except FrankenmergeError as error:
            faults.extend(error.faults)

    with ThreadPoolExecutor(8) as pool:  # a shard on the hub takes two requests
        list(pool.map(attempt, shards))
    raise_all(sorted(faults))
    return headers


def _index_faults(
    path: Path, weight_map: dict[str, str], headers: dict[str, dict[str, Tensor]]
) -> Iterator[Fault]:
    """Compare the index with the headers of the shards.

    As in transformers, the index names the shards, and a tensor may be in any of them. One that is
    in several is read from the last, so the index must not name another of these.
    """
    places: dict[str, list[str]] = {}
    for shard in sorted(headers):
        for name in headers[shard]:
            places.setdefault(name, []).append(shard)
    for name, shard in weight_map.items():
        if name not in places:
            yield Fault(
                f"{path / shard}: {name}",
                "a tensor that the index assigns to this shard",
                "not in the header",
                "download the shard and the index again",
            )
        elif shard in places[name][:-1]:
            yield Fault(
                f"{path}: {name}",
                f"the tensor once, or the index to name {places[name][-1]}, which loaders read",
                f"stored in {' and '.join(places[name])}; the index names {shard}",
                "download the shards and the index again",
            )
