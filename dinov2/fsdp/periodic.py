"""When to save a checkpoint, and which old ones to delete afterwards."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common import checkpoint as fvcore_checkpoint

from dinov2 import checkpoint_format as files
from dinov2.distributed import is_main_process, on_main_first
from dinov2.fsdp.checkpointer import FSDPCheckpointer

logger = logging.getLogger(__name__)

BEST_NAME = "best_checkpoint.json"


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):
    """Saves every `period` iterations and after the last one, and keeps the newest few and the best one.

    What is kept is decided from the folder after every save, so a resumed run goes on where the first one stopped.
    """

    def __init__(
        self,
        checkpointer: FSDPCheckpointer,
        period: int,
        *,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        keep_every: int | None = None,
        period_minutes: float | None = None,
        save_best: str | None = None,
        save_best_mode: str = "max",
        copy_to: str | None = None,
    ) -> None:
        """Only remembers its arguments.

        Args:
            checkpointer: does the saving.
            period: iterations between saves, >= 1.
            max_iter: iterations of the whole run; the last one is saved whatever the period.
            max_to_keep: complete checkpoints kept, >= 1, not counting those that `keep_every` keeps, and an older one
                that is the best; None keeps all.
            keep_every: checkpoints after every so many iterations are never deleted; None spares none.
            period_minutes: minutes after which `minutes_are_over`, > 0; None: never.
            save_best: name of the score by which the best checkpoint is kept; None keeps none for its score.
            save_best_mode: max where a higher score is better, min where a lower one is.
            copy_to: second folder, to which complete checkpoints are copied; a copy that fails is logged.
        """
        super().__init__(checkpointer, period, max_iter=max_iter, max_to_keep=max_to_keep)
        self.keep_every = keep_every
        self.period_minutes = period_minutes
        self.save_best = save_best
        self.save_best_mode = save_best_mode
        self.last_saved: int | None = None  # iteration
        self._saved_at_s = time.monotonic()
        self._best: float | None = None
        self._best_is_known = False
        self._is_score_missing = False
        checkpointer.also_copy_to(copy_to)
        checkpointer.on_complete = self._delete_old

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Save if it is time to; called by all ranks after every iteration, counted from 0."""
        if self.is_due(iteration):
            self.save_now(iteration, **kwargs)

    def is_due(self, iteration: int, minutes_due: bool = False) -> bool:
        """Say whether `step` saves after this iteration.

        Args:
            iteration: counted from 0.
            minutes_due: what `minutes_are_over` said on rank 0, the same on all ranks.
        """
        is_last = self.max_iter is not None and iteration >= self.max_iter - 1
        return is_last or minutes_due or (iteration + 1) % self.period == 0

    def minutes_are_over(self) -> bool:
        """Say whether `period_minutes` have passed since the last save, by a clock that nobody sets; asks no rank."""
        return self.period_minutes is not None and time.monotonic() - self._saved_at_s >= 60 * self.period_minutes

    def save_now(self, iteration: int, **kwargs: Any) -> None:
        """Save, unless this iteration was just saved, and delete what is no longer wanted once it is complete.

        Raises:
            CheckpointError: a rank could not write; nothing has been deleted.
        """
        if iteration == self.last_saved:
            return
        self.checkpointer.save(files.checkpoint_name(iteration), iteration=iteration, **kwargs)
        self.last_saved = iteration
        self._saved_at_s = time.monotonic()

    def note_scores(self, iteration: int, scores: Mapping[str, float], **kwargs: Any) -> None:
        """Keep the checkpoint of this iteration if it has the best score so far; it is saved if it was not yet.

        Args:
            iteration: whose weights were evaluated.
            scores: by name, equal on all ranks.
            kwargs: as for `save_now`.
        """
        if self.save_best is None or not self.checkpointer.save_dir or not self.checkpointer.save_to_disk:
            return
        value = scores.get(self.save_best)
        if value is None:
            if scores and not self._is_score_missing and is_main_process():
                logger.warning("no score %s to choose the best checkpoint by; there are %s", self.save_best, [*scores])
            self._is_score_missing = bool(scores)
            return
        if not self._best_is_known:
            self._best, self._best_is_known = on_main_first(self._read_best_value), True
        sign = 1 if self.save_best_mode == "max" else -1
        if math.isnan(value) or (self._best is not None and sign * value <= sign * self._best):
            return
        self.save_now(iteration, metrics=dict(scores), **kwargs)
        self._best = value
        name = files.checkpoint_name(iteration)
        self.checkpointer.submit(lambda: self._mark_best(name, value))

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            CheckpointError: something could not be written.
        """
        self.checkpointer.wait()
        self.checkpointer.raise_failure()

    def _read_best_value(self) -> float | None:
        """Read the best score of the run so far; where it goes on from its copies, only they know."""
        found = [best for folder in self._folders() if (best := _read_best(folder)) is not None]
        values = [best["value"] for best in found if best["metric"] == self.save_best]
        return (max if self.save_best_mode == "max" else min)(values, default=None)

    def _folders(self) -> list[Path]:
        return [Path(folder) for folder in (self.checkpointer.save_dir, self.checkpointer.copy_to) if folder]

    def _mark_best(self, name: str, value: float) -> None:
        """Write which checkpoint is the best, then delete the one that was; on rank 0, in the writer's thread."""
        folders = self._folders()
        for folder in folders:
            if not files.has_manifest(folder, name):
                continue
            try:
                text = json.dumps({"name": name, "metric": self.save_best, "value": value})
                files.write_text(folder / BEST_NAME, text + "\n")
            except OSError as error:
                logger.warning("cannot write %s: %s", folder / BEST_NAME, error.strerror)
        logger.info("best checkpoint so far: %s, %s=%.4g", name, self.save_best, value)
        self._delete_old(name, folders)

    def _delete_old(self, newest: str, folders: list[Path]) -> None:
        """Delete the oldest beyond `max_to_keep`; checkpoints after `newest` are not this run's and are left alone."""
        if self.max_to_keep is None:
            return
        for folder in folders:
            last = files.iteration_of(newest)
            names = [name for name in files.find_checkpoints(folder) if files.iteration_of(name) <= last]
            if newest not in names:
                continue  # only what is complete here allows to delete here
            best = _read_best(folder)
            spared = {best["name"]} if best is not None else set()
            candidates = [name for name in names if not self._keeps(files.iteration_of(name))]
            try:
                for name in candidates[: -self.max_to_keep]:
                    if name not in spared:
                        files.remove_checkpoint(folder, name)
                files.remove_incomplete(folder, before_iteration=last)
            except OSError as error:
                logger.warning("cannot delete an old checkpoint in %s: %s", folder, error.strerror)

    def _keeps(self, iteration: int) -> bool:
        return self.keep_every is not None and (iteration + 1) % self.keep_every == 0


def _read_best(folder: Path) -> dict[str, Any] | None:
    """Read which checkpoint is the best, None where that is not known or it is not there."""
    try:
        best = json.loads((folder / BEST_NAME).read_text(encoding="utf-8"))
        known = {"name": str(best["name"]), "metric": str(best["metric"]), "value": float(best["value"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return known if files.has_manifest(folder, known["name"]) else None
