"""PNG files of small images, written without a library."""

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def png_bytes(pixels: "np.ndarray") -> bytes:
    """A PNG file of pixels `[h, w, c]`, uint8, `c` 1 (grey) or 3 (red, green, blue)."""
    height, width, channels = pixels.shape
    assert pixels.dtype == "uint8" and channels in (1, 3)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
