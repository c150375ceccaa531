"""Around the saving of a run: checkpoints that are being written when it ends, and the score that names the best."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dinov2.errors import ConfigError
from dinov2.fsdp import PeriodicCheckpointer


@contextmanager
def finishing(saver: PeriodicCheckpointer) -> Iterator[None]:
    """Let a checkpoint that is being written become complete, however the steps inside end.

    Raises:
        CheckpointError: the steps ended well but the last checkpoint could not be written.
    """
    try:
        yield
        saver.finish()
    finally:
        saver.checkpointer.close()


def require_known_score(name: str | None, scores: Mapping[str, float]) -> None:
    """Raise ConfigError if evaluations do not give the score that `checkpointing.save_best` names."""
    if name is None or name in scores:
        return
    known = f"they give {', '.join(sorted(scores))}" if scores else "they give none; set evaluation.knn.* or null"
    raise ConfigError(f"checkpointing.save_best={name} is no score of this run's evaluations; {known}")
