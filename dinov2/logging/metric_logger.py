"""`MetricLogger`: raw values of every step in `training_metrics.json`, and a short view of them on screen.

Values stay on the device until `period_steps` of them are there; then they come over in one transfer and are averaged
over ranks in one all-reduce.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_mean, get_world_size, is_main_process, on_main_first
from dinov2.logging.metrics_file import MetricsFile
from dinov2.logging.progress import Progress
from dinov2.logging.writers import TensorBoardWriter, WandbWriter, Writer

logger = logging.getLogger(__name__)

METRICS_NAME = "training_metrics.json"
Row = tuple[int, dict[str, float]]


class MetricLogger:
    """Record the metrics of a run. All ranks record the same names at the same steps; rank 0 writes.

    Args:
        output_dir: folder of the run, made if absent.
        period_steps: steps between transfers, lines on screen and lines to disk, >= 1.
        total_steps: of the whole run, for the progress bar.
        start_step: the step that this process begins with; the file is cut back to the steps before it.
        tensorboard: also write TensorBoard files.
        wandb: also send to Weights & Biases.
        wandb_project: project there.
        config: settings shown there.

    Raises:
        ConfigError: the file cannot be written, or an optional package is absent.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        period_steps: int,
        total_steps: int,
        start_step: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str = "dinov2-adapt",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.period_steps = period_steps
        self._rows: list[tuple[int, dict[str, Tensor | float]]] = []
        self._fetched: list[Row] = []  # since `take_rows`
        self._file: MetricsFile | None = None
        self._progress: Progress | None = None
        self._writers: list[Writer] = []
        if not is_main_process():
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._writers.append(TensorBoardWriter(folder, start_step=start_step))
        if wandb:
            self._writers.append(WandbWriter(folder, project=wandb_project, config=config or {}))
        self._file = MetricsFile(folder / METRICS_NAME, start_step=start_step)
        self._progress = Progress(total_steps=total_steps, start_step=start_step)

    def record(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Take the values of one step: 0-dim tensors on any device, or numbers; does not wait for the device.

        The tensors are not copied: give ones that nothing changes in place afterwards.
        """
        row = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        self._rows.append((step, row))
        if (step + 1) % self.period_steps == 0:
            self.flush()

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Add the results of an evaluation after this step, equal on all ranks, to the step's line."""
        self.flush()
        if scores:
            on_main_first(self._write_scores, step, scores)

    def _write_scores(self, step: int, scores: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.add_to_last(step, scores)
        for writer in self._writers:
            writer.write(step, scores)

    def flush(self) -> None:
        """Bring over what is recorded and write it; called by all ranks, and before each checkpoint is saved.

        Raises:
            TrainingError: the file cannot be written any more; on all ranks.
        """
        if not self._rows:
            return
        rows = _fetch(self._rows)
        self._rows = []
        self._fetched += rows
        on_main_first(self._write, rows)

    def take_rows(self) -> list[Row]:
        """Return the steps that were brought over since the last call, (step, means over ranks), equal on all ranks."""
        rows, self._fetched = self._fetched, []
        return rows

    def _write(self, rows: list[Row]) -> None:
        if self._file is None or self._progress is None:
            return
        self._file.append(rows)
        for writer in self._writers:
            for step, values in rows:
                writer.write(step, values)
        self._progress.show(rows)

    def close(self) -> None:
        """Close files and bar; what was recorded after the last `flush` is written only on a single process."""
        if get_world_size() == 1:  # elsewhere the other ranks may be gone, after an error
            self.flush()
        for part in (self._progress, self._file, *self._writers):
            if part is not None:
                part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self.close()


def _fetch(rows: list[tuple[int, dict[str, Tensor | float]]]) -> list[Row]:
    """Turn the values of all steps into numbers, averaged over ranks: one transfer, one all-reduce."""
    cells = [value for _, values in rows for value in values.values()]
    tensors = [cell.reshape(()) for cell in cells if isinstance(cell, Tensor)]
    fetched = iter(_to_host(tensors))
    numbers = torch.tensor([next(fetched) if isinstance(c, Tensor) else c for c in cells], dtype=torch.float64)
    means = iter(all_reduce_mean(numbers).tolist())
    return [(step, {name: next(means) for name in values}) for step, values in rows]


def _to_host(tensors: list[Tensor]) -> list[float]:
    """Stack scalars on their device and wait for it once."""
    if not tensors:
        return []
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.stack([tensor.to(device, dtype, non_blocking=True) for tensor in tensors]).tolist()
