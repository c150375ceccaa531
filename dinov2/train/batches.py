"""Batches on the device: takes them from the loader, runs the second half of the augmentation, notes bad images."""

import logging
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.data import DataAugmentationDINO
from dinov2.distributed import all_gather_objects, all_reduce_max
from dinov2.errors import DatasetError

logger = logging.getLogger(__name__)


class DeviceBatches:
    """Endless finished batches of this rank; to be closed, as the loader's workers must end before the process does.

    Args:
        batches: raw batches of the loader; closed at the end.
        augmentation: its second half runs here.
        device: where the batches go.
        skipped_file: each replaced image's path is added to it once, a line each.
    """

    def __init__(
        self,
        batches: Generator[dict[str, Any], None, None],
        *,
        augmentation: DataAugmentationDINO,
        device: torch.device,
        skipped_file: Path,
    ) -> None:
        self.waited_s = 0.0  # since `reset_clock`
        self._batches = batches
        self._augmentation = augmentation
        self._device = device
        self._skipped_file = skipped_file
        self._skipped = _read_lines(skipped_file)  # of this run, also before it was resumed

    def close(self) -> None:
        """End the loader's workers."""
        self._batches.close()

    def __next__(self) -> dict[str, Any]:
        started = time.perf_counter()
        batch = self._fetch()
        self.waited_s += time.perf_counter() - started
        self._note_skipped(batch.pop("skipped"))
        seeds = batch.pop("seeds")  # stay on the CPU, where random numbers are drawn
        moved = {
            name: value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        return self._augmentation.finish(moved, seeds) | {"seeds": seeds}

    def _fetch(self) -> dict[str, Any]:
        """Take the next batch; an image that one rank cannot read ends all ranks, with the same sentence."""
        batch: dict[str, Any] = {}
        failure: DatasetError | None = None
        try:
            batch = next(self._batches)
        except DatasetError as error:
            failure = error
        if all_reduce_max(torch.tensor(float(failure is not None))).item():
            raise next(error for error in all_gather_objects(failure) if error is not None)
        return batch

    def reset_clock(self) -> None:
        """Start counting the time spent waiting for the loader anew."""
        self.waited_s = 0.0

    def _note_skipped(self, paths: list[str]) -> None:
        new = sorted(set(paths) - self._skipped)
        if not new:
            return
        self._skipped.update(new)
        for path in new:
            logger.warning("skipped unreadable image %s", path)
        with open(self._skipped_file, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{path}\n" for path in new)


def skipped_file(output_dir: Path, *, rank: int) -> Path:
    """Return where a rank lists the images that it could not read."""
    return output_dir / "logs" / f"skipped_images.rank{rank}.txt"


def report_skipped(output_dir: Path, *, rank: int) -> None:
    """Log how many images could not be read; called by all ranks at the end."""
    path = skipped_file(output_dir, rank=rank)
    everywhere = set().union(*all_gather_objects(sorted(_read_lines(path))))
    if everywhere:
        logger.warning(
            "%d images could not be read and were replaced; they are listed in %s",
            len(everywhere),
            path.parent / "skipped_images.rank*.txt",
        )


def _read_lines(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return set(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
