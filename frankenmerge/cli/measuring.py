"""Options that say what to measure on: texts, or tokens that the donors generate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import print_remarks
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from frankenmerge.evaluation.documents import Text
    from frankenmerge.evaluation.items import Item
    from frankenmerge.workflows.measuring import GainOn, On

SAMPLED = "sampled"
"""Given instead of a text: tokens that the donors generate."""


TEXT_HELP = (
    "A text: a file, a folder of .txt, .jsonl and .parquet, or hub:OWNER/NAME/PATH. A row is a "
    "document: its field 'text' or 'messages', or FIELD as in FILE.jsonl:FIELD."
)
"""What a text is."""


def _separator(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Reads the escapes of shells and programs for line ends and tabs."""
    if value == "":
        raise click.BadParameter("it is empty")
    return value and value.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


separator_option: Any = click.option(
    "--separator",
    metavar="STRING",
    callback=_separator,
    help="What lies between the documents of a text file, such as '<|endoftext|>', or '\\n\\n' for "
    "a blank line. [default: a file is one document]",
)


def _texts(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    if SAMPLED in values and len(values) > 1:
        raise click.BadParameter(f"give either {SAMPLED!r} or texts, not both")
    return values


def measuring_option(option: str, description: str) -> Any:
    """An option that says what to measure on: texts, or tokens that the donors generate."""
    return click.option(
        option,
        multiple=True,
        metavar=f"TEXT|{SAMPLED}",
        callback=_texts,
        help=f"{description} May be repeated.",
    )


def gain_option(option: str, description: str) -> Any:
    """An option that says what gains are measured on: also tasks of multiple choice."""
    return click.option(
        option,
        multiple=True,
        metavar=f"TEXT|TASK|{SAMPLED}",
        callback=_texts,
        help=f"{description} A task is a JSONL file of items with context, choices and answer, or "
        "one of lm-evaluation-harness by name. May be repeated.",
    )


def measured_on(values: tuple[str, ...], separator: str | None, *, download: bool) -> "On | None":
    """What to measure on: None for nothing, `sampled`, or texts of documents."""
    if not values:
        return None
    if values == (SAMPLED,):
        return "sampled"
    return read_texts(values, separator, download=download)


def read_texts(
    values: "Sequence[str | Path]", separator: str | None, *, download: bool
) -> "list[Text]":
    """The texts of files and folders; remarks on those in which `separator` does not occur."""
    from frankenmerge.evaluation.documents import read_text

    texts = [read_text(Path(value), separator, download=download) for value in values]
    if separator:
        print_remarks(
            f"{text.name}: --separator {separator!r} does not occur, and all of it is one document"
            for text in texts
            if not text.parts
        )
    return texts


def gains_on(values: tuple[str, ...], separator: str | None, *, download: bool) -> "GainOn":
    """What to measure gains on; `sampled` where nothing is named.

    Raises FrankenmergeError for texts beside tasks: their losses have no common unit.
    """
    tasks = [value for value in values if _is_task(value)]
    if not tasks:
        return measured_on(values, separator, download=download) or "sampled"
    if len(tasks) < len(values):
        expected, found = "either texts or tasks", ", ".join(values)
        raise fail("--on", expected, found, "measure on one kind at a time")
    from frankenmerge.evaluation.items import Task

    return [Task(value, _items(value)) for value in tasks]


def _is_task(value: str) -> bool:
    """Whether a value is a task: a file of items, a task's YAML, or a name that is no file's."""
    from frankenmerge.evaluation.documents import has_documents, is_on_hub

    path = Path(value)
    if is_on_hub(path):
        return False
    named = not (value == SAMPLED or path.suffix or path.exists())
    items = path.suffix == ".jsonl" and not has_documents(path)
    return named or items or path.suffix in (".yaml", ".yml")


def _items(value: str) -> "list[Item]":
    from frankenmerge.evaluation.items import read_items

    if Path(value).suffix == ".jsonl":
        return read_items(Path(value))
    from frankenmerge.evaluation.harness import harness_items

    return harness_items(value)
