"""When to save a checkpoint, and which old ones to delete afterwards."""

import logging
from pathlib import Path
from typing import Any

from fvcore.common import checkpoint as fvcore_checkpoint

from dinov2 import checkpoint_format as files
from dinov2.distributed import is_main_process
from dinov2.fsdp.checkpointer import FSDPCheckpointer

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):
    """Saves every `period` iterations and after the last one, and keeps the newest few.

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
    ) -> None:
        """Only remembers its arguments.

        Args:
            checkpointer: does the saving.
            period: iterations between saves, >= 1.
            max_iter: iterations of the whole run; the last one is saved whatever the period.
            max_to_keep: complete checkpoints kept, >= 1, not counting those that `keep_every` keeps; None keeps all.
            keep_every: checkpoints after every so many iterations are never deleted; None spares none.
        """
        super().__init__(checkpointer, period, max_iter=max_iter, max_to_keep=max_to_keep)
        self.keep_every = keep_every
        self.last_saved: int | None = None  # iteration

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Save if it is time to; called by all ranks after every iteration, counted from 0."""
        if self.is_due(iteration):
            self.save_now(iteration, **kwargs)

    def is_due(self, iteration: int) -> bool:
        """Say whether `step` saves after this iteration."""
        is_last = self.max_iter is not None and iteration >= self.max_iter - 1
        return is_last or (iteration + 1) % self.period == 0

    def save_now(self, iteration: int, **kwargs: Any) -> None:
        """Save, unless this iteration was just saved, and delete what is no longer wanted.

        Raises:
            CheckpointError: a rank could not write; nothing has been deleted.
        """
        if iteration == self.last_saved:
            return
        self.checkpointer.save(files.checkpoint_name(iteration), iteration=iteration, **kwargs)
        self.last_saved = iteration
        if self.checkpointer.save_dir and self.checkpointer.save_to_disk and is_main_process():
            self._delete_old(Path(self.checkpointer.save_dir), newest=iteration)

    def _delete_old(self, folder: Path, *, newest: int) -> None:
        """Delete the oldest beyond `max_to_keep`; checkpoints after `newest` are not this run's and are left alone."""
        if self.max_to_keep is None:
            return
        names = [name for name in files.find_checkpoints(folder) if files.iteration_of(name) <= newest]
        spared = [name for name in names if not self._keeps(files.iteration_of(name))]
        try:
            for name in spared[: -self.max_to_keep]:
                files.remove_checkpoint(folder, name)
            files.remove_incomplete(folder, before_iteration=newest)
        except OSError as error:
            logger.warning("cannot delete an old checkpoint in %s: %s", folder, error.strerror)

    def _keeps(self, iteration: int) -> bool:
        return self.keep_every is not None and (iteration + 1) % self.keep_every == 0
