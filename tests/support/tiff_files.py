"""TIFF files that no writer makes."""

from pathlib import Path

import numpy as np


def sparse_tiff(path: Path, *, side: int = 100_000, tile: int = 256) -> Path:
    """Write a tiled TIFF of side x side px of which only the tile in row 3, column 5 is stored, of 7s.

    Its tags are written by hand, as no writer would leave out so much.
    """
    across = -(-side // tile)
    place = 8
    pixels = np.full((tile, tile), 7, np.uint8).tobytes()
    counts_at = place + len(pixels)
    offsets_at = counts_at + 4 * across**2
    index = 3 * across + 5
    counts, offsets = np.zeros(across**2, "<u4"), np.zeros(across**2, "<u4")
    counts[index], offsets[index] = len(pixels), place
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (322, 3, 1, tile),
        (323, 3, 1, tile),
        (324, 4, across**2, offsets_at),
        (325, 4, across**2, counts_at),
    ]
    directory = len(tags).to_bytes(2, "little")
    for tag, kind, count, value in tags:
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        directory += count.to_bytes(4, "little") + value.to_bytes(4, "little")
    at = offsets_at + 4 * across**2
    header = b"II*\0" + at.to_bytes(4, "little")
    path.write_bytes(header + pixels + counts.tobytes() + offsets.tobytes() + directory + bytes(4))
    return path
