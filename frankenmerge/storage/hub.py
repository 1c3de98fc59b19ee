"""The Hugging Face hub: downloads of donors and uploads of merges.

Only this module and `hub_texts` use a network.

A donor's header is fetched by two range requests, one for the eight bytes of its length and one for
itself, and cached by commit.
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
    """Whether a model's name is that of a folder; False for invalid paths, where pathlib raises."""
    return os.path.isdir(os.path.expanduser(name))


def resolve(name: str, patterns: Iterable[str], download: bool) -> Path:
    """Find the folder of a model.

    Args:
        name: a local path, `org/name` or `org/name@revision`.
        patterns: the files of a hub repository that are needed.
        download: whether files that are not in the local cache may be fetched.

    Raises:
        FrankenmergeError: if there is none.
    """
    if is_folder(name):
        return Path(name).expanduser()
    if os.path.exists(os.path.expanduser(name)):
        remedy = "give the folder that contains config.json; to merge tensors alone, use --raw"
        raise fail(name, "a checkpoint's folder", "a file", remedy)
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
        raise FrankenmergeError(fault_of(name, error, download)) from error


def repository_of(name: str, weights: bool) -> str | None:
    """The hub repository whose headers suffice; None for a folder, or if the weights are needed."""
    return None if weights or is_folder(name) else name.partition("@")[0]


def fault_of(name: str, error: Exception, download: bool, local: str = "a folder") -> Fault:
    """An error of the hub's client as a fault; `local` is what may be given instead of a hub id."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return Fault(
            name,
            "a repository that you can read",
            "a gated repository",
            f"ask for access on its page, and {_LOG_IN}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Fault(
            name,
            "a repository of the hub",
            "no repository of this name, or a private one",
            f"check the name, or {_LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Fault(
            name,
            "a revision of the repository",
            "no revision of this name",
            "give a branch, a tag or a commit after the @",
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return Fault(
            name,
            "all of its files in the local cache",
            "only some of them",
            "allow the download of the rest with --download",
        )
    if not download:
        remedy = f"give the path of {local}, or allow the download with --download"
        return Fault(name, f"{local}, or a hub id that is in the local cache", "neither", remedy)
    # The last lines of the client's message are about the client's own options.
    return Fault(
        name,
        "a response from the hub",
        str(error).split("\n")[0][:300] or type(error).__name__,
        "check the name and the network",
    )


class Header(NamedTuple):
    """The header of a safetensors file on the hub."""

    text: bytes
    size: int
    """Of the whole file, in bytes."""


def header(repository: str, file: Path, download: bool) -> Header | None:
    """The header of a safetensors file on the hub; None if the repository has no such file.

    Args:
        repository: `org/name`.
        file: the path that the file would have in the local snapshot of a commit.
        download: whether a header that is not in the local cache may be fetched.

    Raises:
        FrankenmergeError: if the header is not available, or if its length is invalid.
    """
    commit = file.parent.name
    cached = (
        cache_folder() / "headers" / repository.replace("/", "--") / commit / f"{file.name}.header"
    )
    place = f"{repository}@{commit}: {file.name}"
    if cached.is_file():
        size, text = int.from_bytes((content := cached.read_bytes())[:8], "little"), content[8:]
        return Header(text, size) if size else None
    if not download:
        raise fail(
            place,
            "a header that is in the local cache",
            "none",
            "allow the download with --download",
        )
    fetched = _fetched(repository, commit, file.name, place)
    # A commit does not change, so missing files are cached too, with a size of 0.
    write_file(
        cached,
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
        raise FrankenmergeError(fault_of(place, error, True)) from error


def _range(url: str, start: int, stop: int, place: str) -> tuple[bytes, int]:
    """Bytes `start` to `stop` of a file, and its size; never reads more than that."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    request_headers = build_hf_headers() | {
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    with http_stream_backoff(
        "GET", url, headers=request_headers, timeout=_TIMEOUT, max_retries=2, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        sent = response.headers.get("Content-Range")
        content_range = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", sent or "")
        if response.status_code != 206 or content_range is None or int(content_range[1]) != start:
            found = f"status {response.status_code}, Content-Range {sent!r}"
            remedy = "download all of the donor and give its folder: this server sends no ranges"
            raise fail(place, f"only bytes {start:,} to {stop - 1:,}", found, remedy)
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
            "try again: the response was cut off",
        )
    return bytes(content[: stop - start]), int(content_range[3])


def hub_ids(names: Iterable[str]) -> list[str]:
    """The hub repositories among names of models, each once; local folders are left out.

    A name may have a revision and adapters: `org/name@revision+org/lora`.
    """
    parts = (part for name in names if not is_folder(name) for part in name.split("+"))
    matches = (_ID.fullmatch(part) for part in parts if not is_folder(part))
    return list(dict.fromkeys(match[1] for match in matches if match))


def check_push(repository: str) -> None:
    """Raise FrankenmergeError if a merge cannot be uploaded to `repository`.

    The reasons are a missing login, missing rights, or a repository that is not empty.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repository):
        raise fail(
            repository, "a repository's name, org/name", "another form", "correct --push-to-hub"
        )
    api = HfApi()
    try:
        account = api.whoami()
        own = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    except (HTTPError, OSError, KeyError, TypeError) as error:
        raise fail(
            "the hub",
            "a user who is logged in",
            str(error).split("\n")[0][:300],
            f"{_LOG_IN} with a token that has write permission",
        ) from error
    namespace, _, name = repository.rpartition("/")
    if namespace and namespace not in own:
        raise fail(
            repository,
            f"a repository of {', '.join(own)}",
            f"one of {namespace}",
            "correct the name, or log in as another user",
        )
    try:
        existing = set(api.list_repo_files(f"{namespace or own[0]}/{name}")) - {".gitattributes"}
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError, ValueError) as error:
        raise FrankenmergeError(fault_of(repository, error, True)) from error
    if existing:
        found = f"one with {', '.join(sorted(existing)[:3])}"
        raise fail(
            repository,
            "a new or an empty repository",
            found,
            "choose another name",
        )


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a finished merge to a repository of the hub and return its URL.

    The repository is created if it does not exist.

    Raises:
        FrankenmergeError: if the upload fails; the local files stay as they are.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # None: the default of the namespace.
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload a merge")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        remedy = (
            f"fix this, then run `hf upload {repository} {folder}`; the merge is complete there"
        )
        found = " ".join(f"{error} {error.__cause__ or ''}".split())[:400]
        raise fail(repository, "a repository that you can write to", found, remedy) from error
    return str(url)
