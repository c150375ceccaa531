"""Features of a dataset's images by a frozen backbone: loading, forward passes of one size, unreadable images.

What the features depend on. The network always gets exactly `IMAGES_OF_A_PASS` images at once, and an image always
stands at the same place among the same others: pass p holds the images p * 32 to p * 32 + 31 of the dataset, blank
images stand in for missing and unreadable ones. The batch size (how many images are handed over at a time, rounded up
to whole passes), the number of workers and of processes, and where a run was resumed decide only who computes a pass.
So none of them changes a bit of the result, whatever a matrix product does with its rows. Another order of the files
puts an image among others; features then agree bit for bit wherever a product treats all rows alike, as measured on
CPUs in float32 and bfloat16, and else up to rounding. Another device, number of threads or version of PyTorch may
round differently.

Rank r takes every W-th batch; no image is counted twice.
"""

import logging
import math
from collections.abc import Generator, Iterator, Sequence
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

IMAGES_OF_A_PASS = 32


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How features are computed: the arguments of `extract_local_features` that stay the same from call to call."""

    device: torch.device  # where the model is
    batch_size: int  # images that a worker hands over at a time; changes no result
    num_workers: int  # loader processes of one rank
    dtype: torch.dtype = torch.float32  # of the forward pass
    on_bad_image: Literal["error", "skip"] = "error"


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
        batch_size: images that a worker hands over at a time; rounded up to whole passes.
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
    batches = _batches_of_rank(len(dataset), batch_size=whole_passes(batch_size))
    places = [batch for batch, _ in batches if len(batch)]
    loaded = load_batches(dataset, places, num_workers=num_workers, device=device)
    parts, skipped = [], []
    with evaluation_mode(model), torch.no_grad(), closing(loaded):
        for batch, most in batches if description is None else track(batches, description=description):
            samples = next(loaded) if len(batch) else Batch()
            skipped += samples.errors
            shape = _agree(samples, on_bad_image=on_bad_image)
            if shape is None:
                continue
            images = samples.images if samples.images is not None else torch.zeros(0, *shape)
            passes = math.ceil(most / IMAGES_OF_A_PASS)
            values = run_passes(model, images, device=device, dtype=dtype, at_least=passes)
            if len(samples.rows):
                parts.append((values[torch.tensor(samples.rows)], samples.targets, samples.indices))
    _warn_of_skipped(skipped)
    return _check_finite(_join(parts))


def whole_passes(batch_size: int) -> int:
    """Round a number of images up to whole passes."""
    return math.ceil(batch_size / IMAGES_OF_A_PASS) * IMAGES_OF_A_PASS


def run_passes(
    model: nn.Module, images: Tensor, *, device: torch.device, dtype: torch.dtype, at_least: int = 0
) -> Tensor:
    """Compute the features of images in passes of one size; see the top of this file.

    Args:
        model: in evaluation mode, on the device.
        images: [B, C, height, width], on the CPU.
        device: where the model is.
        dtype: of the forward pass (autocast).
        at_least: passes to run even if there are fewer images, for a model whose ranks must all take part.

    Returns:
        Features [B, D], float32, on the CPU; with no image and no pass, [0].
    """
    parts = []
    for number in range(max(at_least, math.ceil(len(images) / IMAGES_OF_A_PASS))):
        part = images[number * IMAGES_OF_A_PASS : (number + 1) * IMAGES_OF_A_PASS]
        blank = part.new_zeros(IMAGES_OF_A_PASS - len(part), *images.shape[1:])
        full = torch.cat([part, blank]) if len(blank) else part
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            values = model(full.to(device, non_blocking=True))
        parts.append(values[: len(part)].float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


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


def _batches_of_rank(num_images: int, *, batch_size: int) -> list[tuple[range, int]]:
    """Every W-th batch, perhaps empty in the last round, each with the length of the longest of its round."""
    num_rounds = math.ceil(num_images / (batch_size * get_world_size()))
    batches = []
    for number in range(num_rounds):
        first = number * get_world_size() * batch_size
        start = min(first + get_rank() * batch_size, num_images)
        places = range(start, min(start + batch_size, num_images))
        batches.append((places, min(batch_size, num_images - first)))
    return batches


@dataclass
class Batch:
    """What a worker hands over; blank images and the errors stand for those that cannot be read."""

    images: Tensor | None = None  # [B, C, height, width]; None if none can be read
    rows: Sequence[int] = ()  # of the images that can be read
    targets: Sequence[int] = ()  # of these
    indices: Sequence[int] = ()  # of these: place in the dataset
    errors: Sequence[str] = ()

    def pin_memory(self) -> "Batch":
        """Called by the loader when a GPU is used."""
        images = None if self.images is None else self.images.pin_memory()
        return Batch(images, self.rows, self.targets, self.indices, self.errors)


def load_batches(
    dataset: Any, batches: Sequence[range], *, num_workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the images at these places, batch by batch; closing the generator ends the workers.

    Raises:
        DatasetError: a worker process died.
    """
    loader = DataLoader(
        _Samples(dataset),
        batch_sampler=[list(batch) for batch in batches],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type != "cpu",
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # or the loader would draw from torch's global random state
    )
    return iterate_and_end_workers(loader, batch_size_key="evaluation.knn.batch_size")


class _Samples(Dataset[tuple[int, Any, Any]]):
    """(index, image, target) of a dataset; an error that a user can cause takes the place of the image."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any, Any]:
        try:
            return index, *self.dataset[index]
        except Dinov2Error as error:
            return index, error, None


def _collate(samples: list[tuple[int, Any, Any]]) -> Batch:
    errors = [str(image) for _, image, _ in samples if isinstance(image, Exception)]
    rows = [row for row, (_, image, _) in enumerate(samples) if not isinstance(image, Exception)]
    if not rows:
        return Batch(errors=errors)
    blank = torch.zeros_like(samples[rows[0]][1])
    return Batch(
        images=torch.stack([blank if isinstance(image, Exception) else image for _, image, _ in samples]),
        rows=rows,
        targets=[NO_LABEL if samples[row][2] is None else int(samples[row][2]) for row in rows],
        indices=[samples[row][0] for row in rows],
        errors=errors,
    )


def _agree(batch: Batch, *, on_bad_image: str) -> tuple[int, ...] | None:
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
