"""Label-free measures of a backbone in training, on a fixed sample of images, beside the same before the first step.

n images of the sample, D features.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from dinov2.configs import Config
from dinov2.distributed import all_gather_varlen
from dinov2.eval.build import NamedDataset, extraction_settings
from dinov2.eval.extraction import ExtractionSettings, Features, extract_local_features
from dinov2.eval.health_measures import alignment, neighbour_overlap_pct
from dinov2.eval.health_pairs import neighbours_within
from dinov2.eval.health_scores import measure
from dinov2.eval.health_views import TwoViews, choose_images

logger = logging.getLogger(__name__)

NUM_NEIGHBOURS = 10
_RECORDED = ("rankme", "effective_rank", "uniformity")  # each step of training records feature_std
_SHARE_OF_VIEWS = 4  # every so-manieth image of the sample is also seen in two views


@dataclass(frozen=True, kw_only=True)
class SampleFeatures:
    """Features of the sample, equal on all ranks."""

    dataset: str  # that the images are of
    places: np.ndarray  # [n] int64, rising; unreadable images may be left out
    values: Tensor  # [n, D] float32

    def write(self) -> bytes:
        """Return the content of a safetensors file."""
        return save({"places": torch.from_numpy(self.places), "values": self.values}, {"dataset": self.dataset})

    @classmethod
    def read(cls, path: Path) -> "SampleFeatures | None":
        """Read the file; None if there is none, or it cannot be read."""
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                places, values = file.get_tensor("places"), file.get_tensor("values")
                return cls(dataset=file.metadata()["dataset"], places=places.numpy(), values=values)
        except (OSError, safetensors.SafetensorError) as error:
            logger.warning("%s cannot be read (%s); the overlap with the start is left out", path, error)
            return None


class Preprocessed(Dataset[tuple[Tensor, Any]]):
    """A dataset of training, each image preprocessed as for evaluations."""

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self.dataset[index]
        return self.transform(image), target


class OnlineHealth:
    """Measure backbones without labels, on a fixed sample of images.

    Args:
        images: those to draw the sample from, as tensors of one size.
        num_images: of the sample, >= 2; all, if there are not more.
        extraction: how features are computed; measures are, too, on its device.
    """

    def __init__(self, images: NamedDataset, *, num_images: int, extraction: ExtractionSettings) -> None:
        self._images = images
        self._places = choose_images(len(images.dataset), at_most=num_images)
        self._extraction = extraction

    @classmethod
    def from_config(cls, cfg: Config, images: NamedDataset, *, device: torch.device) -> "OnlineHealth | None":
        """Take the settings of a run; None where `evaluation.health` is turned off."""
        if not cfg.evaluation.health.num_images:
            return None
        return cls(
            images,
            num_images=cfg.evaluation.health.num_images,
            extraction=extraction_settings(cfg, device=device),
        )

    def __call__(
        self, backbone: nn.Module, *, known: Features | None = None, start: SampleFeatures | None = None
    ) -> tuple[dict[str, float], SampleFeatures]:
        """Measure one backbone; called by all ranks, equal results on all. Global random states stay as they are.

        Args:
            backbone: images [B, C, height, width] to features [B, D]; left in the mode it is in.
            known: features of this rank's share of all the images, if they are computed already.
            start: those of the sample before the first step.

        Returns:
            `rankme`, `effective_rank`, `uniformity`, `alignment` and, with a start, `nn_overlap_with_start_pct`, see
            `dinov2.eval.health_measures`; and the features of the sample.

        Raises:
            DatasetError: an image cannot be read.
            CheckpointError: features are not finite.

        Cost: n forward passes unless `known`, n / 2 more for alignment, and n^2 * D and n * D^2 multiplications.
        """
        sample = self._gather(backbone, known)
        if len(sample.places) < 2:
            logger.warning("%s: fewer than 2 images can be read, too few for measures", sample.dataset)
            return {}, sample
        measured = measure(sample.values, device=self._extraction.device).scores
        scores = {name: measured[name] for name in _RECORDED}
        views = Subset(self._images.dataset, self._places[::_SHARE_OF_VIEWS].tolist())
        features = extract_local_features(TwoViews(backbone), views, **vars(self._extraction))
        scores["alignment"] = alignment(*_in_order(features).chunk(2, dim=1))
        overlap = self._overlap(sample, start)
        return scores if overlap is None else scores | {"nn_overlap_with_start_pct": overlap}, sample

    def _gather(self, backbone: nn.Module, known: Features | None) -> SampleFeatures:
        if known is None:
            sample = Subset(self._images.dataset, self._places.tolist())
            local = extract_local_features(backbone, sample, **vars(self._extraction))
            places = self._places[all_gather_varlen(local.indices).sort().values.numpy()]
        else:
            local = known.take(torch.isin(known.indices, torch.from_numpy(self._places)))
            places = all_gather_varlen(local.indices).sort().values.numpy()
        return SampleFeatures(dataset=self._images.name, places=places, values=_in_order(local))

    def _overlap(self, sample: SampleFeatures, start: SampleFeatures | None) -> float | None:
        """Compare the neighbours of the images that both have; None where there are too few, or of another set."""
        if start is None or start.dataset != sample.dataset:
            return None
        _, rows, rows_of_start = np.intersect1d(sample.places, start.places, return_indices=True)
        if len(rows) <= NUM_NEIGHBOURS:
            return None
        of_both = (sample.values[torch.from_numpy(rows)], start.values[torch.from_numpy(rows_of_start)])
        now, before = (
            neighbours_within(values, num_neighbours=NUM_NEIGHBOURS, device=self._extraction.device)
            for values in of_both
        )
        return neighbour_overlap_pct(now, before)


def _in_order(features: Features) -> Tensor:
    """Gather the values of all ranks in the dataset's order, [n, D]."""
    return all_gather_varlen(features.values)[all_gather_varlen(features.indices).argsort()]
