"""Texts to measure on: files and folders, read as documents that share no context."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.storage.hub_texts import PREFIX, files_of, parsed

FIELDS = ("text", "messages")
"""Fields of a row that are read where none is named: the first that a row has."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Chat(NamedTuple):
    """A conversation; only the assistant's turns are predicted."""

    messages: tuple[Mapping[str, Any], ...]
    """Each with `role` and `content`."""


Document = str | Chat


@dataclass(frozen=True)
class Text:
    """A text to be predicted."""

    name: str
    content: str
    """All of it, without the roles of conversations."""
    parts: tuple[Document, ...] = ()
    """Its documents, where it is not a single one."""

    @property
    def documents(self) -> tuple[Document, ...]:
        """What it consists of; documents share no context."""
        return self.parts or (self.content,)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of what is predicted."""
        return sum(len(predicted_text(document).encode()) for document in self.documents)


def read_text(path: Path, separator: str | None = None, *, download: bool = False) -> Text:
    """Read a text: a file, or a folder of `.txt`, `.jsonl` and `.parquet` files.

    `hub:OWNER/NAME`, with a file or split and a field as in `hub:OWNER/NAME/PATH:FIELD`, is a data
    set of the hub; files that are not in the local cache are fetched with `download`.

    A row of `.jsonl` or `.parquet` is a document: its field `text`, a conversation in `messages`,
    or the field that is named after a colon, as in `file.jsonl:field`. Any other file is UTF-8
    text as it is, including its line ends: one document, or those between `separator`, without
    line ends around them. Blank documents are left out.

    Raises:
        FrankenmergeError: for a file that is absent, empty, not UTF-8, or has faulty rows.
    """
    file, field = _field_of(path)
    if is_on_hub(path):
        files, field = files_of(str(path), SUFFIXES, download), parsed(str(path)).field
    elif file.is_dir():
        files = [each for each in sorted(file.rglob("*")) if _is_text(each, file)]
        if not files:
            expected = f"a folder of {', '.join(SUFFIXES)} files"
            raise fail(str(file), expected, "none", "give another folder")
    else:
        files = [file]
        if file.suffix not in ROWS:
            content = _content(file)
            if not separator or separator not in content:
                return Text(str(path), content)
    documents, faults = [], []
    for each in files:
        try:
            documents += _documents(each, field, separator)
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return text_of(str(path), documents)


def text_of(name: str, documents: Sequence[Document]) -> Text:
    """A text of documents."""
    return Text(name, "\n".join(map(_words, documents)), tuple(documents))


def _is_text(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is a text; hidden ones are none."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in SUFFIXES and not hidden and file.is_file()


def is_on_hub(path: Path) -> bool:
    """Whether a text is a data set of the hub."""
    return str(path).startswith(PREFIX)


def has_documents(file: Path) -> bool:
    """Whether the first row of a `.jsonl` file is a document, and no item of a task."""
    row = next((row for _, row in _jsonl_rows(file)), None) if file.is_file() else None
    return isinstance(row, dict) and "choices" not in row and any(each in row for each in FIELDS)


def _field_of(path: Path) -> tuple[Path, str | None]:
    """The file and the field of `file.jsonl:field`; without a field, None."""
    name, colon, field = str(path).rpartition(":")
    named = colon and field and not path.exists()
    if named and (Path(name).suffix in ROWS or Path(name).is_dir()):
        return Path(name), field
    return path, None


def _documents(file: Path, field: str | None, separator: str | None) -> list[Document]:
    """The documents of a file that are not blank; there is at least one."""
    if file.suffix in ROWS:
        documents = _row_documents(file, field)
    else:
        content = _content(file)
        pieces = content.split(separator) if separator else [content]
        documents = [piece.strip("\r\n") if separator else piece for piece in pieces]
    if found := [each for each in documents if _words(each).strip()]:
        return found
    raise fail(str(file), "a text", "no document that is not blank", "give another file")


def _row_documents(file: Path, field: str | None) -> list[Document]:
    documents, faults = [], []
    for place, row in ROWS[file.suffix](file):
        found = row if isinstance(row, Fault) else _document(row, field, place)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            documents.append(found)
    raise_all(faults)
    return documents


def _document(row: Mapping[str, Any], field: str | None, place: str) -> Document | Fault:
    """The document of a row."""
    name = field or next((each for each in FIELDS if each in row), None)
    if name is None or name not in row:
        expected = " or ".join(f"the field {each!r}" for each in ([field] if field else FIELDS))
        found = ", ".join(map(repr, row)) or "no fields"
        return Fault(place, expected, found, "name a field, as in FILE.jsonl:FIELD")
    value = row[name]
    if isinstance(value, str):
        if _SURROGATE.search(value):
            return Fault(place, "text", "a lone surrogate", "correct this row")
        return value
    if isinstance(value, list) and all(_is_message(each) for each in value):
        if predicted_text(Chat(tuple(value))).strip():
            return Chat(tuple(value))
        found = "no turn of the assistant"
        return Fault(place, "turns of the assistant, to be predicted", found, "leave it out")
    expected = f"in {name!r} a string, or messages with 'role' and 'content'"
    return Fault(place, expected, json.dumps(value, default=str)[:100], "correct this row")


def _is_message(value: Any) -> bool:
    texts = [value.get(key) for key in ("role", "content")] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) and not _SURROGATE.search(text) for text in texts)


def predicted_text(document: Document) -> str:
    """What is predicted of a document: all of it, or the assistant's turns one after another."""
    if isinstance(document, str):
        return document
    turns = (each["content"] for each in document.messages if each["role"] == "assistant")
    return "".join(turns)


def _words(document: Document) -> str:
    """A document's text, without the roles of a conversation."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document.messages)


def _content(file: Path) -> str:
    """The content of a UTF-8 file, which is not blank."""
    expected = "a UTF-8 text file"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise fail(str(file), expected, str(error), "give another file") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise fail(f"{file}:{line}", expected, str(error), "convert it to UTF-8") from error
    if not content.strip():
        raise fail(str(file), "a text", "an empty file", "give another file")
    return content


Rows = Iterator[tuple[str, dict[str, Any] | Fault]]
"""Places and rows, or what is wrong with them."""


def _jsonl_rows(file: Path) -> Rows:
    """The objects on the lines of a file; blank lines are skipped."""
    for number, line in enumerate(_content(file).removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            place = f"{file}:{number}"
            yield place, _json_row(line, place)


def _json_row(line: str, place: str) -> dict[str, Any] | Fault:
    expected = 'a JSON object such as {"text": "..."} on each line'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Fault(place, expected, f"no JSON: {error}", "correct this line")
    if isinstance(row, dict):
        return row
    return Fault(place, expected, f"a JSON {type(row).__name__}", "correct this line")


def _parquet_rows(file: Path) -> Rows:
    """The rows of a file."""
    try:
        from pyarrow import (  # pyright: ignore[reportMissingImports]
            ArrowException,
            parquet,
        )
    except ImportError as error:
        remedy = "pip install 'frankenmerge[parquet]', or convert the file to .jsonl"
        raise fail(str(file), "pyarrow, to read it", "not installed", remedy) from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, ArrowException) as error:
        raise fail(str(file), "a Parquet file", str(error), "give another file") from error
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))


ROWS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
"""Readers of files whose rows are documents, by suffix."""
SUFFIXES = (".txt", *ROWS)
"""Suffixes of the files that a folder is read for."""
