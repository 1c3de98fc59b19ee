"""Alignments as heatmaps: drawings around a small PNG, and their numbers as JSON for the page."""

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment, Score
from frankenmerge.artefacts.scores import NULLS, SCORES, score_info
from frankenmerge.reporting.labels import shortened, token
from frankenmerge.reporting.svg import Drawing, combined, text, titled

Shades = Sequence[tuple[int, ...]]
"""Red, green and blue of even steps from the least value to the greatest."""
GREY = b"\x80\x80\x80\xff"
VIRIDIS = tuple(
    tuple(bytes.fromhex(shade))
    for shade in (
        "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
        "1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
    ).split()
)
"""Seventeen even steps of the colour map viridis: perceptually uniform, legible without red and
green.
"""
VALUES_UP_TO = 12
"""Rows and columns up to which the values are written in the cells."""
CELLS = 900
"""Maximum number of cells whose neurons a page has."""
SHOWN, TOKENS = 3, 3
"""Neurons that agree most and that agree least, and tokens of each."""
_PEAK, _ABSENT = 32_000, -32_768
_PER_ROW = 4
"""Heatmaps in a row of a figure."""


class Mark(NamedTuple):
    """The cell of a seam."""

    row: int
    column: int
    label: str


class Grid(NamedTuple):
    """Where the cells of a heatmap are in its drawing."""

    rows: int
    columns: int
    side: float
    left: float
    top: float
    small: bool

    def x(self, column: float) -> float:
        """The left edge of a column."""
        return self.left + column * self.side

    def y(self, row: float) -> float:
        """The upper edge of a row."""
        return self.top + row * self.side


def colour(value: float, shades: Shades = VIRIDIS) -> tuple[int, int, int]:
    """The colour of a value between 0 and 1; values outside get the colour of the nearest end."""
    place = min(max(value, 0.0), 1.0) * (len(shades) - 1)
    index = min(int(place), len(shades) - 2)
    low, high = shades[index], shades[index + 1]
    red, green, blue = (
        round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def png(matrix: np.ndarray, shades: Shades = VIRIDIS, absent: bytes = GREY) -> bytes:
    """Values `[rows, columns]` from 0 to 1 as a PNG of one pixel each.

    `absent` is the colour of NaN: red, green, blue and opacity.
    """
    known = np.where(np.isnan(matrix), 0, np.clip(matrix, 0, 1))
    places = np.where(np.isnan(matrix), 255, np.round(known * 254)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in places)
    palette = b"".join(bytes(colour(index / 254, shades)) for index in range(255)) + absent[:3]
    header = struct.pack(">IIBBBBB", matrix.shape[1], matrix.shape[0], 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", palette),
        *([(b"tRNS", b"\xff" * 255 + absent[3:])] if absent[3] < 255 else []),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def image(
    matrix: np.ndarray,
    x: float,
    y: float,
    width: float,
    height: float,
    shades: Shades = VIRIDIS,
    absent: bytes = GREY,
) -> str:
    """Values `[rows, columns]` as an image element of that place and size; see `png`."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    data = base64.b64encode(png(matrix, shades, absent)).decode()
    return (
        f'<image {place} preserveAspectRatio="none" class="cells" '
        f'href="data:image/png;base64,{data}"/>'
    )


def heatmap(
    matrix: np.ndarray,
    donors: tuple[str, str],
    marks: Sequence[Mark],
    title: str,
    *,
    small: bool = False,
) -> Drawing:
    """Draw a matrix: row `i` is the first donor after `i` blocks, column `j` the second after `j`.

    Small heatmaps have no axis labels, values and labels of marks.
    """
    rows, columns = matrix.shape
    side = (150 if small else 340) / max(rows, columns)
    grid = Grid(rows, columns, side, *((26, 18) if small else (44, 34)), small)
    width, height = grid.x(columns) + 10, grid.y(rows) + 8
    elements = [image(matrix, grid.left, grid.top, columns * side, rows * side), *ticks(grid)]
    if not small:
        elements += _axes(donors, grid)
        elements += _values(matrix, grid) if max(rows, columns) <= VALUES_UP_TO else []
    elements += [part for mark in marks for part in ring(mark, grid)]
    return Drawing("heat", title, "", width, height, "".join(elements))


def scale() -> Drawing:
    """The colour scale of all heatmaps."""
    elements = [
        image(np.linspace(0, 1, 250)[None], 5, 0, 250, 12),
        text(5, 28, "0 no agreement", ""),
        text(255, 28, "1 full agreement", "finish"),
    ]
    title = "Colours range from dark violet at 0 to yellow at 1"
    return Drawing("scale", title, "", 260, 34, "".join(elements))


def alignment_figure(alignment: Alignment, marks: Sequence[Mark]) -> Drawing:
    """Draw every score that is known neuron by neuron, with the means of its nulls in its title."""
    a, b = (shortened(donor) for donor in alignment.donors)
    panels = []
    for name, score in alignment.scores.items():
        if score.detail.shape[2]:
            drawing = heatmap(score.matrix, alignment.donors, marks, score_info(name).short_title)
            panels.append(titled(drawing, _chance(score))._replace(description=_chance(score)))
    per_row = math.ceil(len(panels) / math.ceil(len(panels) / _PER_ROW)) if panels else 1
    rows = [panels[start : start + per_row] for start in range(0, len(panels), per_row)]
    described = "; ".join(f"{panel.title}: {panel.description}" for panel in panels)
    title = f"Agreement of the neurons of {a} and {b}"
    return combined([*rows, [scale()]], title, described)


def _chance(score: Score) -> str:
    """The means of the nulls that a figure states."""
    means = (
        f"{NULLS[null].short_title}: {round(float(score.nulls[null].mean()), 2) + 0:.2f}"
        for null in ("permuted_neurons", "residual_law")
        if null in score.nulls
    )
    return ", ".join(means)


def ticks(grid: Grid) -> Iterator[str]:
    """The numbers of rows and columns."""
    every = next(
        step
        for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000)
        if step * grid.side >= (24 if grid.small else 16)
    )
    for row in range(0, grid.rows, every):
        yield text(grid.left - 4, grid.y(row + 0.5) + 4, str(row), "tick end")
    for column in range(0, grid.columns, every):
        yield text(grid.x(column + 0.5), grid.top - 4, str(column), "tick")


def _axes(donors: tuple[str, str], grid: Grid) -> Iterator[str]:
    a, b = (f"blocks of {shortened(name)}" for name in donors)
    y = grid.y(grid.rows / 2)
    yield text(grid.x(grid.columns / 2), 12, b, "axis")
    yield f'<g transform="rotate(-90 12 {y:g})">{text(12, y, a, "axis")}</g>'


def _values(matrix: np.ndarray, grid: Grid) -> Iterator[str]:
    for (row, column), value in np.ndenumerate(matrix):
        shade = colour(float(value)) if np.isfinite(value) else (128, 128, 128)
        dark = contrast(shade, (0, 0, 0)) > contrast(shade, (255, 255, 255))
        style = f"value {'dark' if dark else 'light'}"
        yield text(grid.x(column + 0.5), grid.y(row + 0.5) + 4, short_number(float(value)), style)


def ring(mark: Mark, grid: Grid) -> Iterator[str]:
    """The frame of a marked cell, with its label."""
    x, y = grid.x(mark.column), grid.y(mark.row)
    for style in ("halo", "ring"):
        place = f'x="{x:g}" y="{y:g}" width="{grid.side:g}" height="{grid.side:g}"'
        yield f'<rect class="mark {style}" {place}/>'
    if not grid.small:
        x += grid.side
        yield f'<circle class="knob" cx="{x:g}" cy="{y:g}" r="8"/>'
        yield text(x, y + 3.5, mark.label, "number")


def short_number(value: float) -> str:
    """Two decimals without the leading zero; empty for NaN."""
    if np.isnan(value):
        return ""
    number = f"{round(value, 2) + 0:.2f}"
    return number.replace("0.", ".", 1) if number.startswith(("0.", "-0.")) else number


def luminance(shade: tuple[int, int, int]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in shade)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def scores_with_nulls(alignment: Alignment) -> dict[str, Score]:
    """The scores that can be compared with chance, in the order of `SCORES`, then by name."""
    order = {name: place for place, name in enumerate(SCORES)}
    named = sorted(
        alignment.scores.items(), key=lambda entry: (order.get(entry[0], len(order)), entry[0])
    )
    return {name: score for name, score in named if score.nulls}


def numbers(alignment: Alignment, marks: Sequence[Mark]) -> dict[str, Any]:
    """The numbers of a page's heatmaps: scores, nulls and intervals, and some cells' neurons."""
    scores = {
        name: {
            "score": _packed(score.matrix),
            "nulls": {null: _packed(matrix) for null, matrix in sorted(score.nulls.items())},
            "interval": None
            if score.interval is None
            else [_packed(end) for end in score.interval],
        }
        for name, score in scores_with_nulls(alignment).items()
    }
    words: dict[int, int] = {}
    cells = {
        f"{row},{column}": _cell(alignment, row, column, words)
        for row, column in _detailed_cells(alignment, marks)
    }
    texts = [
        token(alignment.vocabulary[index]) if index < len(alignment.vocabulary) else f"#{index}"
        for index in words
    ]
    rows, columns = (blocks + 1 for blocks in alignment.blocks)
    donors = [shortened(name) for name in alignment.donors]
    return {
        "donors": donors,
        "rows": rows,
        "columns": columns,
        "scores": scores,
        "words": texts,
        "cells": cells,
    }


def _packed(matrix: np.ndarray) -> list:
    """Numbers as [largest, base64 of little-endian int16]: four significant digits each."""
    finite = np.isfinite(matrix)
    peak = float(np.abs(matrix[finite]).max(initial=0)) or 1.0
    scaled = np.where(
        finite, np.round(np.where(finite, matrix, 0).astype(np.float64) / peak * _PEAK), _ABSENT
    ).astype("<i2")
    return [round(peak, 6), base64.b64encode(scaled.tobytes()).decode()]


def _detailed_cells(alignment: Alignment, marks: Sequence[Mark]) -> list[tuple[int, int]]:
    """The cells whose neurons a page has: those of seams, then those nearest to equal depth."""
    rows, columns = (blocks + 1 for blocks in alignment.blocks)
    near = sorted(
        np.ndindex(rows, columns), key=lambda cell: (abs(cell[0] / rows - cell[1] / columns), cell)
    )
    return list(dict.fromkeys([*((mark.row, mark.column) for mark in marks), *near]))[:CELLS]


def _cell(alignment: Alignment, row: int, column: int, words: dict[int, int]) -> list[list]:
    """The neurons that agree most, then those that agree least.

    Each is `[neuron, Jaccard in thousandths, A's tokens, B's tokens]`. Tokens are places in
    `words`; the complement `~place` says that the other donor's list has the token too.
    """
    detail = {
        name: score.detail[row, column].astype(np.float32)
        for name, score in alignment.scores.items()
        if score.detail.shape[2]
    }
    keys = [np.nan_to_num(detail[name]) for name in ("correlation", "jaccard") if name in detail]
    if not keys:
        return []
    # Many neurons tie on the tokens; the correlation ranks those.
    ranked = np.lexsort(keys)
    pair = [table[block] for table, block in zip(alignment.tokens, (row, column), strict=True)]

    def entry(neuron: int) -> list:
        a, b = (tokens[neuron].tolist() for tokens in pair)
        share = round(float(keys[-1][neuron]) * 1000)
        return [int(neuron), share, _places(a, b, words), _places(b, a, words)]

    return [entry(neuron) for neuron in [*ranked[::-1][:SHOWN], *ranked[:SHOWN]]]


def _places(tokens: list[int], others: list[int], words: dict[int, int]) -> list[int]:
    places = [(words.setdefault(index, len(words)), index in others) for index in tokens[:TOKENS]]
    return [~place if shared else place for place, shared in places]
