"""Sweeps as heat maps: what a donor gains when a window of its blocks runs twice."""

from collections.abc import Iterator

import numpy as np

from frankenmerge.artefacts.sweep import Sweep
from frankenmerge.reporting.heatmaps import (
    VALUES_UP_TO,
    Grid,
    Mark,
    colour,
    contrast,
    image,
    ring,
    ticks,
)
from frankenmerge.reporting.labels import shortened
from frankenmerge.reporting.svg import Drawing, combined, text, titled

DIVERGING = tuple(
    tuple(bytes.fromhex(shade))
    for shade in (
        "543005 8c510a bf812d dfc27d f6e8c3 f5f5f5 c7eae5 80cdc1 35978f 01665e 003c30"
    ).split()
)
"""Brown over white to green in eleven even steps (ColorBrewer's BrBG), legible without red."""
CLEAR = b"\xff\xff\xff\x00"
_SIDE = 300


def window_maps(sweep: Sweep) -> list[Drawing]:
    """One heat map for every scale: row `start`, column `stop`; confirmed windows are numbered."""
    return [_map(sweep, scale) for scale in sweep.scales]


def window_scale(sweep: Sweep) -> Drawing:
    """The colours of all heat maps of a sweep."""
    limit = _limit(sweep)
    elements = [
        image(np.linspace(0, 1, 251)[None], 5, 0, 250, 12, DIVERGING),
        text(5, 28, f"loses {limit:.2g} or more", ""),
        text(255, 28, f"gains {limit:.2g}", "finish"),
    ]
    title = f"Colours range from brown at -{limit:.2g} over white at 0 to green at {limit:.2g}"
    return Drawing("scale", title, "", 260, 34, "".join(elements))


def sweep_figure(sweep: Sweep) -> Drawing:
    """All heat maps of a sweep side by side, with their colours."""
    maps = window_maps(sweep)
    described = "; ".join(f"{each.title}: {each.description}" for each in maps)
    title = f"Windows of {shortened(sweep.donor)} that run twice: gain in nats per token"
    return combined([[titled(each) for each in maps], [window_scale(sweep)]], title, described)


def _limit(sweep: Sweep) -> float:
    """The gain at the end of the colours: some windows lose much more than any gains."""
    gains = np.array([window.gain for window in sweep.windows])
    return float(max(gains.max(), np.median(np.abs(gains)))) or 1.0


def _map(sweep: Sweep, scale: float) -> Drawing:
    gains = np.full((sweep.blocks, sweep.blocks + 1), np.nan)
    for window in sweep.windows:
        if window.scale == scale:
            gains[window.start, window.stop] = window.gain
    side = _SIDE / sweep.blocks
    grid = Grid(*gains.shape, side, 44, 34, small=False)
    shares = gains / _limit(sweep) / 2 + 0.5
    width, height = sweep.blocks * side + side, sweep.blocks * side
    elements = [image(shares, grid.left, grid.top, width, height, DIVERGING, CLEAR), *ticks(grid)]
    elements += _axes(grid)
    elements += _values(gains, shares, grid) if sweep.blocks <= VALUES_UP_TO else []
    for number, each in enumerate(sweep.confirmed, 1):
        if each.scale == scale:
            elements += ring(Mark(each.start, each.stop, str(number)), grid)
    title = "Run twice as they are" if scale == 1 else f"Second pass scaled by {scale:g}"
    start, stop = np.unravel_index(np.nanargmax(gains), gains.shape)
    best = f"most is gained by window [{start}, {stop}), {gains[start, stop]:+.4f} nats per token"
    size = grid.x(grid.columns) + 10, grid.y(grid.rows) + 8
    return Drawing("heat", title, best, *size, "".join(elements))


def _axes(grid: Grid) -> Iterator[str]:
    y = grid.y(grid.rows / 2)
    yield text(grid.x(grid.columns / 2), 12, "stop: first block after the window", "axis")
    start = text(12, y, "start: first block of the window", "axis")
    yield f'<g transform="rotate(-90 12 {y:g})">{start}</g>'


def _values(gains: np.ndarray, shares: np.ndarray, grid: Grid) -> Iterator[str]:
    """Gains in thousandths of a nat per token."""
    for (row, column), gain in np.ndenumerate(gains):
        if np.isfinite(gain):
            shade = colour(float(shares[row, column]), DIVERGING)
            dark = contrast(shade, (0, 0, 0)) > contrast(shade, (255, 255, 255))
            style = f"value {'dark' if dark else 'light'}"
            shown = f"{round(1000 * float(gain)) + 0:d}"
            yield text(grid.x(column + 0.5), grid.y(row + 0.5) + 4, shown, style)
