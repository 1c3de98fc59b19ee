"""JSON artefacts on disk: a model of the whole file, written completely and checked when read."""

import json
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError

from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.storage.atomic import write_file
from frankenmerge.storage.safetensors_header import read_json

_REPORTED = 5
"""How many faults of one file are reported."""


class Record(BaseModel):
    """An object of a JSON artefact.

    Fields are written in the order in which the class declares them, and only those that were set:
    a field that a file of an older version lacks is not invented when the record is written again.
    Keys that the class does not declare are ignored when a file is read, so that the file of a
    newer version can be shown, and are never written.
    """

    def as_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True, warnings="error")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build a record; a value of None is left unset, and therefore not written."""
        return cls(**{name: value for name, value in values.items() if value is not None})


RecordType = TypeVar("RecordType", bound=Record)


def dump_json(record: Record, *, indent: int) -> bytes:
    """The content of the record's file: UTF-8, ends with a line break."""
    return (json.dumps(record.as_json(), indent=indent, ensure_ascii=False) + "\n").encode()


def save_json(record: Record, path: Path, *, indent: int) -> None:
    """Write the record's file. Raises FrankenmergeError when it cannot be written."""
    write_file(path, dump_json(record, indent=indent))


def load_json(path: Path, record: type[RecordType], kind: str, expected: str) -> RecordType:
    """Read a JSON artefact.

    Args:
        path: the file.
        record: the model of the whole file.
        kind: the kind that this version writes, `frankenmerge.NAME/VERSION`.
        expected: what the file should be, for messages.

    Raises:
        FrankenmergeError: for a file that is missing, no JSON, of another kind or of a newer
            version, or whose fields are missing or broken.
    """
    if not path.exists():
        raise fail(str(path), expected, "no such file", "check the path")
    return parse_json(read_json(path, expected), str(path), record, kind, expected)


def parse_json(
    content: Any, place: str, record: type[RecordType], kind: str, expected: str
) -> RecordType:
    """Check parsed JSON, as `load_json` does; messages name `place`."""
    if not isinstance(content, dict):
        found = f"a JSON {type(content).__name__}, not an object"
        raise fail(place, expected, found, "choose another file")
    if fault := _kind_fault(content, place, record, kind, expected):
        raise FrankenmergeError(fault)
    try:
        return record.model_validate(content)
    except ValidationError as error:
        faults = [
            Fault(
                ": ".join(filter(None, [place, ".".join(map(str, each["loc"]))])),
                *_expectation(each["type"], each["msg"], each["input"]),
                "write the file again with the command that made it",
            )
            for each in error.errors(include_url=False)[:_REPORTED]
        ]
        raise FrankenmergeError(*faults) from error


def is_kind(content: Any, kind: str) -> bool:
    """Whether parsed JSON is meant to be of a kind, of this version or another."""
    stated = content.get("kind", "") if isinstance(content, dict) else ""
    return str(stated).startswith(kind.rpartition("/")[0] + "/")


def _kind_fault(
    content: dict[str, Any], place: str, record: type[Record], kind: str, expected: str
) -> Fault | None:
    """The fault of a file whose `kind` is another one; only some files say what they are."""
    if "kind" not in content and "kind" not in record.model_fields:
        return None
    stated = str(content.get("kind", "none"))[:100]
    if stated == kind:
        return None
    name, _, version = kind.rpartition("/")
    stated_name, _, stated_version = stated.rpartition("/")
    newer = (
        stated_name == name and stated_version.isdecimal() and int(stated_version) > int(version)
    )
    remedy = (
        "update frankenmerge: a newer version wrote this file" if newer else "choose another file"
    )
    return Fault(f"{place}: kind", f"{kind} ({expected})", stated, remedy)


def _expectation(error_type: str, message: str, value: Any) -> tuple[str, str]:
    """What a validation error expected and what it found."""
    if error_type == "missing":
        return "this field", "no such field"
    expected = message.removeprefix("Input should be ")
    return expected[:1].lower() + expected[1:], repr(value)[:100]
