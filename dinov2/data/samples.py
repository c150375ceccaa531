"""Training samples: the first half of the augmentation applied to images of a dataset, unreadable ones dealt with."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.datasets.extended import image_path, unreadable
from dinov2.data.random_streams import derive_seed, sample_seed
from dinov2.errors import DatasetError

_NUM_REPLACEMENTS = 20  # tried for one unreadable image
_REPLACEMENT_STREAM = 4  # of derive_seed over a sample's seed


@dataclass(frozen=True)
class Sample:
    """What a worker makes of one position of the stream."""

    position: int
    seed: int  # of everything random about it
    crops: dict[str, list[Tensor]]
    skipped: tuple[str, ...]  # paths of unreadable images it stands in for


class TrainingSamples(Dataset[Sample]):
    """Samples by (position in the stream, dataset index).

    Args:
        dataset: images by index; targets are not used.
        augmentation: its first half is applied.
        seed: train.seed.
        on_bad_image: error: an image that cannot be read raises; skip: another one takes its place, the same on any
            worker and rank.
    """

    def __init__(
        self,
        dataset: Any,
        augmentation: DataAugmentationDINO,
        *,
        seed: int,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.skips = on_bad_image == "skip"

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Make a sample.

        Raises:
            DatasetError: the image cannot be read, or, with skip, neither can its replacements.
        """
        position, index = place
        seed = sample_seed(self.seed, position)
        skipped: list[str] = []
        while True:
            try:
                return Sample(position, seed, self._crops(index, seed), tuple(skipped))
            except DatasetError as error:
                if not self.skips:
                    raise
                if len(skipped) == _NUM_REPLACEMENTS:
                    raise DatasetError(
                        f"{1 + len(skipped)} images drawn in a row are unreadable; the last: {error}"
                    ) from error
                skipped.append(image_path(self.dataset, index))
                index = derive_seed(seed, _REPLACEMENT_STREAM, len(skipped)) % len(self.dataset)

    def _crops(self, index: int, seed: int) -> dict[str, list[Tensor]]:
        """Read and crop one image."""
        has_sources = hasattr(self.dataset, "encoded_image")  # a class of the user's own may not
        try:
            image = self.dataset.encoded_image(index) if has_sources else self.dataset[index][0]
            return self.augmentation.crop(image, seed)
        except DatasetError as error:
            raise unreadable(self.dataset, index, error) from error
