"""Feature maps of vision transformers: sheets of small images, and those that the report shows."""

import base64
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts.atlas import Atlas
from frankenmerge.storage.png import png_bytes

SIDE, GAP = 64, 4
"""Pixels along one side of an image on a sheet, about, and between features."""
NEURONS, BLOCKS, IMAGES = 8, 9, 3
"""Neurons and blocks of a donor that the report shows, and top-activating images of each."""


class PictureRow(NamedTuple):
    """The images of one block: for each neuron some, the best first, as data URIs."""

    block: int
    cells: list[list[str]]


class PictureTable(NamedTuple):
    """The images of one kind of one donor."""

    donor: str
    title: str
    neurons: list[int]
    rows: list[PictureRow]


def sheet(pixels: np.ndarray) -> bytes:
    """A PNG file of images `[rows, m, n, h, w, c]`, uint8: in each row `m` groups of `n`.

    Small images are enlarged by a whole number; gaps between groups are wider than within.
    """
    factor = max(1, SIDE // max(pixels.shape[3:5]))
    pixels = pixels.repeat(factor, axis=3).repeat(factor, axis=4)
    inner = ((0, 0), (0, 0), (0, 0), (0, GAP), (0, 1), (0, 0))
    pixels = np.pad(pixels, inner, constant_values=255)
    rows, m, n, h, w, c = pixels.shape
    groups = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(rows, m, h, n * w, c)
    groups = np.pad(groups, ((0, 0), (0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
    lines = groups.transpose(0, 2, 1, 3, 4).reshape(rows * h, -1, c)
    return png_bytes(lines)


def picture_tables(atlas: Atlas) -> list[PictureTable]:
    """What the report shows of a vision transformer's atlas."""
    tables, donor = [], atlas.donor
    shown = np.unique(np.linspace(0, atlas.blocks, min(atlas.blocks + 1, BLOCKS)).round())
    blocks = shown.astype(int).tolist()
    if (found := atlas.pictures) is not None:
        rows = [
            PictureRow(block, [[_uri(pixels)] for pixels in found.pixels[block, :NEURONS]])
            for block in blocks
        ]
        title = "Images by gradient ascent"
        tables.append(PictureTable(donor, title, found.neurons[:NEURONS].tolist(), rows))
    if (small := atlas.thumbnails) is not None:
        top = next(iter(atlas.top.values())).tokens[:, :NEURONS, :IMAGES]
        where = np.searchsorted(small.images, top)
        rows = [
            PictureRow(block, [[_uri(small.pixels[i]) for i in cell] for cell in where[block]])
            for block in blocks
        ]
        tables.append(PictureTable(donor, "Top-activating images", list(range(top.shape[1])), rows))
    return tables


def _uri(pixels: np.ndarray) -> str:
    step = -(-max(pixels.shape[:2]) // SIDE)  # of large images every so-manieth pixel
    return f"data:image/png;base64,{base64.b64encode(png_bytes(pixels[::step, ::step])).decode()}"
