"""What image files hold before a dataset converts them: format, channels and bits, from their headers alone."""

import os
import warnings

from PIL import Image

from dinov2.data.datasets.tiff import TiffArray
from dinov2.errors import DatasetError

UNKNOWN = "unknown"
_CHANNELS = {"1": 1, "L": 1, "P": 3, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3, "HSV": 3}
_TIFF_ENDINGS = (".tif", ".tiff")
_PNG_BITS = slice(24, 25)  # bytes of a PNG file that hold its bits a channel


def stored_as(path: str) -> str:
    """Describe a file, e.g. `JPEG, 3 channels, 8 bits`; `unknown` if its header does not tell or it is no file."""
    if not os.path.isfile(path):
        return UNKNOWN
    try:
        if path.lower().endswith(_TIFF_ENDINGS):
            return _describe_tiff(path)
        with warnings.catch_warnings(action="ignore"):  # of Pillow, about sizes, which the dataset has checked
            return _describe(path)
    except (DatasetError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return UNKNOWN


def stored_bits(description: str) -> int:
    """Bits of a channel that `stored_as` found; 0 if unknown."""
    return 0 if description == UNKNOWN else int(description.split()[-2])


def _describe_tiff(path: str) -> str:
    array = TiffArray(path)
    try:
        sizes = dict(zip(array.axes, array.shape, strict=True))
        num_others = [size for axis, size in sizes.items() if axis not in "YXS" and size > 1]
        shape = "" if not num_others else f"{' x '.join(map(str, num_others))} pages, "
        return f"TIFF, {shape}{_format(sizes.get('S', 1), array.bits)}"
    finally:
        array.close()


def _describe(path: str) -> str:
    with Image.open(path) as image:
        kind, mode = image.format, image.mode
    if mode.startswith("I;16"):
        return f"{kind}, {_format(1, 16)}"
    if mode in ("I", "F"):
        return f"{kind}, {_format(1, 32 if kind != 'PNG' else 16)}"
    bits = 1 if mode == "1" else 8
    if kind == "PNG":
        with open(path, "rb") as file:
            bits = file.read(32)[_PNG_BITS][0]
    return f"{kind}, {_format(_CHANNELS.get(mode, len(image.getbands())), bits)}"


def _format(num_channels: int, bits: int) -> str:
    return f"{num_channels} channel{'s' * (num_channels > 1)}, {bits} bit{'s' * (bits > 1)}"
