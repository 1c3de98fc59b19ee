"""Options that say what to measure on: texts, or tokens that the donors generate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from frankenmerge.workflows.measuring import On

SAMPLED = "sampled"
"""Given instead of a text: tokens that the donors generate."""


def measuring_option(option: str, description: str) -> Any:
    """An option that says what to measure on: texts, or tokens that the donors generate."""
    return click.option(
        option,
        multiple=True,
        metavar=f"TEXT|{SAMPLED}",
        callback=_texts,
        help=f"{description} May be repeated.",
    )


def _texts(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    if SAMPLED in values and len(values) > 1:
        raise click.BadParameter(f"give either {SAMPLED!r} or texts, not both")
    return values


def measured_on(values: tuple[str, ...]) -> "On | None":
    """What to measure on: None for nothing, `sampled`, or texts."""
    if not values:
        return None
    if values == (SAMPLED,):
        return "sampled"
    from frankenmerge.evaluation.bench import read_text

    return [read_text(Path(value)) for value in values]
