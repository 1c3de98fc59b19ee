"""The Hugging Face hub: what is fetched from there, and a finished merge put there. Nothing else in the package talks to a network.

A donor's header is fetched by two range requests, eight bytes that tell its length and then itself,
and kept, by commit, in the cache.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.storage.atomic import cache_folder, write_file
from frankenmerge.storage.safetensors_header import header_length

_ID = re.compile(r"([\w.-]+/[\w.-]+)(@(?!.*\.\.)[\w./-]+)?")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_TIMEOUT = 30.0
"""Seconds that a server may be silent during a range request."""


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder; not, as pathlib has it, an error for one that cannot be."""
    return os.path.isdir(os.path.expanduser(name))


def resolve(name: str, patterns: Iterable[str], download: bool) -> Path:
    """Find the folder of a local path, `org/name` or `org/name@revision`; of the hub, the files that fit `patterns`.

    Raises FrankenmergeError when there is none.
    """
    if is_folder(name):
        return Path(name).expanduser()
    if os.path.exists(os.path.expanduser(name)):
        raise fail(
            name, "a checkpoint's folder", "a file", "give the folder that holds config.json"
        )
    if not _ID.fullmatch(name):
        raise fail(
            name, "a checkpoint's folder or a hub id such as org/name", "neither", "check the path"
        )
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=not download,
        )
        return Path(folder)
    except (HTTPError, OSError, ValueError) as error:
        raise FrankenmergeError(_fault(name, error, download)) from error


def repository_of(name: str, weights: bool) -> str | None:
    """The hub's repository of which headers alone are wanted; None for a folder, and where the weights are wanted too."""
    return None if weights or is_folder(name) else name.partition("@")[0]


def _fault(name: str, error: Exception, download: bool) -> Fault:
    """What the hub's client says, as a fault."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return Fault(
            name,
            "a repository that you may read",
            "one behind a gate",
            f"ask for access on its page, and {_LOG_IN}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Fault(
            name,
            "a repository of the hub",
            "none of that name, or one that is private",
            f"check the name, or {_LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Fault(
            name,
            "a revision of the repository",
            "none of that name",
            "name a branch, a tag or a commit behind the @",
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return Fault(
            name,
            "all of its files in the local cache",
            "some of them",
            "allow the download of the rest with --download",
        )
    if not download:
        remedy = "give the path of a folder, or allow the download with --download"
        return Fault(name, "a folder, or a hub id that is in the local cache", "neither", remedy)
    # The last line of the client's text is about what the user may do with the client.
    return Fault(
        name,
        "an answer of the hub",
        str(error).split("\n")[0][:300] or type(error).__name__,
        "check the name and the network",
    )


class Header(NamedTuple):
    """What is known of a safetensors file on the hub."""

    text: bytes
    size: int
    """Of the whole file, in bytes."""


def header(repository: str, file: Path, download: bool) -> Header | None:
    """The header of a safetensors file on the hub, from the cache or fetched; None where the repository has no such file.

    Args:
        repository: `org/name`.
        file: the file's place in the local snapshot of a commit, where it is not.
        download: whether it may be fetched.

    Raises:
        FrankenmergeError: for a header that is not at hand or cannot be had, and one of absurd
            size.
    """
    commit = file.parent.name
    kept = (
        cache_folder() / "headers" / repository.replace("/", "--") / commit / f"{file.name}.header"
    )
    place = f"{repository}@{commit}: {file.name}"
    if kept.is_file():
        size, text = int.from_bytes((content := kept.read_bytes())[:8], "little"), content[8:]
        return Header(text, size) if size else None
    if not download:
        raise fail(
            place,
            "a header that is in the local cache",
            "none",
            "allow the download with --download",
        )
    fetched = _fetched(repository, commit, file.name, place)
    # A commit does not change: what it does not have is kept as well, as a file of no size.
    write_file(
        kept,
        (fetched.size if fetched else 0).to_bytes(8, "little") + (fetched.text if fetched else b""),
    )
    return fetched


def _fetched(repository: str, commit: str, name: str, place: str) -> Header | None:
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    url = hf_hub_url(repository, name, revision=commit)
    try:
        first, size = _range(url, 0, 8, place)
        length = header_length(first, size, place)
        return Header(_range(url, 8, 8 + length, place)[0] if length else b"", size)
    except EntryNotFoundError:
        return None
    except (HTTPError, OSError) as error:
        raise FrankenmergeError(_fault(place, error, True)) from error


def _range(url: str, start: int, stop: int, place: str) -> tuple[bytes, int]:
    """Bytes `start` to `stop` of a file, and its size. Never reads more, whatever the server sends."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    asked = build_hf_headers() | {
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    with http_stream_backoff(
        "GET", url, headers=asked, timeout=_TIMEOUT, max_retries=2, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code != 206 or told is None or int(told[1]) != start:
            found = f"status {response.status_code}, Content-Range {response.headers.get('Content-Range')!r}"
            remedy = "download the donor whole and give its folder: this server sends no ranges"
            raise fail(place, f"bytes {start:,} to {stop - 1:,} alone", found, remedy)
        content = bytearray()
        for chunk in response.iter_raw():
            content += chunk
            if len(content) >= stop - start:
                break
    if len(content) < stop - start:
        raise fail(
            place,
            f"{stop - start:,} bytes",
            f"{len(content):,}",
            "try again: the answer was cut off",
        )
    return bytes(content[: stop - start]), int(told[3])


def hub_ids(names: Iterable[str]) -> list[str]:
    """The repositories among models' names, `org/name@revision+lora`, each once; what is a folder here is none."""
    parts = (part for name in names if not is_folder(name) for part in name.split("+"))
    found = (_ID.fullmatch(part) for part in parts if not is_folder(part))
    return list(dict.fromkeys(match[1] for match in found if match))


def check_push(repository: str) -> None:
    """Raise FrankenmergeError where a merge cannot be put into `repository`: nobody is logged in, has the right, or it is in use."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repository):
        raise fail(
            repository, "a repository's name, org/name", "something else", "correct --push-to-hub"
        )
    api = HfApi()
    try:
        told = api.whoami()
        own = [told["name"], *(group["name"] for group in told.get("orgs", []))]
    except (HTTPError, OSError, KeyError, TypeError) as error:
        raise fail(
            "the hub",
            "somebody who is logged in",
            str(error).split("\n")[0][:300],
            f"{_LOG_IN} with a token that may write",
        ) from error
    namespace, _, name = repository.rpartition("/")
    if namespace and namespace not in own:
        raise fail(
            repository,
            f"a repository of {', '.join(own)}",
            f"one of {namespace}",
            "correct the name, or log in as somebody else",
        )
    try:
        there = set(api.list_repo_files(f"{namespace or own[0]}/{name}")) - {".gitattributes"}
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError, ValueError) as error:
        raise FrankenmergeError(_fault(repository, error, True)) from error
    if there:
        found = f"one with {', '.join(sorted(there)[:3])}"
        raise fail(
            repository,
            "a repository that does not exist yet, or an empty one",
            found,
            "choose another name",
        )


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Put the files of a finished merge into a repository of the hub, made where it is not there, and return its address.

    Raises FrankenmergeError, the merge staying where it is, when the hub will not have it.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(
            repository, private=private or None, exist_ok=True
        )  # None: as the namespace has it
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a merge")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        remedy = f"mend that, then `hf upload {repository} {folder}`: the merge is whole there"
        found = " ".join(f"{error} {error.__cause__ or ''}".split())[:400]
        raise fail(repository, "a repository that may be written to", found, remedy) from error
    return str(made)
