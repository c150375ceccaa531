"""Features of a dataset's images: the normalised class tokens of a frozen backbone.

Batches are cut from the dataset at the same places whatever the number of ranks, and rank r takes every W-th of them;
so the features do not depend on the number of ranks, and no image is counted twice.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2.data.loaders import iterate_and_end_workers, prepare_worker
from dinov2.distributed import all_gather_objects, all_gather_varlen, all_reduce_sum, get_rank, get_world_size
from dinov2.errors import CheckpointError, DatasetError, Dinov2Error
from dinov2.eval.feature_set import NO_LABEL
from dinov2.logging.progress import track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of this rank's share of a dataset, on the CPU, in the dataset's order."""

    values: Tensor  # [n, D], float32
    targets: Tensor  # [n], int64; -1 for an image without a label
    indices: Tensor  # [n], int64: place of the image in the dataset

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: Tensor) -> "Features":
        """Keep some rows, given as a mask or as row numbers."""
        return Features(self.values[rows], self.targets[rows], self.indices[rows])


def extract_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_bad_image: Literal["error", "skip"] = "error",
) -> tuple[Tensor, Tensor]:
    """Compute the features of all images, on all ranks; see `extract_local_features` for the arguments.

    Returns:
        (features [n, D] float32, targets [n] int64, -1 without a label), on the CPU, in the dataset's order.
    """
    local = extract_local_features(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        dtype=dtype,
        on_bad_image=on_bad_image,
    )
    order = all_gather_varlen(local.indices).argsort()
    return all_gather_varlen(local.values)[order], all_gather_varlen(local.targets)[order]


def extract_local_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_bad_image: Literal["error", "skip"] = "error",
    description: str | None = None,
) -> Features:
    """Compute the features of this rank's share of the images.

    The model runs in evaluation mode and is left in the mode it was in. Every rank calls it equally often, so it may be
    sharded. Global random states are left unchanged.

    Args:
        model: images [B, C, height, width] to features [B, D].
        dataset: items (image tensor [C, height, width], target), all images of one size.
        batch_size: images of one rank in one forward pass.
        num_workers: loader processes of one rank.
        device: where the model is.
        dtype: of the forward pass (autocast); float32 computes as the model is.
        on_bad_image: an image that cannot be read ends the evaluation, or is left out with a warning.
        description: shows progress under this name; None: silent.

    Raises:
        DatasetError: the dataset is empty or an image cannot be read; raised by all ranks together.
        CheckpointError: features are not finite.
    """
    if len(dataset) == 0:
        raise DatasetError("the dataset to evaluate on holds no images")
    batches = _batches_of_rank(len(dataset), batch_size=batch_size)
    loader = DataLoader(
        _Samples(dataset),
        batch_sampler=[list(batch) for batch in batches if len(batch)],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type != "cpu",
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # or the loader would draw from torch's global random state
    )
    parts, skipped = [], []
    loaded = iterate_and_end_workers(loader, batch_size_key="evaluation.knn.batch_size")
    with evaluation_mode(model), torch.no_grad(), closing(loaded):
        for batch in batches if description is None else track(batches, description=description):
            samples = next(loaded) if len(batch) else _Batch()
            skipped += samples.errors
            shape = _agree(samples, on_bad_image=on_bad_image)
            if shape is None:
                continue
            images = samples.images if samples.images is not None else torch.zeros(1, *shape)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                values = model(images.to(device, non_blocking=True))  # [B, D]
            if samples.images is not None:
                parts.append((values.float().cpu(), samples.targets, samples.indices))
    _warn_of_skipped(skipped)
    return _check_finite(_join(parts))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches_of_rank(num_images: int, *, batch_size: int) -> list[range]:
    """Every W-th batch, from this rank's number on; the last may be empty, so that all ranks have equally many."""
    num_rounds = math.ceil(num_images / (batch_size * get_world_size()))
    starts = [(number * get_world_size() + get_rank()) * batch_size for number in range(num_rounds)]
    return [range(min(start, num_images), min(start + batch_size, num_images)) for start in starts]


@dataclass
class _Batch:
    """What a worker hands over; images that cannot be read are left out and their errors are listed."""

    images: Tensor | None = None  # [B, C, height, width]
    targets: Sequence[int] = ()
    indices: Sequence[int] = ()
    errors: Sequence[str] = ()

    def pin_memory(self) -> "_Batch":
        """Called by the loader when a GPU is used."""
        images = None if self.images is None else self.images.pin_memory()
        return _Batch(images, self.targets, self.indices, self.errors)


class _Samples(Dataset[tuple[int, Any, Any]]):
    """(index, image, target) of a dataset; an error that a user can cause takes the place of the image."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any, Any]:
        try:
            return index, *self.dataset[index]
        except Dinov2Error as error:
            return index, error, None


def _collate(samples: list[tuple[int, Any, Any]]) -> _Batch:
    errors = [str(image) for _, image, _ in samples if isinstance(image, Exception)]
    good = [sample for sample in samples if not isinstance(sample[1], Exception)]
    return _Batch(
        images=torch.stack([image for _, image, _ in good]) if good else None,
        targets=[NO_LABEL if target is None else int(target) for _, _, target in good],
        indices=[index for index, _, _ in good],
        errors=errors,
    )


def _agree(batch: _Batch, *, on_bad_image: str) -> tuple[int, ...] | None:
    """Raise on all ranks if one has an error; else return the size of an image, None if no rank has any."""
    shape = None if batch.images is None else tuple(batch.images.shape[1:])
    error = batch.errors[0] if batch.errors and on_bad_image == "error" else None
    states = all_gather_objects((shape, error))
    errors = [error for _, error in states if error is not None]
    if errors:
        raise DatasetError(errors[0])
    return next((shape for shape, _ in states if shape is not None), None)


def _warn_of_skipped(errors: list[str]) -> None:
    skipped = [error for part in all_gather_objects(errors) for error in part]
    if skipped:
        logger.warning("evaluation left out %d images that cannot be read; the first: %s", len(skipped), skipped[0])


def _join(parts: list[tuple[Tensor, Sequence[int], Sequence[int]]]) -> Features:
    """Put the batches of this rank together; a rank without any image learns the number of features from the others."""
    num_features = max(all_gather_objects(parts[0][0].shape[1] if parts else 0))
    if num_features == 0:
        raise DatasetError("none of the images to evaluate on can be read")
    values = [values for values, _, _ in parts]
    return Features(
        values=torch.cat(values) if values else torch.empty(0, num_features),
        targets=torch.tensor([target for _, targets, _ in parts for target in targets], dtype=torch.int64),
        indices=torch.tensor([index for _, _, indices in parts for index in indices], dtype=torch.int64),
    )


def _check_finite(features: Features) -> Features:
    counts = torch.tensor([(~torch.isfinite(features.values).all(dim=1)).sum().item(), len(features)])
    bad, total = all_reduce_sum(counts).tolist()
    if bad:
        raise CheckpointError(
            f"{bad} of {total} feature vectors hold NaN or infinity; the weights are damaged, "
            "or too large for this precision: try compute_precision.param_dtype=fp32"
        )
    return features
