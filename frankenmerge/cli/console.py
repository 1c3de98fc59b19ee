"""What the commands share: tables on standard output, progress on standard error, common options."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from frankenmerge.distributed import own_rank
from frankenmerge.errors import Fault, fail, raise_all, visible
from frankenmerge.progress import Advance
from frankenmerge.storage.atomic import check_place

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
download_option = click.option(
    "--download", is_flag=True, help="Fetch hub ids that are not in the local cache."
)
pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Convert donors that have no safetensors, once, running nothing that their pickles hold.",
)
_QUIET = "frankenmerge.quiet"


def _hush(context: click.Context, _parameter: click.Parameter, quiet: bool) -> None:
    context.meta[_QUIET] = quiet
    if quiet:  # the bars of the libraries beneath
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


quiet_option = click.Option(
    ["--quiet"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_hush,
    help="Show no progress, only results.",
)
"""Every command has it."""
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="A torch device, or `auto`: whatever there is, several where they are needed.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The type to compute in.",
)


def _sizes(
    _context: Any, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[int | str, str] | None:
    """Read an option's `0=20GiB`, given for several devices."""
    pairs = [value.partition("=") for value in values]
    if unclear := [
        value
        for value, (device, _, amount) in zip(values, pairs, strict=True)
        if not (device and amount)
    ]:
        raise click.BadParameter(
            f"{unclear[0]!r}: write a device and a size, such as 0=20GiB or cpu=60GiB",
            param=parameter,
        )
    return {
        int(device) if device.isdigit() else device: amount for device, _, amount in pairs
    } or None


max_memory_option = click.option(
    "--max-memory",
    multiple=True,
    callback=_sizes,
    metavar="DEVICE=SIZE",
    help="With --device auto, how much of a device (0, 1, ..., cpu) may be used, such as 0=20GiB; may be repeated.",
)
offload_option = click.option(
    "--offload",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --device auto, a folder for weights that fit nowhere else.",
)


def _writable(_context: Any, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before anything is computed."""
    if path:
        check_place(path)
    return path


def output_option(what: str, *, required: bool = True) -> Callable:
    """`-o FILE`, refused at once where it could not be written; `what` is its help."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=required,
        callback=_writable,
        help=what,
    )


def need_matplotlib(option: str) -> None:
    """Raise FrankenmergeError where an option is given that draws and the extra for that is not installed."""
    if find_spec("matplotlib") is None:
        raise fail(
            option,
            "matplotlib, to draw with",
            "it is not installed",
            "pip install 'frankenmerge[plots]', or leave the option out",
        )


def numbers(_context: Any, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Read an option's `1,4,8` and `0-3`, ends included."""
    if value is None:
        return None
    found: list[int] = []
    try:
        for part in value.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r}: write numbers and ranges, such as 1,4,8 or 0-3", param=parameter
        ) from error
    if not found or min(found) < 0:
        raise click.BadParameter(f"{value!r} names nothing", param=parameter)
    return list(dict.fromkeys(found))


def refuse_others(
    context: click.Context, method: str, meant_for: dict[str, tuple[str, ...]]
) -> None:
    """Raise FrankenmergeError for options that were given and mean nothing to a method; `meant_for` tells the methods of each."""
    raise_all(
        Fault(
            option.opts[0],
            f"--method {' or '.join(methods)}",
            f"--method {method}",
            "leave the option out, or choose another method",
        )
        for option in context.command.params
        if method not in (methods := meant_for.get(option.name or "", (method,)))
        and context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
    )


class _Console(Console):
    """A console that shows what a donor's names and values hold, and obeys none of it."""

    def render_str(self, text: str, **how: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lines are text; whatever else a terminal would obey is written out."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **how)


def out() -> Console:
    """Standard output, in which no markup is read unless asked; plain and 80 columns wide where it is no terminal."""
    console = _Console(highlight=False, markup=False)
    return console if console.is_terminal else _Console(highlight=False, markup=False, width=80)


def print_json(value: Any) -> None:
    """Print one JSON object."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(
        "".join(
            letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1]
            for letter in text
        )
    )


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column to the left, the others to the right; long cells fold."""
    made = Table(
        title=title, title_justify="left", title_style="bold", min_width=min(len(title) + 1, 79)
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class _Rate(ProgressColumn):
    """Units done per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Show the rate."""
        rate = task.finished_speed or task.speed
        told = (
            ""
            if not rate
            else f"{size(rate)}/s"
            if self.unit == "bytes"
            else f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s"
        )
        return Text(told, style="dim")


@contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show a bar on standard error, with rate and time left; yields what to call with the units done."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(unit), TimeRemainingColumn())
    console = Console(stderr=True)
    context = click.get_current_context(silent=True)
    hidden = not (console.is_terminal and own_rank().first) or (
        context is not None and context.meta.get(_QUIET, False)
    )
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, advance=done)
