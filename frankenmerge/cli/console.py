"""What the commands share: tables on standard output, progress on standard error, options."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
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
    help="Convert donors without safetensors once (weights only; pickled code is never executed).",
)
_QUIET = "frankenmerge.quiet"
_PNG_PACKAGES = ("resvg_py", "matplotlib")
"""The renderer, and the package with its font. SVG needs neither."""


def _set_quiet(context: click.Context, _parameter: click.Parameter, quiet: bool) -> None:
    context.meta[_QUIET] = quiet
    if quiet:  # progress bars of libraries
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


quiet_option = click.Option(
    ["--quiet"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_quiet,
    help="Show results only, without progress bars.",
)
"""Added to every command."""
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Torch device, or `auto` to use all that are available.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Data type to compute in.",
)


def _sizes(
    _context: Any, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[int | str, str] | None:
    """Read `0=20GiB`, which may be repeated for several devices."""
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
    help="With --device auto, the memory to use on a device (0, 1, ..., cpu), such as 0=20GiB. "
    "May be repeated.",
)
offload_option = click.option(
    "--offload",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --device auto, a folder for weights that fit into no memory.",
)


def _writable(_context: Any, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before anything is computed."""
    if path:
        check_place(path)
    return path


def output_option(what: str, *, required: bool = True) -> Callable:
    """`-o FILE`, refused at once if it cannot be written; `what` is its help."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=required,
        callback=_writable,
        help=what,
    )


def need_png(option: str) -> None:
    """Raise FrankenmergeError if the packages that write PNG are not installed."""
    missing = [name for name in _PNG_PACKAGES if find_spec(name) is None]
    if missing:
        raise fail(
            option,
            "the packages of the extra `plots`, which write PNG",
            f"not installed: {', '.join(missing)}",
            "pip install 'frankenmerge[plots]', or omit the option",
        )


def check_plot(option: str, path: Path) -> None:
    """Raise FrankenmergeError for a figure that cannot be written, before anything is computed."""
    if path.suffix not in (".png", ".svg"):
        expected, remedy = "a file name that ends in .png or .svg", "choose another name"
        raise fail(option, expected, str(path), remedy)
    if path.suffix == ".png":
        need_png(option)


def numbers(_context: Any, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Read `1,4,8` and `0-3`; both ends of a range are included."""
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
        raise click.BadParameter(
            f"{value!r}: write numbers from 0, such as 1,4,8 or 0-3", param=parameter
        )
    return list(dict.fromkeys(found))


def refuse_others(
    context: click.Context, method: str, meant_for: dict[str, tuple[str, ...]]
) -> None:
    """Raise FrankenmergeError for options that were set and do not apply to a method.

    Args:
        context: of the command.
        method: the value of its --method.
        meant_for: the methods that an option applies to; those that are missing apply to all.
    """
    raise_all(
        Fault(
            option.opts[0],
            f"--method {' or '.join(methods)}",
            f"--method {method}",
            "omit the option, or choose another method",
        )
        for option in context.command.params
        if method not in (methods := meant_for.get(option.name or "", (method,)))
        and context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
    )


class _Console(Console):
    """A console that shows control characters in names and values instead of obeying them."""

    def render_str(self, text: str, **how: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render text; control characters other than line ends are escaped."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **how)


def out() -> Console:
    """Standard output: no markup unless asked for; 80 columns and no colour without a terminal."""
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


def print_remarks(remarks: Iterable[str]) -> None:
    """Print what is worth knowing about the donors on standard error, unless it is quiet."""
    context = click.get_current_context(silent=True)
    if own_rank().first and not (context is not None and context.meta.get(_QUIET, False)):
        for remark in remarks:
            click.echo(f"Note: {visible(remark)}", err=True)


def table(title: str, *columns: str) -> Table:
    """An empty table: first column left-aligned, the others right-aligned; long cells fold."""
    empty = Table(
        title=title, title_justify="left", title_style="bold", min_width=min(len(title) + 1, 79)
    )
    for number, column in enumerate(columns):
        empty.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return empty


def size(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class _Rate(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Show the rate."""
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        digits = 0 if rate >= 10 else 2
        text = size(rate) if self.unit == "bytes" else f"{rate:,.{digits}f} {self.unit}"
        return Text(f"{text}/s", style="dim")


@contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show a bar on standard error, with rate and time left; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(unit), TimeRemainingColumn())
    console = Console(stderr=True)
    context = click.get_current_context(silent=True)
    hidden = not (console.is_terminal and own_rank().first) or (
        context is not None and context.meta.get(_QUIET, False)
    )
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, advance=done)
