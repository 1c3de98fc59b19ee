"""Alignment heatmaps for a page: the picture as SVG around a small PNG, and the numbers behind it as JSON of bounded size."""

import base64
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment, Score
from frankenmerge.splicing.diagram import visible

VIRIDIS = tuple(
    tuple(bytes.fromhex(shade))
    for shade in (
        "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
    ).split()
)
"""Seventeen even steps of the colour map viridis: perceptually uniform, legible without red and
green.
"""
WRITTEN = 12
"""Up to so many rows and columns the values stand in the cells."""
CELLS = 900
"""Cells whose neurons are told, at most."""
SHOWN, TOKENS = 3, 3
"""Neurons that agree most and that agree least, and tokens of each."""
_PEAK, _ABSENT = 32_000, -32_768


class Mark(NamedTuple):
    """Where a seam lies in the matrix."""

    row: int
    column: int
    label: str


def colour(value: float) -> tuple[int, int, int]:
    """The colour of a value between 0 and 1; what lies outside gets the nearest end's."""
    place = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = min(int(place), len(VIRIDIS) - 2)
    low, high = VIRIDIS[index], VIRIDIS[index + 1]
    red, green, blue = (
        round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def png(matrix: np.ndarray) -> bytes:
    """Values `[rows, columns]` as a PNG of one pixel each, the palette viridis from 0 to 1; not a number is grey."""
    shades = np.where(np.isnan(matrix), 255, np.round(np.clip(matrix, 0, 1) * 254)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in shades)
    palette = b"".join(bytes(colour(index / 254)) for index in range(255)) + b"\x80\x80\x80"
    header = struct.pack(">IIBBBBB", matrix.shape[1], matrix.shape[0], 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def svg(
    matrix: np.ndarray,
    donors: tuple[str, str],
    marks: Iterable[Mark],
    title: str,
    *,
    small: bool = False,
) -> str:
    """A heatmap: rows are A after so many blocks, columns B. The picture alone; its numbers are told elsewhere."""
    rows, columns = matrix.shape
    side = (150 if small else 340) / max(rows, columns)
    left, top = (26, 18) if small else (44, 34)
    width, height = left + columns * side + 10, top + rows * side + 8
    place = f'x="{left}" y="{top}" width="{columns * side:g}" height="{rows * side:g}"'
    data = base64.b64encode(png(matrix)).decode()
    parts = [
        f'<svg class="heat" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'data-left="{left}" data-top="{top}" data-side="{side:g}" aria-hidden="true"><title>{escape(title)}</title>',
        f'<image {place} preserveAspectRatio="none" class="cells" href="data:image/png;base64,{data}"/>',
        *_ticks(rows, columns, side, left, top, small),
        *([] if small else _axes(donors, left, top, columns * side, rows * side)),
        *(_values(matrix, side, left, top) if not small and max(rows, columns) <= WRITTEN else []),
        ""
        if small
        else f'<rect class="cursor" width="{side:g}" height="{side:g}" x="{left}" y="{top}"/>',
        *(part for mark in marks for part in _mark(mark, side, left, top, small)),
    ]
    return "".join(parts) + "</svg>"


def _ticks(
    rows: int, columns: int, side: float, left: float, top: float, small: bool
) -> Iterable[str]:
    every = next(
        step
        for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000)
        if step * side >= (24 if small else 16)
    )
    for row in range(0, rows, every):
        yield f'<text class="tick end" x="{left - 4}" y="{top + (row + 0.5) * side + 4:g}">{row}</text>'
    for column in range(0, columns, every):
        yield f'<text class="tick" x="{left + (column + 0.5) * side:g}" y="{top - 4}">{column}</text>'


def _axes(
    donors: tuple[str, str], left: float, top: float, width: float, height: float
) -> Iterable[str]:
    a, b = (escape(f"{shortened(name)}, after so many blocks") for name in donors)
    x, y = left + width / 2, top + height / 2
    yield f'<text class="axis" x="{x:g}" y="12">{b}</text>'
    yield f'<text class="axis" x="12" y="{y:g}" transform="rotate(-90 12 {y:g})">{a}</text>'


def _values(matrix: np.ndarray, side: float, left: float, top: float) -> Iterable[str]:
    for (row, column), value in np.ndenumerate(matrix):
        shade = (
            "dark"
            if contrast(colour(float(value)), (0, 0, 0))
            > contrast(colour(float(value)), (255, 255, 255))
            else "light"
        )
        x, y = left + (column + 0.5) * side, top + (row + 0.5) * side + 4
        yield f'<text class="value {shade}" x="{x:g}" y="{y:g}">{short_number(float(value))}</text>'


def _mark(mark: Mark, side: float, left: float, top: float, small: bool) -> Iterable[str]:
    x, y = left + mark.column * side, top + mark.row * side
    for style in ("halo", "ring"):
        yield f'<rect class="mark {style}" x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"/>'
    if not small:
        x += side
        yield f'<circle class="knob" cx="{x:g}" cy="{y:g}" r="8"/><text class="tick" x="{x:g}" y="{y + 3.5:g}">{escape(mark.label)}</text>'


def short_number(value: float) -> str:
    """Two places, without the zero in front; nothing for what is no number."""
    if np.isnan(value):
        return ""
    text = f"{round(value, 2) + 0:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


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


def shortened(name: str) -> str:
    """A donor's name as far as a label has room for it."""
    text = visible(Path(name).name)
    return text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}"


def token(text: str) -> str:
    """A token as it is shown: blanks (many as ␣×24), line ends and everything hidden made visible, the very long cut."""
    shown = (
        re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
        .replace("\r\n", "↵")
        .translate({10: "↵", 9: "⇥", 32: "␣"})
    )
    return visible(shown if len(shown) <= 32 else f"{shown[:31]}…") or "(empty)"


def scores_with_nulls(alignment: Alignment) -> dict[str, Score]:
    """The scores that can be held against chance, the one that plans rest on first."""
    order = {
        name: place
        for place, name in enumerate(("jaccard", "argmax", "correlation", "rank_correlation"))
    }
    named = sorted(
        alignment.scores.items(), key=lambda entry: (order.get(entry[0], len(order)), entry[0])
    )
    return {name: score for name, score in named if score.nulls}


def numbers(alignment: Alignment, marks: Sequence[Mark]) -> dict[str, Any]:
    """What the page tells of a cell, as JSON: every score with nulls and interval, and some cells' neurons with their tokens."""
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
        for row, column in _told(alignment, marks)
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
    """Numbers as [largest, base64 of little-endian int16]: four significant places, three characters each."""
    finite = np.isfinite(matrix)
    peak = float(np.abs(matrix[finite]).max(initial=0)) or 1.0
    scaled = np.where(
        finite, np.round(np.where(finite, matrix, 0).astype(np.float64) / peak * _PEAK), _ABSENT
    ).astype("<i2")
    return [round(peak, 6), base64.b64encode(scaled.tobytes()).decode()]


def _told(alignment: Alignment, marks: Sequence[Mark]) -> list[tuple[int, int]]:
    """The cells whose neurons are told: the seams', then those nearest to equal depth."""
    rows, columns = (blocks + 1 for blocks in alignment.blocks)
    near = sorted(
        np.ndindex(rows, columns), key=lambda cell: (abs(cell[0] / rows - cell[1] / columns), cell)
    )
    return list(dict.fromkeys([*((mark.row, mark.column) for mark in marks), *near]))[:CELLS]


def _cell(alignment: Alignment, row: int, column: int, words: dict[int, int]) -> list[list]:
    """Neurons that agree most, then those that agree least: `[neuron, Jaccard in thousandths, A's tokens, B's tokens]`.

    Tokens are places in `words`; the complement `~place` says that the other donor's list of best
    tokens has it too.
    """
    detail = {
        name: score.detail[row, column].astype(np.float32)
        for name, score in alignment.scores.items()
        if score.detail.shape[2]
    }
    keys = [np.nan_to_num(detail[name]) for name in ("correlation", "jaccard") if name in detail]
    if not keys:
        return []
    # Many neurons tie on the tokens; among those the correlation tells which agree most.
    ranked = np.lexsort(keys)
    pair = [table[block] for table, block in zip(alignment.tokens, (row, column), strict=True)]

    def told(neuron: int) -> list:
        a, b = (tokens[neuron].tolist() for tokens in pair)
        return [
            int(neuron),
            round(float(keys[-1][neuron]) * 1000),
            _places(a, b, words),
            _places(b, a, words),
        ]

    return [told(neuron) for neuron in [*ranked[::-1][:SHOWN], *ranked[:SHOWN]]]


def _places(tokens: list[int], others: list[int], words: dict[int, int]) -> list[int]:
    places = [(words.setdefault(index, len(words)), index in others) for index in tokens[:TOKENS]]
    return [~place if shared else place for place, shared in places]
