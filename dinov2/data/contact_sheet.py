"""Contact sheet: pictures in rows with captions, drawn with Pillow; images of any depth and channels made visible.

Shapes: C channels, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 208  # px, side of the square that a picture is fitted into
_GAP = 10  # px
_TEXT_SIZE = 12  # px
_LINE = 17  # px
_INK, _FAINT, _PAPER, _ALARM = (20, 20, 20), (110, 110, 110), (255, 255, 255), (170, 20, 20)
_HATCH, _HATCH_PX = (70, 225), 6  # grey levels of masked patches, and the width of their stripes
_FRAME = 5  # px
_STRETCH_PCT = (0.5, 99.5)
_MAX_CHANNELS = 9  # that a picture shows side by side


@dataclass(frozen=True)
class Window:
    """What becomes black and white when an image is shown, for each channel, fractions of full scale."""

    low: np.ndarray  # [C]
    high: np.ndarray  # [C], above low


@dataclass(frozen=True)
class Cell:
    """A picture, the words below it, and the colour of a frame around it."""

    picture: Image.Image
    words: str
    frame: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Row:
    """What is shown of one image; `alarm` stands in place of the pictures of an image that has none."""

    caption: str
    cells: Sequence[Cell]
    alarm: str = ""


def find_window(pixels: np.ndarray) -> Window:
    """Choose how an image is shown: 8 bits of 1 or 3 channels as they are, others stretched by percentiles.

    Args:
        pixels: [C, H, W], uint8 or uint16.
    """
    full = np.iinfo(pixels.dtype).max
    if pixels.dtype == np.uint8 and len(pixels) in (1, 3):
        return Window(np.zeros(len(pixels)), np.ones(len(pixels)))
    low, high = np.percentile(pixels.reshape(len(pixels), -1), _STRETCH_PCT, axis=1) / full
    return Window(low, np.maximum(high, low + 1 / full))


def show_colours(values: np.ndarray, window: Window) -> Image.Image:
    """Make a picture of fractions of full scale [C, H, W]: grey, or the first three channels as red, green and blue."""
    shown = _stretched(values, window)
    if len(shown) == 1:
        return Image.fromarray(shown[0])
    missing = np.zeros((max(0, 3 - len(shown)), *shown.shape[1:]), dtype=np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.concatenate([shown[:3], missing]).transpose(1, 2, 0)))


def show_channels(values: np.ndarray, window: Window) -> Image.Image:
    """Make a picture of the channels of fractions of full scale [C, H, W], each grey, side by side and below."""
    pictures = [Image.fromarray(channel) for channel in _stretched(values[:_MAX_CHANNELS], window)]
    return mosaic(pictures)


def show_masked(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Cover the masked patches of a picture; `mask` [rows, columns] bool."""
    pixels = np.array(picture.convert("RGB"))
    down, across = pixels.shape[0] // mask.shape[0], pixels.shape[1] // mask.shape[1]
    covered = mask.repeat(down, axis=0).repeat(across, axis=1)
    rows, columns = np.nonzero(covered)
    pixels[rows, columns] = np.take(_HATCH, (rows + columns) // _HATCH_PX % 2)[:, None]
    return Image.fromarray(pixels)


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures into a square of squares that fills a cell."""
    side = int(np.ceil(np.sqrt(len(pictures))))
    part = (CELL - 2 * (side - 1)) // side
    sheet = Image.new("RGB", (CELL, CELL), _PAPER)
    for number, picture in enumerate(pictures):
        down, across = divmod(number, side)
        sheet.paste(_fitted(picture, part), (across * (part + 2), down * (part + 2)))
    return sheet


def draw_sheet(rows: Sequence[Row], *, heading: Sequence[str], cell_px: int = CELL) -> Image.Image:
    """Draw all rows below some lines of heading; each picture is fitted into a square of `cell_px`."""
    num_cells = max(len(row.cells) for row in rows)
    width = _GAP + max(num_cells, 3) * (cell_px + _GAP)
    top = _GAP + _LINE * len(heading) + _GAP
    row_height = _LINE + cell_px + _LINE + 2 * _GAP
    alarm_height = 2 * _LINE + _GAP
    height = top + sum(row_height if row.cells else alarm_height for row in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(heading):
        _write(draw, text, (_GAP, _GAP + number * _LINE), width=width - 2 * _GAP, bold=number == 0)
    for row in rows:
        draw.line([(_GAP, top - _GAP // 2), (width - _GAP, top - _GAP // 2)], fill=(225, 225, 225))
        _write(draw, row.caption, (_GAP, top), width=width - 2 * _GAP, bold=True)
        if row.alarm:
            _write(draw, row.alarm, (_GAP, top + _LINE), width=width - 2 * _GAP, colour=_ALARM)
        for number, cell in enumerate(row.cells):
            left = _GAP + number * (cell_px + _GAP)
            sheet.paste(_fitted(cell.picture, cell_px), (left, top + _LINE))
            if cell.frame is not None:
                corner = (left + cell_px - 1, top + _LINE + cell_px - 1)
                draw.rectangle([(left, top + _LINE), corner], outline=cell.frame, width=_FRAME)
            _write(draw, cell.words, (left, top + _LINE + cell_px + 2), width=cell_px, colour=_FAINT)
        top += row_height if row.cells else alarm_height
    return sheet


def _stretched(values: np.ndarray, window: Window) -> np.ndarray:
    """Values as they are shown, [C, H, W] uint8."""
    low, high = (edge[: len(values), None, None] for edge in (window.low, window.high))
    return np.round(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Put a picture into the middle of a square: enlarged by whole pixels, or made smaller smoothly."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), (245, 245, 245))
    square.paste(picture.convert("RGB").resize(size, kind), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    place: tuple[int, int],
    *,
    width: int,
    colour: tuple[int, int, int] = _INK,
    bold: bool = False,
) -> None:
    """Write a line; what does not fit is left out of its middle."""
    font = _font(bold)
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 4:
        kept -= max(1, kept // 20)
        shown = f"{text[: kept // 2]}...{text[len(text) - kept // 2 :]}"
    draw.text(place, shown, font=font, fill=colour)


@cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it, which knows the letters of most languages."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), _TEXT_SIZE)
