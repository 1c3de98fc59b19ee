"""The diagram of a splice: which donor's block goes where. Geometry first, then SVG."""

import unicodedata
from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from frankenmerge.artefacts.recipe import Recipe

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("#2a6ca3", "#ad5a10", "#3c7a4b", "#8551a3", "#a8415f", "#5f6673")
"""Donors' colours on a light ground, in their order; white text on them is legible (contrast 4.5 or
more).
"""
DARK_COLOURS = ("#7db7e8", "#eda45c", "#8ccb9b", "#c8a2e0", "#ee97ae", "#b3bac6")
"""The same on a dark ground; dark text on them is legible."""
_COLUMN, _RESULT, _GAP, _TOP, _EDGE, _TICK = 62, 104, 74, 58, 34, 12
_TALL = 13
"""From this height on a block has room for its number."""


class Piece(NamedTuple):
    """Consecutive blocks of one donor."""

    donor: str
    start: int
    stop: int


class Cell(NamedTuple):
    """A rectangle of a donor's column or of the result."""

    x: float
    y: float
    width: float
    height: float
    donor: int
    label: str
    used: bool = True


class Ribbon(NamedTuple):
    """The band from a donor's blocks to where they go: two sides, each (x, upper y, lower y)."""

    donor: int
    source: tuple[float, float, float]
    target: tuple[float, float, float]


class Layout(NamedTuple):
    """Positions of everything in the diagram; y grows downwards, the input is on top."""

    width: float
    height: float
    donors: list[str]
    columns: list[Cell]
    """Each donor's blocks, one cell a block."""
    slices: list[Cell]
    """The result, one cell a slice and source."""
    blocks: int
    block_height: float
    ribbons: list[Ribbon]
    seams: list[float]
    """The y of every seam."""
    heads: list[float]
    """The middle x of each donor's column."""
    middle: float
    """The middle x of the result."""


def pieces_of(recipe: Recipe, depths: Mapping[str, int]) -> list[list[Piece]]:
    """Return the sources of every slice; whole models are one slice.

    Empty where a whole model's depth is not known.
    """
    if wholes := recipe.stack.models:
        known = all(whole.model in depths for whole in wholes)
        return [[Piece(whole.model, 0, depths[whole.model]) for whole in wholes]] if known else []
    return [
        [Piece(source.model, *source.layer_range) for source in part.sources]
        for part in recipe.parts
    ]


def layout(slices: list[list[Piece]], depths: Mapping[str, int]) -> Layout:
    """Place donors alternately left and right of the result.

    Args:
        slices: the sources of every slice, as `pieces_of` gives them; at least one.
        depths: blocks of donors by name; of others only as many are drawn as are used.
    """
    pieces = [piece for part in slices for piece in part]
    donors = list(dict.fromkeys(piece.donor for piece in pieces))
    longest = {
        name: max([piece.stop for piece in pieces if piece.donor == name] + [depths.get(name, 0)])
        for name in donors
    }
    blocks = sum(part[0].stop - part[0].start for part in slices)
    high = min(24.0, max(5.0, 560 / max([blocks, *longest.values()])))
    step, left, right = _COLUMN + _GAP, (len(donors) + 1) // 2, len(donors) // 2
    middle = _EDGE + left * step + _RESULT / 2
    heads = [
        middle + (-1 if n % 2 == 0 else 1) * (_RESULT / 2 + _GAP + _COLUMN / 2 + n // 2 * step)
        for n in range(len(donors))
    ]
    tallest = max(blocks, *longest.values()) * high
    tops = [_TOP + (tallest - longest[name] * high) / 2 for name in donors]
    used = {(piece.donor, index) for piece in pieces for index in range(piece.start, piece.stop)}
    columns = [
        _column_cell(n, index, heads[n], tops[n], high, used=(name, index) in used)
        for n, name in enumerate(donors)
        for index in range(longest[name])
    ]
    made, ribbons, seams, y = [], [], [], _TOP + (tallest - blocks * high) / 2
    for number, part in enumerate(slices):
        height, share = (part[0].stop - part[0].start) * high, _RESULT / len(part)
        if number and not _continues(slices[number - 1], part):
            seams.append(y)
        for place, piece in enumerate(part):
            n = donors.index(piece.donor)
            x = middle - _RESULT / 2 + place * share
            made.append(Cell(x, y, share, height, n, f"{LETTERS[n % 26]} {_span(piece)}"))
            side = 1 if heads[n] < middle else -1
            source = (
                heads[n] + side * _COLUMN / 2,
                tops[n] + piece.start * high,
                tops[n] + piece.stop * high,
            )
            ribbons.append(Ribbon(n, source, (middle - side * _RESULT / 2, y, y + height)))
        y += height
    width = 2 * _EDGE + (left + right) * step + _RESULT
    return Layout(
        width,
        _TOP + tallest + 28,
        donors,
        columns,
        made,
        blocks,
        high,
        ribbons,
        seams,
        heads,
        middle,
    )


def _column_cell(
    donor: int, index: int, head: float, top: float, high: float, *, used: bool
) -> Cell:
    """The cell of one block in its donor's column."""
    left = head - _COLUMN / 2
    return Cell(left, top + index * high, _COLUMN, high, donor, str(index), used)


def _continues(before: list[Piece], after: list[Piece]) -> bool:
    """Whether every source continues where it stopped, so that there is no seam."""
    return [(piece.donor, piece.stop) for piece in before] == [
        (piece.donor, piece.start) for piece in after
    ]


def _span(piece: Piece) -> str:
    return str(piece.start) if piece.stop - piece.start == 1 else f"{piece.start}–{piece.stop - 1}"


def described(slices: list[list[Piece]]) -> str:
    """The diagram in words."""
    parts, position = [], 0
    for part in slices:
        count = part[0].stop - part[0].start
        here = _span(Piece("", position, position + count))
        sources = " merged with ".join(
            f"{visible(Path(piece.donor).name)} {_span(piece)}" for piece in part
        )
        parts.append(f"{here} from {sources}")
        position += count
    return f"The result has {position} blocks: {'; '.join(parts)}."


def visible(text: str) -> str:
    """Escape control, format and bidirectional characters and lone surrogates by their codes."""
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c
        for c in text
    )


STYLE = (
    ".splice{--ink:#1d2330;--soft:#5b6372;--rest:#e3e6ec;--ground:#fff;"
    "font:12px system-ui,sans-serif}"
    ".splice text{fill:var(--ink);text-anchor:middle}"
    ".splice .soft{fill:var(--soft)}.splice .rest{fill:var(--rest)}"
    ".splice .on{fill:var(--ground)}.splice .cut{stroke:var(--ground);stroke-width:.7}"
    ".splice .seam{stroke:var(--ink);stroke-width:2}"
    ".splice .knob{fill:var(--ground);stroke:var(--ink);stroke-width:1.5}"
    ".splice .letter{font-weight:700;font-size:15px}.splice .small{font-size:10px}"
    + "".join(f".splice .d{n}{{fill:{colour}}}" for n, colour in enumerate(COLOURS))
    + "@media screen and (prefers-color-scheme:dark){"
    ".splice{--ink:#e8eaf0;--soft:#a3abba;--rest:#323948;--ground:#161a22}"
    + "".join(f".splice .d{n}{{fill:{colour}}}" for n, colour in enumerate(DARK_COLOURS))
    + "}"
)
"""CSS of the diagram, light and dark; an SVG that is a file contains it."""


def svg(
    slices: list[list[Piece]], depths: Mapping[str, int], name: str, *, alone: bool = True
) -> str:
    """Return the diagram as SVG, named and described for screen readers.

    Args:
        slices: what to draw, as `pieces_of` gives it.
        depths: blocks of donors by name, where they are known.
        name: begins the ids in it, so that one page can contain several.
        alone: whether the SVG is a file of its own, which carries `STYLE` and its namespace.
    """
    found = layout(slices, depths)
    width, height = f"{found.width:g}", f"{found.height:g}"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg class="splice" {size} role="img" aria-labelledby="{name}-t {name}-d"'
    head += ' xmlns="http://www.w3.org/2000/svg">' if alone else ">"
    style = f"<style>{STYLE}</style>" if alone else ""
    title = f'<title id="{name}-t">Which block comes from where</title>'
    title += f'<desc id="{name}-d">{escape(described(slices))}</desc>'
    return head + title + style + "".join(_parts(found)) + "</svg>\n"


def _parts(found: Layout) -> Iterator[str]:
    for ribbon in found.ribbons:
        (x, up, down), (to, upper, lower) = ribbon.source, ribbon.target
        bend = (x + to) / 2
        there = f"M{x:g} {up:g}C{bend:g} {up:g} {bend:g} {upper:g} {to:g} {upper:g}V{lower:g}"
        path = f"{there}C{bend:g} {lower:g} {bend:g} {down:g} {x:g} {down:g}Z"
        yield f'<path class="{_colour(ribbon.donor)}" fill-opacity=".22" d="{path}"/>'
    for cell in found.columns:
        yield _rectangle(cell, _colour(cell.donor) if cell.used else "rest")
    every = 1 if found.block_height >= _TALL else 10
    for cell in (cell for cell in found.columns if int(cell.label) % every == 0):
        yield _text(
            cell.x + cell.width / 2,
            cell.y + cell.height / 2 + 3.5,
            cell.label,
            f"small {'on' if cell.used else 'soft'}",
        )
    for cell in found.slices:
        yield _rectangle(cell, _colour(cell.donor))
    for cell in {cell.y: cell for cell in found.slices}.values():
        for index in range(1, round(cell.height / found.block_height)):
            y, left, right = (
                cell.y + index * found.block_height,
                found.middle - _RESULT / 2,
                found.middle + _RESULT / 2,
            )
            yield f'<path class="cut" d="M{left:g} {y:g}h{_TICK}M{right - _TICK:g} {y:g}h{_TICK}"/>'
    for cell in found.slices:
        if cell.height >= _TALL - 1 and cell.width >= 45:
            yield _text(cell.x + cell.width / 2, cell.y + cell.height / 2 + 4, cell.label, "on")
    yield from _seams(found)
    for n, (name, x) in enumerate(zip(found.donors, found.heads, strict=True)):
        yield _text(x, 18, LETTERS[n % 26], f"letter {_colour(n)}")
        yield _text(x, 34, _short(visible(Path(name).name)), "", name)
        yield _text(x, 49, f"{sum(cell.donor == n for cell in found.columns)} blocks", "small soft")
    yield _text(found.middle, 34, "result")
    yield _text(found.middle, 49, f"{found.blocks} blocks", "small soft")
    yield _text(found.middle, found.height - 8, "input on top, output at the bottom", "small soft")


def _seams(found: Layout) -> Iterator[str]:
    """A line across the result at every seam, with its number where there is room for it."""
    for number, y in enumerate(found.seams, 1):
        yield f'<path class="seam" d="M{found.middle - _RESULT / 2 - 6:g} {y:g}h{_RESULT + 12}"/>'
        if numbered(found):
            x = found.middle + _RESULT / 2 + 6
            yield f'<circle class="knob" cx="{x:g}" cy="{y:g}" r="8"/>' + _text(
                x, y + 3.5, str(number), "small"
            )


def numbered(found: Layout) -> bool:
    """Whether there is room for the seams' numbers."""
    return all(b - a >= 17 for a, b in pairwise(found.seams))


def _colour(donor: int) -> str:
    return f"d{donor % len(COLOURS)}"


def _rectangle(cell: Cell, style: str) -> str:
    place = f'x="{cell.x:g}" y="{cell.y:g}" width="{cell.width:g}" height="{cell.height:g}"'
    return f'<rect class="cut {style}" {place}/>'


def _text(x: float, y: float, text: str, style: str = "", title: str = "") -> str:
    tooltip = f"<title>{escape(visible(title))}</title>" if title else ""
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{tooltip}{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"
