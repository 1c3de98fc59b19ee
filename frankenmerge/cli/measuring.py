"""Options that say what to measure on: texts, or tokens that the donors generate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.evaluation.items import Item
    from frankenmerge.workflows.measuring import GainOn, On

SAMPLED = "sampled"
"""Given instead of a text: tokens that the donors generate."""


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


def measured_on(values: tuple[str, ...]) -> "On | None":
    """What to measure on: None for nothing, `sampled`, or texts."""
    if not values:
        return None
    if values == (SAMPLED,):
        return "sampled"
    from frankenmerge.evaluation.documents import read_text

    return [read_text(Path(value)) for value in values]


def gains_on(values: tuple[str, ...]) -> "GainOn":
    """What to measure gains on; `sampled` where nothing is named.

    Raises FrankenmergeError for texts beside tasks: their losses have no common unit.
    """
    tasks = [value for value in values if _is_task(value)]
    if not tasks:
        return measured_on(values) or "sampled"
    if len(tasks) < len(values):
        expected, found = "either texts or tasks", ", ".join(values)
        raise fail("--on", expected, found, "measure on one kind at a time")
    from frankenmerge.evaluation.items import Task

    return [Task(value, _items(value)) for value in tasks]


def _is_task(value: str) -> bool:
    """Whether a value is a task: a file of items, a task's YAML, or a name that is no file's."""
    path = Path(value)
    named = not (value == SAMPLED or path.suffix or path.exists())
    return named or path.suffix in (".jsonl", ".yaml", ".yml")


def _items(value: str) -> "list[Item]":
    from frankenmerge.evaluation.items import read_items

    if Path(value).suffix == ".jsonl":
        return read_items(Path(value))
    from frankenmerge.evaluation.harness import harness_items

    return harness_items(value)
