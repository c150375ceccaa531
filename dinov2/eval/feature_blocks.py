"""Features computed in blocks of rows, each kept as soon as it is finished, by as many ranks as there are.

What is there from an earlier program that was killed is taken as it is. Blocks are cut at the same places whatever the
number of ranks, and each is one file, which one rank writes.
"""

import itertools
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data.datasets.extended import image_path
from dinov2.distributed import get_rank, get_world_size, on_every_rank, on_main_first
from dinov2.errors import CheckpointError, ConfigError, DatasetError
from dinov2.eval.build import NamedDataset
from dinov2.eval.extraction import Batch, load_batches, run_passes, whole_passes
from dinov2.eval.feature_digest import columns_of
from dinov2.eval.feature_files import read_block, write_block, write_feature_set
from dinov2.eval.feature_set import FeatureSet
from dinov2.logging.progress import track

logger = logging.getLogger(__name__)

_ROWS_OF_A_BLOCK = 1024  # whole passes
_ROWS_OF_A_BLOCK_OF_PATCHES = 128
_NUM_NAMED = 3  # images in a sentence


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that one computation of features needs."""

    dataset: NamedDataset
    model: nn.Module  # in evaluation mode, on the device
    kept_dtype: torch.dtype  # of the numbers that are kept
    device: torch.device
    batch_size: int
    num_workers: int
    dtype: torch.dtype  # of the forward pass
    on_bad_image: Literal["error", "skip"]
    description: str | None = None  # of the progress; None: silent


def compute_feature_files(job: Job, path: Path, *, about: FeatureSet, parts: Mapping[str, str]) -> None:
    """Compute the blocks that are missing, each rank its share, and put all of them together; called by all ranks.

    Args:
        job: what to compute.
        path: `NAME.safetensors` to write; its folder exists. The blocks are kept in `NAME.partial` until it is there.
        about: names and digest; its rows are not used.
        parts: digests of what the features depend on.

    Raises:
        ConfigError, DatasetError, CheckpointError: as for `cached_features`; raised by all ranks together.
    """
    folder = path.with_suffix(".partial")
    blocks = _blocks(len(job.dataset.dataset), pool=about.pool)
    started_s = time.monotonic()
    missing = on_main_first(_missing_blocks, folder, len(blocks))
    _compute_blocks(job, folder, {number: blocks[number] for number in missing})
    on_main_first(_assemble, job, path, about, parts, folder, len(blocks))
    if get_rank() == 0:
        seconds = time.monotonic() - started_s
        logger.info("features=%s images=%d seconds=%.1f", path, len(job.dataset.dataset), seconds)


def _blocks(count: int, *, pool: str) -> list[range]:
    """Places of the images of each block."""
    rows = _ROWS_OF_A_BLOCK_OF_PATCHES if pool == "patches" else _ROWS_OF_A_BLOCK
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"block_{number:06d}.bin"


def _missing_blocks(folder: Path, num_blocks: int) -> list[int]:
    """Find the blocks that an earlier program has not finished; for rank 0."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); choose another --features-dir") from error
    missing = [number for number in range(num_blocks) if read_block(_block_path(folder, number)) is None]
    if len(missing) < num_blocks:
        done = num_blocks - len(missing)
        logger.info("%d of %d blocks of features are there from an earlier run", done, num_blocks)
    return missing


def _compute_blocks(job: Job, folder: Path, blocks: Mapping[int, range]) -> None:
    """Compute this rank's share; after each block all ranks learn whether one has failed."""
    own = list(blocks.items())[get_rank() :: get_world_size()]
    rounds = -(-len(blocks) // get_world_size())
    size = whole_passes(job.batch_size)
    batches = [places[first : first + size] for _, places in own for first in range(0, len(places), size)]
    loaded = load_batches(job.dataset.dataset, batches, num_workers=job.num_workers, device=job.device)
    shown = iter(batches) if job.description is None else track(batches, description=job.description)
    with torch.no_grad(), closing(loaded):
        for round_number in range(rounds):

            def compute_one(round_number: int = round_number) -> None:
                if round_number < len(own):
                    number, places = own[round_number]
                    parts = [_features_of(job, next(loaded)) for _ in itertools.islice(shown, -(-len(places) // size))]
                    write_block(_block_path(folder, number), _joined(parts))

            on_every_rank(compute_one)


def _features_of(job: Job, batch: Batch) -> dict[str, Tensor] | None:
    """Compute the features of a batch; None if none of its images can be read."""
    if batch.errors:
        if job.on_bad_image == "error":
            raise DatasetError(batch.errors[0])
        logger.info("left out: %s", "; ".join(batch.errors))
    if batch.images is None:
        return None
    values = run_passes(job.model, batch.images, device=job.device, dtype=job.dtype)[torch.tensor(batch.rows)]
    kept = values.to(job.kept_dtype)
    _refuse_non_finite(job, values, batch=batch)
    _refuse_overflow(job, values, kept=kept, batch=batch)
    return {"values": kept, "targets": torch.tensor(batch.targets), "places": torch.tensor(batch.indices)}


def _refuse_non_finite(job: Job, values: Tensor, *, batch: Batch) -> None:
    bad = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise CheckpointError(
            f"the features of {_named(job, batch, bad)} hold NaN or infinity; the weights are damaged, or too large "
            "for this precision: try compute_precision.param_dtype=fp32"
        )


def _refuse_overflow(job: Job, values: Tensor, *, kept: Tensor, batch: Batch) -> None:
    bad = (~kept.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        largest = values.abs().max().item()
        raise ConfigError(
            f"the features of {_named(job, batch, bad)} are too large for fp16 (up to {largest:.0f}, and fp16 ends at "
            f"{torch.finfo(job.kept_dtype).max:.0f}); keep them as bf16 or fp32 (--features-dtype)"
        )


def _named(job: Job, batch: Batch, rows: Sequence[int]) -> str:
    """Name some images of a batch."""
    names = [image_path(job.dataset.dataset, batch.indices[row]) for row in rows[:_NUM_NAMED]]
    more = f" and {len(rows) - _NUM_NAMED} more of the same batch" if len(rows) > _NUM_NAMED else ""
    return ", ".join(names) + more


def _joined(parts: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor]:
    """Put the batches of a block together; without values, if no image of it can be read."""
    present = [part for part in parts if part is not None]
    if not present:
        return {name: torch.empty(0, dtype=torch.int64) for name in ("targets", "places")}
    return {name: torch.cat([part[name] for part in present]) for name in present[0]}


def _assemble(job: Job, path: Path, about: FeatureSet, parts: Mapping[str, str], folder: Path, num_blocks: int) -> None:
    """Make the finished files of all blocks, which are then removed; for rank 0."""
    targets, places, shape = [], [], None
    for number in range(num_blocks):
        block = _block(folder, number)
        targets.append(block["targets"])
        places.append(block["places"])
        shape = list(block["values"].shape[1:]) if "values" in block else shape
    if shape is None:
        raise DatasetError(f"{about.name}: none of its images can be read")
    rows = torch.cat(places).numpy()
    dataset = job.dataset.dataset
    groups = dataset.groups() if hasattr(dataset, "groups") else None
    features = replace(
        about,
        values=torch.empty(len(rows), *shape, dtype=job.kept_dtype, device="meta"),
        targets=torch.cat(targets).numpy(),
        places=rows,
        columns={name: column[rows] for name, column in columns_of(dataset).items()},
        groups=None if groups is None else np.asarray(groups, dtype=np.int64)[rows],
    )
    blocks = (_block(folder, number) for number in range(num_blocks))
    write_feature_set(path, features, parts=parts, values=(block["values"] for block in blocks if "values" in block))
    shutil.rmtree(folder, ignore_errors=True)


def _block(folder: Path, number: int) -> dict[str, Tensor]:
    block = read_block(_block_path(folder, number))
    if block is None:
        raise DatasetError(
            f"{_block_path(folder, number)}: was damaged or removed after it was written; start again, and use a "
            "--features-dir that all machines of the job see"
        )
    return block
