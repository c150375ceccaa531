"""Datasets from strings, and the loader of training batches.

The workers hand errors over as values, so that the main process raises the sentence itself, not a worker's traceback.
"""

import signal
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import MaskedCollate
from dinov2.data.datasets.decoders import MAX_IMAGE_PIXELS
from dinov2.data.masking import MaskingGenerator, MaskPlan
from dinov2.data.registry import build_dataset
from dinov2.data.samplers import RankBatchSampler, SamplerType, make_stream
from dinov2.data.samples import Sample, TrainingSamples
from dinov2.errors import DatasetError, Dinov2Error


def make_dataset(
    dataset_str: str,
    *,
    channels: int = 3,
    cache_dir: str | None = None,
    max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    transform: Callable[[Any], Any] | None = None,
) -> Any:
    """Build the dataset that a string names.

    Args:
        dataset_str: `Name:key=value:...`, e.g. `ImageFolder:root=photos`; the name is a registered one or
            package.module.Class. Several such parts may be joined by a plus, with weights or without:
            `0.7*A:...+0.3*B:...`.
        channels: of the images; 3 converts to RGB, 1 to grey.
        cache_dir: folder where a dataset may keep what it found out about its files.
        max_image_pixels: larger images are refused; None: no limit.
        transform: applied to the image of an item.

    Returns:
        A dataset with items (image, target), the target None without a label.

    Raises:
        ConfigError: the string is malformed, or names an unknown dataset or key.
        DatasetError: its files are missing.
    """
    settings = {
        "channels": channels,
        "cache_dir": cache_dir,
        "max_image_pixels": max_image_pixels,
        "transform": transform,
    }
    return build_dataset(dataset_str, settings)


class TrainingLoader:
    """Batches of one rank, without end; each iteration starts at the same position."""

    def __init__(self, batches: DataLoader[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        """Yield batches as `MaskedCollate` makes them; closing the generator ends the workers.

        Raises:
            DatasetError: an image cannot be read, or a worker process died.
        """
        for batch in iterate_and_end_workers(self._batches, batch_size_key="train.batch_size_per_gpu"):
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def make_data_loader(
    dataset: Any,
    *,
    augmentation: DataAugmentationDINO,
    batch_size: int,
    patch_size: int,
    num_workers: int = 0,
    sampler: SamplerType | str = SamplerType.SHARDED_INFINITE,
    seed: int = 0,
    start_position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    mask_sample_probability: float = 0.5,
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
    on_bad_image: Literal["error", "skip"] = "error",
    pin_memory: bool = False,
) -> TrainingLoader:
    """Make the loader of training batches.

    A step reads global_batch = batch_size * world_size * accumulation_steps samples; step s starts at position
    s * global_batch of the stream. Which images, crops and masks stand at a position depends on the seed alone.

    Args:
        dataset: items (image, target), the image a Pillow image or a uint8 or uint16 tensor [C, H, W].
        augmentation: its first half runs in the workers.
        batch_size: images of one rank in one batch.
        patch_size: side of a patch, px, for the masks.
        num_workers: processes; 0: everything in this one.
        sampler: see `make_sampler` and `make_stream`.
        seed: train.seed.
        start_position: samples that all ranks together have read before.
        rank: 0 .. world_size - 1.
        world_size: ranks.
        accumulation_steps: batches of a rank that make one step.
        mask_sample_probability: share of global crops with a mask, 0..1.
        mask_ratio_min_max: smallest and largest share of masked patches of such a crop, 0..1.
        on_bad_image: error or skip, see `TrainingSamples`.
        pin_memory: for CUDA: batches in page-locked memory.

    Raises:
        ConfigError: the dataset holds fewer images than one global batch.
    """
    global_batch_size = batch_size * world_size * accumulation_steps
    stream = make_stream(dataset, sampler, seed=seed, global_batch_size=global_batch_size)
    collate = make_collate(
        augmentation,
        patch_size=patch_size,
        seed=seed,
        global_batch_size=global_batch_size,
        mask_sample_probability=mask_sample_probability,
        mask_ratio_min_max=mask_ratio_min_max,
    )
    samples = TrainingSamples(dataset, augmentation, seed=seed, on_bad_image=on_bad_image)
    batches = DataLoader(
        _CarriesErrors(samples),
        batch_sampler=RankBatchSampler(
            stream, batch_size=batch_size, start_position=start_position, rank=rank, world_size=world_size
        ),
        num_workers=num_workers,
        collate_fn=_CollateOrFail(collate),
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # or the loader would draw its workers' base seed from torch's global one
    )
    return TrainingLoader(batches)


def make_collate(
    augmentation: DataAugmentationDINO,
    *,
    patch_size: int,
    seed: int,
    global_batch_size: int,
    mask_sample_probability: float,
    mask_ratio_min_max: tuple[float, float],
) -> MaskedCollate:
    """Make what turns samples into the batches of training; see `make_data_loader` for the arguments."""
    patches_per_side = augmentation.global_crops_size // patch_size
    return MaskedCollate(
        augmentation,
        mask_generator=MaskingGenerator(patches_per_side, max_num_patches=max(1, patches_per_side**2 // 2)),
        mask_plan=MaskPlan(
            seed, global_batch_size, probability=mask_sample_probability, ratio_min_max=mask_ratio_min_max
        ),
    )


def iterate_and_end_workers(loader: DataLoader[Any], *, batch_size_key: str) -> Generator[Any, None, None]:
    """Yield the batches of a loader; its workers have ended when this is closed or fails, however that comes about.

    PyTorch ends them when the loader's iterator is freed. The traceback of an error would keep it alive until the end
    of the process, which then waits for workers that nobody has told to end.

    Args:
        loader: with or without workers, which use `prepare_worker`.
        batch_size_key: config key to name when a worker was killed.

    Raises:
        DatasetError: a worker process died.
    """
    try:
        yield from loader
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise DatasetError(
                "a loader worker process was killed, mostly for lack of memory or of shared memory (/dev/shm); "
                f"lower train.num_workers or {batch_size_key}"
            ) from error
        raise


def prepare_worker(worker_id: int) -> None:
    """Set up a loader worker: one thread, and signals left to the main process, which ends its workers itself.

    Ctrl-C and a scheduler's SIGTERM, SIGUSR1 or SIGUSR2 reach every process of a job; a worker that obeyed would make
    the main process fail before it can save. A second SIGTERM ends it.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker to the main process."""

    error: Dinov2Error


class _CarriesErrors(Dataset[Sample | _Failure]):
    """Dataset that returns the errors a user can cause instead of raising them."""

    def __init__(self, samples: TrainingSamples) -> None:
        self.samples = samples

    def __getitem__(self, place: tuple[int, int]) -> Sample | _Failure:
        try:
            return self.samples[place]
        except Dinov2Error as error:
            return _Failure(error)


class _CollateOrFail:
    """Collate function that hands on the first failure of a batch."""

    def __init__(self, collate: MaskedCollate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample | _Failure]) -> dict[str, Any] | _Failure:
        failures = [sample for sample in samples if isinstance(sample, _Failure)]
        try:
            return failures[0] if failures else self.collate(samples)
        except Dinov2Error as error:
            return _Failure(error)
