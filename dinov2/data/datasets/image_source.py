"""What the pipeline asks of one image of a dataset: its size before decoding, its pixels once, perhaps parts of it.

Shapes: C channels, H rows, W columns. `EncodedImage` is the source for files that Pillow reads.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageSource(Protocol):
    """An image whose header is read and whose pixels are not.

    A source that can read parts of the image alone, tiles or memory-mapped rows, also has the method of
    `RegionSource`. A source that cannot be read raises `DatasetError` with the reason and without the path.
    """

    width: int  # px, of the upright image
    height: int  # px, of the upright image
    channels: int  # of what `to_tensor` gives, >= 1

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode, once.

        Args:
            reduce: how many times smaller, in both directions, the result may be; >= 0. A source may ignore it.

        Returns:
            Pixels [C, H, W], uint8, or uint16 if the file has more than 8 bits and the dataset wants them.

        Raises:
            DatasetError: the image is damaged.
        """
        ...


@runtime_checkable
class RegionSource(ImageSource, Protocol):
    """A source that reads parts of its image without reading the rest."""

    def read_region(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Read one rectangle, given in px of the upright image and inside it.

        Returns:
            Pixels [C, height, width], equal to that part of `to_tensor()`.

        Raises:
            DatasetError: the image is damaged.
        """
        ...
