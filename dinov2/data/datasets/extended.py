"""Base of datasets whose images are files: image and target by index, splits, columns, decoding and errors here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.decoders import MAX_IMAGE_PIXELS, EncodedImage, pillow_mode
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.splits import SPLITS, in_split
from dinov2.errors import ConfigError, DatasetError

_BITS = (8, 16)

NUM_PROBES = 100  # images tried, at most, before a dataset counts as unreadable


class ExtendedVisionDataset(Dataset[tuple[Any, Any]], ABC):
    """A dataset of image files; an item is (image, target), the target None without a label.

    A subclass gives `__len__`, `path`, `get_target` and either `get_image_data`, for one file an image that Pillow
    reads, or `encoded_image`, for any other source. It passes these arguments on. Its own keyword arguments are, with
    those of them that do not come from the config (split, its fractions, split_by, bits, one_per_group), the keys of
    its dataset string.

    Args:
        split: one of `SPLITS`, in any case; kept in lower case.
        val_fraction: share of the groups in val, about; 0..1.
        test_fraction: share of the groups in test, about; 0..1, with `val_fraction` less than 1.
        split_by: what makes a group, which no split tears apart; the subclass says which names it knows.
        one_per_group: training draws one image of each group in each pass over the data.
        bits: of a channel, 8 or 16. An item is then a Pillow image (8), or a tensor [C, H, W] of uint16.
        channels: 3 for RGB, 1 for grey; any image is converted. A subclass may know others: see `require_channels`.
        max_image_pixels: larger images are refused; None: no limit.
        cache_dir: where what was found out about the files may be kept; None: nowhere.
        transform: called with the image of an item.

    Raises:
        ConfigError: an argument is out of range.
    """

    HIDDEN_KEYS: ClassVar[tuple[str, ...]] = ()  # arguments that mean nothing to a subclass, and are no keys of it
    scans_folder = False  # whether every image that lies below `root` is taken

    def __init__(
        self,
        *,
        split: str = "all",
        val_fraction: float = 1 / 3,
        test_fraction: float = 0.0,
        split_by: str | None = None,
        one_per_group: bool = False,
        bits: int = 8,
        channels: int = 3,
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
        cache_dir: str | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.split = split.lower()
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_by = split_by
        self.one_per_group = one_per_group
        self.bits = bits
        self.channels = channels
        self.max_image_pixels = max_image_pixels
        self.cache_dir = cache_dir
        self.transform = transform
        self._require_ranges(split)
        self.require_channels()

    @abstractmethod
    def __len__(self) -> int: ...

    def get_image_data(self, index: int) -> bytes:
        """Content of the image's file; needed unless `encoded_image` is overridden."""
        raise TypeError(f"{type(self).__name__} defines neither get_image_data nor encoded_image")

    @abstractmethod
    def get_target(self, index: int) -> Any:
        """Label, an int for classes; None without one."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Where the image comes from, for messages."""

    def require_channels(self) -> None:
        """Check `self.channels`; a subclass with sources of its own overrides this.

        Raises:
            ConfigError: images cannot be given with that many channels.
        """
        pillow_mode(self.channels)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, ...; empty without labels."""
        return []

    def get_targets(self) -> np.ndarray | None:
        """Labels of all images, int64, -1 for an image without one; None if no image has one."""
        return None

    def groups(self) -> np.ndarray | None:
        """Number of the group of each image, int64, any numbers; None if the dataset knows no groups."""
        return None

    def pass_groups(self) -> np.ndarray | None:
        """Group of each image, of which a pass over the data draws one image each; None: a pass draws every image.

        Raises:
            ConfigError: one image per group is wanted, but the dataset knows no groups.
        """
        if not self.one_per_group:
            return None
        groups = self.groups()
        if groups is None:
            raise self.no_groups()
        return groups

    def no_groups(self) -> ConfigError:
        """Error about groups that are needed and not there."""
        name = type(self).__name__
        return ConfigError(f"dataset {name}: one_per_group=true needs groups, and there are none; set split_by")

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        """What computes each column of `metadata`; a subclass adds its own, such as group, plate or well."""
        columns: dict[str, Callable[[], np.ndarray]] = {
            "path": lambda: np.array([self.path(index) for index in range(len(self))])
        }
        targets = self.get_targets()
        return columns if targets is None else columns | {"target": lambda: targets}

    def metadata(self) -> Mapping[str, np.ndarray]:
        """Columns that describe each image, by name; each as long as the dataset, computed when it is looked up."""
        return LazyColumns(self.columns())

    def own_rows(self, keys: Iterable[bytes | str]) -> np.ndarray:
        """Choose the images of this dataset's split by the hash of their groups; for data without splits of its own.

        Args:
            keys: the group of each image of the whole dataset, or its path if every image stands alone.

        Returns:
            Their places, int64, in rising order.

        Raises:
            ConfigError: the split's share is 0.
            DatasetError: there are none.
        """
        fraction = f"{self.split}_fraction"
        if getattr(self, fraction, 1.0) == 0:
            raise ConfigError(f"dataset {type(self).__name__}: {fraction}=0 must be above 0 for split={self.split}")
        mask = in_split(keys, self.split, val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        if not mask.any():
            raise DatasetError(
                f"dataset {type(self).__name__}: none of its {len(mask)} images falls into split={self.split}; "
                "change val_fraction or test_fraction, or split by smaller groups"
            )
        return np.flatnonzero(mask)

    def encoded_image(self, index: int) -> ImageSource:
        """Image with its header read and its pixels not yet; decoding it raises a `DatasetError` without the path."""
        data = self.file_data(index)
        return EncodedImage(data, channels=self.channels, max_image_pixels=self.max_image_pixels, bits=self.bits)

    def file_data(self, index: int) -> bytes:
        """Content of the image's file; what the system refuses is a `DatasetError` without the path."""
        try:
            return self.get_image_data(index)
        except OSError as error:
            raise DatasetError(error.strerror or str(error)) from error

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index`, decoded and transformed.

        Raises:
            DatasetError: the image cannot be read; names index and path.
        """
        try:
            source = self.encoded_image(index)
            is_pillows = isinstance(source, EncodedImage) and source.bits == 8
            image = source.to_pil() if is_pillows else source.to_tensor()
        except DatasetError as error:
            raise unreadable(self, index, error) from error
        return (image if self.transform is None else self.transform(image)), self.get_target(index)

    def _require_ranges(self, split: str) -> None:
        """Check split, fractions and bits; `split` as it was written."""

        def require(holds: bool, setting: str, rule: str) -> None:
            if not holds:
                raise ConfigError(f"dataset {type(self).__name__}: {setting} must be {rule}")

        val, test = self.val_fraction, self.test_fraction
        require(self.split in SPLITS, f"split={split}", f"one of {', '.join(SPLITS)}")
        require(0 <= val < 1, f"val_fraction={val}", "at least 0 and below 1")
        require(0 <= test < 1, f"test_fraction={test}", "at least 0 and below 1")
        require(val + test < 1, f"val_fraction={val} and test_fraction={test} together", "below 1")
        require(self.bits in _BITS, f"bits={self.bits}", "8 or 16")


class LazyColumns(Mapping[str, np.ndarray]):
    """Columns computed when they are looked up, once.

    Args:
        columns: what computes each.
    """

    def __init__(self, columns: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._columns = columns
        self._known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._known:
            self._known[name] = self._columns[name]()
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def failure_of_all(dataset: Any, *, num_probes: int) -> DatasetError | None:
    """Read images from the first on until one succeeds; the first error if none of `num_probes` does, else None."""
    first_error = None
    for index in range(num_probes):
        try:
            dataset[index]
            return None
        except DatasetError as error:
            first_error = first_error or error
    return first_error


def unreadable(dataset: Any, index: int, reason: Exception) -> DatasetError:
    """Error about one image, with its index and path."""
    return DatasetError(f"image {index} ({image_path(dataset, index)}) cannot be read: {reason}")


def image_path(dataset: Any, index: int) -> str:
    """Path of an image; its index, if the dataset is a class of the user's own without paths."""
    return str(dataset.path(index)) if hasattr(dataset, "path") else f"item {index}"
