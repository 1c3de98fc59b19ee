"""Data sets of the hub: the files of texts that one name means. No code of a data set is run."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.storage.atomic import cache_folder, write_file
from frankenmerge.storage.hub import fault_of

PREFIX = "hub:"
"""How the name of a text on the hub begins."""
_NAME = re.compile(
    r"hub:(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/\w+|[\w.-]+))?"
    r"(?:/(?P<path>[^:]+?))?/?(?::(?P<field>.+))?"
)
_SHOWN = 8
"""Splits that an error names."""


class HubText(NamedTuple):
    """What the name of a text on the hub says."""

    repository: str
    revision: str | None
    path: str | None
    """A file, a split or a folder; None for all of the data set."""
    field: str | None


def parsed(name: str) -> HubText:
    """Read `hub:OWNER/NAME[@REVISION][/PATH][:FIELD]`; raises FrankenmergeError if it is none."""
    if match := _NAME.fullmatch(name):
        return HubText(**match.groupdict())
    expected = "hub:OWNER/NAME, with a file or split and a field: hub:OWNER/NAME/PATH:FIELD"
    raise fail(name, expected, "another form", "correct the name")


def files_of(name: str, suffixes: Sequence[str], download: bool) -> list[Path]:
    """The files of one split of a data set, in the order of their names.

    Args:
        name: `hub:OWNER/NAME[@REVISION][/PATH][:FIELD]`. Shards such as `test-00000-of-00002` are
            one split, `test`.
        suffixes: of files that hold texts.
        download: whether what is not in the local cache may be fetched.

    Raises:
        FrankenmergeError: if there is none, if the name means several splits, and for files that
            are not available.
    """
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    given = parsed(name)
    try:
        chosen = _split(name, given, _listed(given, download), suffixes)
        folder = snapshot_download(
            given.repository,
            repo_type="dataset",
            revision=given.revision,
            allow_patterns=[escape(file) for file in chosen],
            local_files_only=not download,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise FrankenmergeError(fault_of(name, error, download, "a file")) from error
    files = [Path(folder, file) for file in chosen]
    if missing := [file.name for file in files if not file.is_file()]:
        expected, remedy = (
            "all of its files in the local cache",
            "allow the download with --download",
        )
        raise fail(name, expected, f"{', '.join(missing[:3])} missing", remedy)
    return files


def _listed(given: HubText, download: bool) -> list[str]:
    """All files of a revision; kept by commit, so that a split's name means the same offline."""
    from httpx2 import ConnectError, TimeoutException
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    # Without a connection the local cache has to do, as for donors.
    with suppress(ConnectError, TimeoutException, OfflineModeIsEnabled):
        if download:
            found = HfApi().dataset_info(given.repository, revision=given.revision)
            names = sorted(each.rfilename for each in found.siblings or ())
            write_file(_list_of(given, str(found.sha)), json.dumps(names).encode())
            return names
    folder = Path(
        snapshot_download(
            given.repository,
            repo_type="dataset",
            revision=given.revision,
            allow_patterns=[],  # where it is, whatever it holds
            local_files_only=True,
        )
    )
    kept = _list_of(given, folder.name)
    if kept.is_file():
        return json.loads(kept.read_text())
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _list_of(given: HubText, commit: str) -> Path:
    return cache_folder() / "datasets" / given.repository.replace("/", "--") / f"{commit}.json"


def _split(name: str, given: HubText, files: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that a name means: those of one split."""
    found: dict[str, list[str]] = {}
    for file in files:
        split = _split_of(file)
        path = PurePosixPath(split)
        names = {file, split, str(path.with_suffix("")), *map(str, path.parents)}
        inside = ".." not in path.parts and not path.is_absolute()
        named = given.path is None or given.path in names
        if inside and named and path.suffix in suffixes:
            found.setdefault(split, []).append(file)
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        where = f" in {given.path}" if given.path else ""
        shown = ", ".join(files[:_SHOWN]) or "no files"
        remedy = "name one of its files; @refs/convert/parquet after OWNER/NAME may have one"
        raise fail(name, f"{', '.join(suffixes)} files{where}", shown, remedy)
    shown = ", ".join(list(found)[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    field = f":{given.field}" if given.field else ""
    repository = given.repository + (f"@{given.revision}" if given.revision else "")
    remedy = f"name one, as in {PREFIX}{repository}/{next(iter(found))}{field}"
    raise fail(name, "one file or split", f"{len(found)}: {shown}", remedy)


def _split_of(file: str) -> str:
    """The split that a file belongs to: itself without its shard's number.

    `data/test-00000-of-00002.parquet` belongs to `data/test.parquet`, and so does
    `data/test/0000.parquet`, as the hub's own conversion to Parquet writes it.
    """
    path = PurePosixPath(file)
    stem = re.sub(r"-\d+-of-\d+$", "", path.stem)
    if stem.isdigit() and path.parent.name:
        return f"{path.parent}{path.suffix}"
    return str(path.with_name(stem + path.suffix)) if stem else file
