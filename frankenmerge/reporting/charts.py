"""Charts of intervals and of values by block: data in, a drawing out.

What colour shows is also shown by shape or in words. Widths are small, so that letters keep their
size on a phone.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple, TypeGuard

from frankenmerge.reporting.svg import Drawing, text

WIDTH = 420
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "ring")
_HOLLOW = ("cross", "ring")
_LEFT, _RIGHT, _PLOT_HEIGHT = 44, 12, 170
_LETTERS = 54
"""Letters of the text size that fit in a line."""


class Bar(NamedTuple):
    """A value with its interval, and another value to compare it with."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    other: float | None = None
    verdict: str = ""
    """In words, at the right of the label."""


class Line(NamedTuple):
    """Values by block."""

    label: str
    points: Sequence[tuple[float, float | None]]
    style: int
    """Lines of one style have one colour and shape."""
    broken: bool = False
    """Broken and without marks: what another line is compared with."""


def bars(
    rows: Sequence[Bar], title: str, axis: str, *, value: str = "value", other: str = ""
) -> Drawing:
    """Draw values as dots on their intervals, one below the other, with a line at 0.

    Args:
        rows: what to draw; values that are not finite are left out.
        title: what the chart shows.
        axis: the quantity and its unit.
        value: what the dot is, for the legend.
        other: what the diamond is.
    """
    numbers = [
        part for row in rows for part in (row.value, row.low, row.high, row.other) if _finite(part)
    ]
    low, high, ticks = axis_scale([*numbers, 0.0])
    top, step, margin = 30 if other else 10, 46, 10
    bottom = top + step * len(rows)

    def x(number: float) -> float:
        return margin + (number - low) / (high - low) * (WIDTH - 2 * margin)

    elements = [f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>' for tick in ticks]
    elements.append(f'<path class="base" d="M{x(0):.1f} {top}V{bottom}"/>')
    for number, row in enumerate(rows):
        y = top + number * step
        room = min(44, _LETTERS - len(row.verdict))
        label = row.label if len(row.label) <= room else f"{row.label[: room - 1]}…"
        elements.append(text(margin, y + 14, label, "start"))
        elements.append(text(WIDTH - margin, y + 14, row.verdict, "finish soft"))
        if _finite(row.low) and _finite(row.high):
            span = f"M{x(row.low):.1f} {y + 30}H{x(row.high):.1f}"
            elements.append(f'<path class="span" d="{span}"/>')
        if _finite(row.value):
            elements.append(f'<circle class="dot" cx="{x(row.value):.1f}" cy="{y + 30}" r="5"/>')
        if _finite(row.other):
            elements.append(_mark("diamond", x(row.other), y + 30, "hit"))
    for tick in ticks:
        place = min(max(x(tick), 14), WIDTH - 14)
        elements.append(text(place, bottom + 16, short_number(tick), "soft"))
    elements.append(text(WIDTH / 2, bottom + 34, axis, "soft"))
    if other:
        elements += [
            f'<circle class="dot" cx="{margin + 6}" cy="12" r="5"/>',
            text(margin + 18, 16, value, "start soft"),
            _mark("diamond", WIDTH / 2, 12, "hit"),
            text(WIDTH / 2 + 12, 16, other, "start soft"),
        ]
    description = "; ".join(f"{row.label}: {_in_words(row, other)}" for row in rows) or "no values"
    return Drawing("chart", title, description, WIDTH, bottom + 42, "".join(elements))


def _in_words(row: Bar, other: str) -> str:
    words = short_number(row.value)
    if _finite(row.low) and _finite(row.high):
        words += f", from {short_number(row.low)} to {short_number(row.high)}"
    return words + (f", {other} {short_number(row.other)}" if _finite(row.other) else "")


class _Frame(NamedTuple):
    """The axes of a chart by block, and where they are in the drawing."""

    first: float
    last: float
    """Blocks."""
    low: float
    high: float
    """Values."""
    top: float

    def x(self, block: float) -> float:
        share = (block - self.first) / ((self.last - self.first) or 1)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * _PLOT_HEIGHT

    @property
    def bottom(self) -> float:
        return self.top + _PLOT_HEIGHT


def lines(
    series: Sequence[Line],
    title: str,
    axis: str,
    *,
    seams: Sequence[tuple[float, str]] = (),
    by: str = "block of the result",
) -> Drawing:
    """Draw values by block as lines, each with a shape of its own; 0 is in view.

    Args:
        series: the lines; points that are missing or not finite interrupt a line.
        title: what the chart shows.
        axis: the quantity and its unit.
        seams: (position in blocks, label); drawn as broken vertical lines.
        by: what is counted in place of blocks.
    """
    values = [value for line in series for _, value in line.points if _finite(value)]
    blocks = [block for line in series for block, _ in line.points]
    low, high, ticks = axis_scale([*values, 0.0])
    columns = 1 if any(len(line.label) > 22 for line in series) else 2
    top = 26 + 18 * math.ceil(len(series) / columns)
    frame = _Frame(min(blocks, default=0), max(blocks, default=1), low, high, top)
    elements = [
        f'<path class="grid" d="M{_LEFT} {frame.y(tick):.1f}H{WIDTH - _RIGHT}"/>' for tick in ticks
    ]
    elements += [
        text(_LEFT - 6, frame.y(tick) + 4, short_number(tick), "finish soft") for tick in ticks
    ]
    for block, label in seams:
        seam = f"M{frame.x(block):.1f} {top - 4}V{frame.bottom}"
        elements.append(f'<path class="seamline" d="{seam}"/>')
        elements.append(text(frame.x(block), top - 8, label, "soft"))
    for number, line in enumerate(series):
        elements += _line(line, frame)
        elements += _legend(line, _LEFT + number % columns * 180, 12 + number // columns * 18)
    elements += _block_numbers(sorted(set(blocks)), frame)
    caption = f"{axis}, by {by}"
    elements.append(text((_LEFT + WIDTH) / 2, frame.bottom + 34, caption, "soft"))
    description = (
        "; ".join(f"{line.label}: {_extremes(line, by.split()[0])}" for line in series)
        or "no values"
    )
    return Drawing("chart", title, description, WIDTH, frame.bottom + 42, "".join(elements))


def _line(line: Line, frame: _Frame) -> Iterator[str]:
    known = [(block, value) for block, value in line.points if _finite(value)]
    style = f"line{' broken' if line.broken else ''} l{line.style % 6}"
    for (a, start), (b, stop) in pairwise(line.points):
        if _finite(start) and _finite(stop):
            path = f"M{frame.x(a):.1f} {frame.y(start):.1f}L{frame.x(b):.1f} {frame.y(stop):.1f}"
            yield f'<path class="{style}" d="{path}"/>'
    if line.broken:
        return
    for block, value in known if len(known) <= 40 else known[:: len(known) // 20]:
        title = f"<title>{escape(line.label)}, block {block:g}: {short_number(value)}</title>"
        yield _symbol(line, frame.x(block), frame.y(value), title)


def _legend(line: Line, x: float, y: float) -> Iterator[str]:
    if line.broken:
        yield f'<path class="line broken l{line.style % 6}" d="M{x - 6} {y}h14"/>'
    else:
        yield _symbol(line, x, y)
    yield text(x + 12, y + 4, line.label, "start soft")


_EVERY = (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Distances of numbers on an axis."""


def _block_numbers(blocks: Sequence[float], frame: _Frame) -> Iterator[str]:
    extent = frame.last - frame.first
    every = next((step for step in _EVERY if extent / step <= 12), 10**6)
    for block in blocks:
        if block % every == 0:
            yield text(frame.x(block), frame.bottom + 16, f"{block:g}", "soft")


def _symbol(line: Line, x: float, y: float, inner: str = "") -> str:
    shape = SHAPES[line.style % len(SHAPES)]
    return _mark(shape, x, y, f"{'l' if shape in _HOLLOW else 'f'}{line.style % 6}", inner)


def _extremes(line: Line, unit: str) -> str:
    known = [(value, block) for block, value in line.points if _finite(value)]
    if not known:
        return "no values"
    (low, low_block), (high, high_block) = min(known), max(known)
    lowest = f"lowest {short_number(low)} at {unit} {low_block:g}"
    return f"{lowest}, highest {short_number(high)} at {unit} {high_block:g}"


def _mark(shape: str, x: float, y: float, style: str, inner: str = "") -> str:
    if shape in ("circle", "ring"):
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
        return f'<circle class="mark {shape} {style}" {place}>{inner}</circle>'
    path = {
        "square": "m-4 -4h8v8h-8z",
        "diamond": "m0 -6l6 6l-6 6l-6 -6z",
        "triangle": "m0 -5l5 9h-10z",
        "cross": "m-4 -4l8 8m0 -8l-8 8",
    }[shape]
    return f'<path class="mark {shape} {style}" d="M{x:.1f} {y:.1f}{path}">{inner}</path>'


def axis_scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The ends of an axis with all values on it, and its ticks."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def short_number(value: float | None) -> str:
    """Four digits, or `none`."""
    return "none" if value is None else f"{value + 0:.4g}"
