"""Train a grid of linear classifiers: on features of a cache, or on those of images augmented anew in every step.

Step s takes the positions s * batch and following of one shuffled stream; which image and which crop stand at a
position depends on the seed alone. The backbone gets passes of fixed size, dealt to the ranks, and every rank makes the
same update with all features of the batch. So neither the number of workers nor of processes changes what is learned,
and a resumed training ends as one that was never interrupted.
"""

import math
import os
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2.data.random_crops import cut_crops, draw_box, image_size
from dinov2.data.random_streams import sample_seed
from dinov2.data.samplers import SamplerType, make_sampler
from dinov2.distributed import all_gather_varlen, get_rank, get_world_size, on_every_rank
from dinov2.errors import CheckpointError, DatasetError
from dinov2.eval.classifier_sets import Part
from dinov2.eval.extraction import IMAGES_OF_A_PASS, evaluation_mode, load_batches, run_passes
from dinov2.eval.linear_grid import LinearGrid
from dinov2.logging.progress import track

_CROP_SCALE = (0.08, 1.0)  # share of the image's area; as the parents'
_FLIPS = (0.5, 0.0)  # probabilities, horizontal and vertical


class BatchPlan:
    """Which image stands at which position of the training, and the positions of each step.

    Args:
        num_images: of the training part.
        batch_size: images of a step, over all processes.
        seed: of their order.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._stream = make_sampler(SamplerType.INFINITE, dataset_size=num_images, seed=seed, global_batch_size=1)

    def positions(self, step: int) -> range:
        """Positions of a step."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def row(self, position: int) -> int:
        """Number of an image within the training part."""
        return self._stream.index_at(position)

    def rows(self, step: int) -> Tensor:
        """Images of a step, [B] int64."""
        return torch.tensor([self.row(position) for position in self.positions(step)])


def train_on_features(grid: LinearGrid, part: Part, plan: BatchPlan, *, shows_progress: bool = False) -> None:
    """Train all classifiers to the end on the features of a part, which stay as they are."""
    values, targets = part.source.values, part.targets
    places = torch.from_numpy(part.rows)
    steps = range(grid.step, grid.total_steps)
    for step in track(steps, description="linear classifiers") if shows_progress else steps:
        rows = plan.rows(step)
        grid.train_step(values[places[rows]].float().to(grid.device), targets[rows].to(grid.device))


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Random crops, at random flipped, by position of the training: (image [C, size, size] float32, class).

    Args:
        dataset: images by index, not transformed.
        part: the training part; its source tells the places in the dataset.
        plan: image at each position.
        size_px: side of a crop.
        mean: of each channel, fraction of full scale.
        std: of each channel.
    """

    def __init__(
        self, dataset: Any, part: Part, plan: BatchPlan, *, size_px: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.dataset, self.plan, self.size_px = dataset, plan, size_px
        self.places, self.classes = part.source.places[part.rows], part.classes
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """Make the sample of one position.

        Raises:
            DatasetError: the image cannot be read.
        """
        row = self.plan.row(position)
        index = int(self.places[row])
        has_sources = hasattr(self.dataset, "encoded_image")  # a class of the user's own may not
        image = self.dataset.encoded_image(index) if has_sources else self.dataset[index][0]
        rng = random.Random(sample_seed(self.plan.seed, position))
        box = draw_box(*image_size(image), scale=_CROP_SCALE, size=self.size_px, flips=_FLIPS, rng=rng)
        pixels = cut_crops(image, [box])[0]
        return (pixels.float() / torch.iinfo(pixels.dtype).max - self.mean) / self.std, int(self.classes[row])


def train_on_images(
    grid: LinearGrid,
    model: nn.Module,
    images: AugmentedImages,
    *,
    num_features: int,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype,
    after_step: Callable[[], None],
) -> None:
    """Train all classifiers to the end on augmented images; called by all ranks, equal results on all.

    Args:
        grid: changed in place, from its step on.
        model: frozen, images to features of the grid's pool; left in the mode it is in.
        images: by position.
        num_features: of the pool.
        num_workers: loader processes of one rank.
        device: where the model is.
        dtype: of the forward pass.
        after_step: called after each step, on every rank.

    Raises:
        DatasetError: an image cannot be read; raised by all ranks together.
    """
    plan = images.plan
    steps = range(grid.step, grid.total_steps)
    shares = [_share(plan.positions(step), get_rank()) for step in steps]
    loaded = load_batches(images, [share for share in shares if share], num_workers=num_workers, device=device)
    classes = torch.from_numpy(images.classes)
    with evaluation_mode(model), torch.no_grad(), closing(loaded):
        for step, share in zip(track(steps, description="linear classifiers"), shares, strict=True):

            def features_of(share: Sequence[int] = share) -> Tensor:
                if not share:
                    return torch.empty(0, num_features)
                batch = next(loaded)
                if batch.errors:
                    raise DatasetError(batch.errors[0])
                return run_passes(model, batch.images, device=device, dtype=dtype)

            values = on_every_rank(features_of)
            order = [position for rank in range(get_world_size()) for position in _share(plan.positions(step), rank)]
            features = all_gather_varlen(values)[np.argsort(order)]
            grid.train_step(features.to(grid.device), classes[plan.rows(step)].to(grid.device))
            after_step()


def _share(positions: range, rank: int) -> list[int]:
    """Positions of those passes of a step that one rank computes."""
    passes = range(rank, math.ceil(len(positions) / IMAGES_OF_A_PASS), get_world_size())
    return [
        position
        for number in passes
        for position in positions[number * IMAGES_OF_A_PASS : (number + 1) * IMAGES_OF_A_PASS]
    ]


def save_state(path: Path, grid: LinearGrid) -> None:
    """Write the state of a training, whole or not at all; for rank 0.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(grid.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: the state of the training cannot be written ({error.strerror})") from error


def load_state(path: Path) -> dict[str, Any] | None:
    """Read the state of a training; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds
        raise CheckpointError(
            f"{path}: the state of the training is damaged; delete it, or pass --no-resume"
        ) from error
