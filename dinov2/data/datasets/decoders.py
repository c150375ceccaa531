"""Reading image files that nobody vouches for: size checked before decoding, every failure one `DatasetError`.

`EncodedImage` knows the size of an image before it decodes, so that a caller can ask for fewer pixels. Shapes:
C channels, H rows, W columns.
"""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinov2.errors import ConfigError, DatasetError

MAX_IMAGE_PIXELS = 178_956_970  # default limit, Pillow's for decompression bombs
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION_TAG = 0x0112
_BITS_TAG = 0x0102  # BitsPerSample of TIFF
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TURNS = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}  # axes flipped, after swapping if any
_JPEG_SCALES = (8, 4, 2)
_UINT16_MAX = 65535
_WIDEN = 257  # from 8 to 16 bits
_PNG_DEPTH = 24  # byte of a PNG file that holds its bits a channel


class UnknownFormatError(DatasetError):
    """A file that Pillow does not know."""


class EncodedImage:
    """An image whose header is read and whose pixels are not; an `ImageSource`.

    Args:
        data: the file's content.
        channels: 3 for RGB, 1 for grey; any image is converted.
        max_image_pixels: larger images are refused before they are decoded; None: no limit.
        bits: of a channel in `to_tensor`. 8: wider images keep their upper 8 bits; 16: narrower ones are scaled up.

    Attributes:
        file_bits: of a channel in the file, 16 if there are more than 8.

    Raises:
        ConfigError: `channels` is neither 1 nor 3.
        DatasetError: the file is empty, no known image, or too large.
    """

    def __init__(
        self,
        data: bytes,
        *,
        channels: int = 3,
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
        bits: int = 8,
    ) -> None:
        self._mode = pillow_mode(channels)
        self.channels = channels
        self.bits = bits
        if not data:
            raise DatasetError("the file is empty")
        with _unreadable():
            self._image = _open(data, max_image_pixels)
            # Pillow turns TIFF files by itself, size included
            is_turned = self._image.format == "TIFF"
            self._orientation = 1 if is_turned else self._image.getexif().get(_ORIENTATION_TAG, 1)
        if bits == 16 and _is_deep_colour_png(self._image, data):
            raise DatasetError("colour PNG files of 16 bits are read with bits=8 only; store TIFF files for bits=16")
        self.file_bits = 16 if _is_wide(self._image) else 8
        width, height = self._image.size
        if self._orientation in _TRANSPOSED:
            width, height = height, width
        self.width = width
        self.height = height

    @property
    def is_read_whole(self) -> bool:
        """Whether decoding keeps all the bits that are asked for; not so for some TIFF files, see `WideTiff`."""
        if self._image.format != "TIFF" or self._image.mode.startswith("I;16"):
            return True
        if self._image.mode in ("I", "F"):
            return False
        return self.bits == 8 or max(self._image.tag_v2.get(_BITS_TAG, (1,))) <= 8

    @property
    def tiff_orientation(self) -> int:
        """Orientation that a TIFF file tells, 1..8."""
        orientation = self._image.tag_v2.get(_ORIENTATION_TAG, 1)
        return orientation if orientation in range(1, 9) else 1

    def to_pil(self, *, reduce: float = 1.0) -> Image.Image:
        """Decode, once, to 8 bits.

        Args:
            reduce: how many times smaller, in both directions, the result may be; JPEG files then decode to the
                nearest size of 1/2, 1/4 or 1/8 that is not smaller than that.

        Raises:
            DatasetError: the file is damaged.
        """
        with _unreadable():
            if self._image.format == "JPEG":
                scale = next((scale for scale in _JPEG_SCALES if scale <= reduce), 1)
                size = (self._image.width // scale, self._image.height // scale)
                self._image.draft(self._mode, size)
            self._image.load()
            image = _to_mode(self._image, self._mode)
            return ImageOps.exif_transpose(image) if self._orientation != 1 else image

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode, once, to [C, H, W], uint8 or, with 16 bits, uint16; uint8 lies in memory as [H, W, C].

        Raises:
            DatasetError: the file is damaged.
        """
        if self.bits == 8:
            return pil_to_tensor(self.to_pil(reduce=reduce))
        if _is_wide(self._image):
            with _unreadable():
                self._image.load()
            pixels = torch.from_numpy(_wide_values(self._image).astype(np.uint16))
            return turn_upright(pixels.expand(self.channels, -1, -1), self._orientation)
        return (pil_to_tensor(self.to_pil(reduce=reduce)).to(torch.int32) * _WIDEN).to(torch.uint16)


def pillow_mode(channels: int) -> str:
    """Pillow's name for images of 1 or 3 channels."""
    if channels not in _MODES:
        raise ConfigError(f"student.in_chans={channels}: image files of this dataset are read with 1 or 3 channels")
    return _MODES[channels]


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Copy a Pillow image of mode L or RGB to uint8 [C, H, W], in memory as [H, W, C]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def require_image_pixels(width: int, height: int, max_image_pixels: int | None) -> None:
    """Refuse a larger image.

    Raises:
        DatasetError: it is.
    """
    if max_image_pixels is not None and width * height > max_image_pixels:
        raise DatasetError(
            f"{width} x {height} pixels are more than data.max_image_pixels={max_image_pixels}; "
            "raise it if the image is what it claims to be"
        )


def _open(data: bytes, max_image_pixels: int | None) -> Image.Image:
    """Read the header; Pillow's process-wide limit makes way for ours while it does."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(io.BytesIO(data))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    require_image_pixels(*image.size, max_image_pixels)
    return image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to grey or RGB; 16-bit values keep their upper half, transparent pixels show white."""
    if _is_wide(image):
        image = Image.fromarray(np.round(_wide_values(image) * (255 / _UINT16_MAX)).astype(np.uint8))
    elif image.has_transparency_data:
        image = _on_white(image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
    """Lay RGBA on white: under full transparency, drawings hold the colour of their lines, mostly black."""
    if image.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _is_wide(image: Image.Image) -> bool:
    """Tell whether Pillow holds more than 8 bits a pixel of this image; such images are grey."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _wide_values(image: Image.Image) -> np.ndarray:
    """Values of 0..65535 [H, W] of a grey image of more than 8 bits."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > _UINT16_MAX:
        raise DatasetError(f"pixels of Pillow's mode {image.mode} have no known range; store 8 or 16 bits a channel")
    return values


def _is_deep_colour_png(image: Image.Image, data: bytes) -> bool:
    """Tell whether a file is a PNG of 16 bits a channel of which Pillow, which has no 16-bit colour, gives only 8."""
    return image.format == "PNG" and data[_PNG_DEPTH] == 16 and image.mode in ("RGB", "RGBA", "LA")


def turn_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to [C, H, W]."""
    upright = pixels.transpose(-2, -1) if orientation in _TRANSPOSED else pixels
    return upright.flip(_TURNS[orientation]) if orientation in _TURNS else upright.contiguous()


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Turn what a damaged file makes Pillow raise into a `DatasetError`."""
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise UnknownFormatError("not an image of a known format") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise a dozen kinds on damaged files: OSError, SyntaxError, struct.error
        raise DatasetError(f"damaged file ({error or type(error).__name__})") from error
