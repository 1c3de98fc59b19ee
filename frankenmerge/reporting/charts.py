"""Charts for a page, as SVG: data in, text out. What is shown by colour is also shown by shape or by words.

Widths are small, so that letters keep their size on a phone; the page's CSS colours them.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple, TypeGuard

WIDTH = 420
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "ring")


class Bar(NamedTuple):
    """A value with its interval, and another one to hold against it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    other: float | None = None
    said: str = ""
    """In words, beneath the label."""


class Line(NamedTuple):
    """Values block by block."""

    label: str
    points: Sequence[tuple[float, float | None]]
    style: int
    """Lines of one style have one colour and shape."""
    broken: bool = False
    """Drawn broken and without marks: what another line is held against."""


def bars(
    rows: Sequence[Bar], name: str, title: str, axis: str, *, value: str = "value", other: str = ""
) -> str:
    """Draw values as dots on their intervals, one below the other, with a line at 0.

    Args:
        rows: what to draw; values that are not finite are left out of the picture.
        name: begins the ids within.
        title: what a screen reader says first.
        axis: what is measured, with its unit.
        value: what the dot is, for the key.
        other: what the diamond is.
    """
    numbers = [
        part for row in rows for part in (row.value, row.low, row.high, row.other) if _finite(part)
    ]
    low, high, ticks = _scale([*numbers, 0.0])
    top, step, left, right = 30 if other else 10, 46, 10, 10
    bottom = top + step * len(rows)

    def x(number: float) -> float:
        return left + (number - low) / (high - low) * (WIDTH - left - right)

    parts = [f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>' for tick in ticks]
    parts.append(f'<path class="base" d="M{x(0):.1f} {top}V{bottom}"/>')
    for number, row in enumerate(rows):
        y = top + number * step
        parts.append(
            _text(
                left, y + 14, row.label if len(row.label) <= 44 else f"{row.label[:43]}…", "start"
            )
        )
        parts.append(_text(WIDTH - right, y + 14, row.said, "finish soft"))
        if _finite(row.low) and _finite(row.high):
            parts.append(f'<path class="span" d="M{x(row.low):.1f} {y + 30}H{x(row.high):.1f}"/>')
        if _finite(row.value):
            parts.append(f'<circle class="dot" cx="{x(row.value):.1f}" cy="{y + 30}" r="5"/>')
        if _finite(row.other):
            parts.append(_mark("diamond", x(row.other), y + 30, "hit"))
    parts += [
        _text(min(max(x(tick), 14), WIDTH - 14), bottom + 16, _number(tick), "soft")
        for tick in ticks
    ]
    parts.append(_text(WIDTH / 2, bottom + 34, axis, "soft"))
    if other:
        parts += [
            f'<circle class="dot" cx="{left + 6}" cy="12" r="5"/>',
            _text(left + 18, 16, value, "start soft"),
        ]
        parts += [
            _mark("diamond", WIDTH / 2, 12, "hit"),
            _text(WIDTH / 2 + 12, 16, other, "start soft"),
        ]
    told = "; ".join(f"{row.label}: {_spoken(row, other)}" for row in rows)
    return _svg(name, title, told, bottom + 42, parts)


def _spoken(row: Bar, other: str) -> str:
    told = _number(row.value) + (
        f", from {_number(row.low)} to {_number(row.high)}"
        if _finite(row.low) and _finite(row.high)
        else ""
    )
    return told + (f", {other} {_number(row.other)}" if _finite(row.other) else "")


def lines(
    series: Sequence[Line],
    name: str,
    title: str,
    axis: str,
    *,
    seams: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw values over blocks as lines, 0 in view, each with a shape of its own; seams as broken upright lines with their labels.

    Args:
        series: the lines; points that are missing or not finite break a line.
        name: begins the ids within.
        title: what a screen reader says first.
        axis: what is measured, with its unit.
        seams: (block position, label).
    """
    values = [value for line in series for _, value in line.points if _finite(value)]
    blocks = [block for line in series for block, _ in line.points]
    low, high, ticks = _scale([*values, 0.0])
    first, last = min(blocks, default=0), max(blocks, default=1)
    left, right, height = 44, 12, 170
    beside = 1 if any(len(line.label) > 26 for line in series) else 2
    top = 26 + 18 * math.ceil(len(series) / beside)
    bottom = top + height

    def x(block: float) -> float:
        return left + (block - first) / ((last - first) or 1) * (WIDTH - left - right)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * height

    parts = [f'<path class="grid" d="M{left} {y(tick):.1f}H{WIDTH - right}"/>' for tick in ticks]
    parts += [_text(left - 6, y(tick) + 4, _number(tick), "finish soft") for tick in ticks]
    for place, label in seams:
        parts.append(
            f'<path class="seamline" d="M{x(place):.1f} {top - 4}V{bottom}"/>'
            + _text(x(place), top - 8, label, "soft")
        )
    for number, line in enumerate(series):
        parts += _drawn(line, x, y)
        key = left + number % beside * 180, 12 + number // beside * 18
        sample = (
            f'<path class="line broken l{line.style % 6}" d="M{key[0] - 6} {key[1]}h14"/>'
            if line.broken
            else _symbol(line, *key)
        )
        parts.append(sample + _text(key[0] + 12, key[1] + 4, line.label, "start soft"))
    every = next((step for step in (1, 2, 4, 5, 10, 20, 50) if (last - first) / step <= 12), 100)
    parts += [
        _text(x(block), bottom + 16, f"{block:g}", "soft")
        for block in sorted(set(blocks))
        if block % every == 0
    ]
    parts.append(_text((left + WIDTH) / 2, bottom + 34, f"{axis}, by block of the result", "soft"))
    told = "; ".join(f"{line.label}: {_summed(line)}" for line in series)
    return _svg(name, title, told, bottom + 42, parts)


def _drawn(line: Line, x, y) -> Iterable[str]:
    known = [(block, value) for block, value in line.points if _finite(value)]
    for (a, start), (b, stop) in pairwise(line.points):
        if _finite(start) and _finite(stop):
            style = f"line{' broken' if line.broken else ''} l{line.style % 6}"
            yield f'<path class="{style}" d="M{x(a):.1f} {y(start):.1f}L{x(b):.1f} {y(stop):.1f}"/>'
    for block, value in (
        [] if line.broken else known if len(known) <= 40 else known[:: len(known) // 20]
    ):
        told = f"<title>{escape(line.label)}, block {block:g}: {_number(value)}</title>"
        yield _symbol(line, x(block), y(value), told)


def _symbol(line: Line, x: float, y: float, inner: str = "") -> str:
    return _mark(SHAPES[line.style % len(SHAPES)], x, y, f"m{line.style % 6}", inner)


def _summed(line: Line) -> str:
    known = [(value, block) for block, value in line.points if _finite(value)]
    if not known:
        return "no values"
    (low, at), (high, there) = min(known), max(known)
    return f"lowest {_number(low)} at block {at:g}, highest {_number(high)} at block {there:g}"


def _mark(shape: str, x: float, y: float, style: str, inner: str = "") -> str:
    if shape in ("circle", "ring"):
        hollow = " hollow" if shape == "ring" else ""
        return (
            f'<circle class="mark {style}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="4">{inner}</circle>'
        )
    path = {
        "square": "m-4 -4h8v8h-8z",
        "diamond": "m0 -6l6 6l-6 6l-6 -6z",
        "triangle": "m0 -5l5 9h-10z",
        "cross": "m-4 -4l8 8m0 -8l-8 8",
    }[shape]
    return f'<path class="mark {style} {shape}" d="M{x:.1f} {y:.1f}{path}">{inner}</path>'


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The ends of an axis that holds all values, and round places on it."""
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


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value + 0:.4g}"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""


def _svg(name: str, title: str, told: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}" role="img"'
    head += f' aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(told)}</desc>'
    return head + "".join(parts) + "</svg>"
