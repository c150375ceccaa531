"""Writing a checkpoint by all ranks together, in a thread beside training.

The threads agree after every step, over a channel of their own; when one fails, all undo what they did. In this order a
kill at any instant leaves either a complete checkpoint or files that the next start removes:

    every rank writes its temporary file; rank 0 removes what stands under this name; every rank renames its file;
    rank 0 writes the manifest
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dinov2 import checkpoint_format as files
from dinov2.distributed import SideChannel, get_rank, get_world_size, is_main_process
from dinov2.errors import CheckpointError

logger = logging.getLogger(__name__)


class Writer:
    """Runs jobs one after the other in a thread of its own, and remembers the first that failed.

    All ranks submit the same jobs in the same order.
    """

    def __init__(self, *, background: bool) -> None:
        """Open the channel; all ranks together, from their main threads.

        Args:
            background: False runs each job before `submit` returns.
        """
        self.channel = SideChannel()
        self.failure: str | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._last: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is going on."""
        return self._last is not None and not self._last.done()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after all earlier ones."""
        if self._pool is None:
            self._run(job)
        else:
            self._last = self._pool.submit(self._run, job)

    def wait(self) -> None:
        """Return when all jobs have ended, well or not."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait, then end the thread and leave the channel; all ranks together."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
        self.channel.close()

    def _run(self, job: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            job()
        except CheckpointError as error:
            self.failure = str(error)
        except Exception as error:  # also that another process has ended: the main thread must hear of it
            logger.debug("writing a checkpoint failed", exc_info=True)
            reason = (str(error).splitlines() or [""])[0]
            self.failure = f"a checkpoint could not be written ({type(error).__name__}: {reason})"


def write_checkpoint(
    channel: SideChannel,
    folder: Path,
    *,
    name: str,
    data: dict[str, Any],
    make_manifest: Callable[[dict[str, files.FileRecord]], files.Manifest],
) -> None:
    """Write a checkpoint; when this returns it is complete and on the disk, on all ranks.

    Args:
        channel: to the other ranks' writers.
        folder: exists.
        name: a checkpoint of this name is replaced.
        data: what this rank's file holds.
        make_manifest: from the records of all files.

    Raises:
        CheckpointError: a rank could not write; all other checkpoints are intact and nothing is left of this one.
    """
    rank = get_rank()

    def write() -> tuple[str, files.FileRecord]:
        return files.rank_file_name(name, rank), files.write_rank_file(folder, name=name, rank=rank, data=data)

    def complete(records: list[tuple[str, files.FileRecord]]) -> None:
        if is_main_process():
            files.write_manifest(folder, make_manifest(dict(records)))

    _put_in_place(channel, folder, name=name, ranks=[rank], write=write, complete=complete)


def copy_checkpoint(channel: SideChannel, folder: Path, target: Path, *, name: str, num_files: int) -> None:
    """Copy a complete checkpoint of any number of rank files into another folder, as safely as it was written.

    Raises:
        CheckpointError: a rank could not write; nothing is left of the copy.
    """
    ranks = range(get_rank(), num_files, get_world_size())

    def copy() -> None:
        for rank in ranks:
            files.copy_rank_file(folder, target, name=name, rank=rank)

    def complete(_: list[Any]) -> None:
        if is_main_process():
            manifest = files.manifest_name(name)
            files.write_text(target / manifest, (folder / manifest).read_text(encoding="utf-8"))

    _put_in_place(channel, target, name=name, ranks=ranks, write=copy, complete=complete)


def _put_in_place(
    channel: SideChannel,
    folder: Path,
    *,
    name: str,
    ranks: Sequence[int],
    write: Callable[[], Any],
    complete: Callable[[list[Any]], None],
) -> None:
    """Make a checkpoint of temporary files, of which `ranks` are this process's: see the module."""
    is_replaced = False

    def publish() -> None:
        for rank in ranks:
            files.publish_rank_file(folder, name=name, rank=rank)

    try:
        written = _together(channel, write)
        # Ranks that this run does not have may have left files of this name, complete or not.
        _together(channel, lambda: files.remove_checkpoint(folder, name) if is_main_process() else None)
        is_replaced = True
        _together(channel, publish)
        _together(channel, lambda: complete(written))
    except _StepFailedError as error:
        if is_replaced and is_main_process():
            with contextlib.suppress(OSError):
                files.remove_manifest(folder, name)
        for rank in ranks:
            files.discard_rank_file(folder, name=name, rank=rank, published=is_replaced)
        raise CheckpointError(
            f"{name} could not be written to {folder} ({error}); earlier checkpoints are intact"
        ) from None


class _StepFailedError(Exception):
    """A step failed on a rank, which the message names; raised on all ranks."""


def _together(channel: SideChannel, step: Callable[[], Any]) -> list[Any]:
    """Run one step on every rank; return all results, or raise on all ranks if it failed on any."""
    result, problem = None, None
    try:
        result = step()
    except OSError as error:
        problem = error.strerror or str(error)
    except Exception as error:  # the others wait, whatever went wrong
        problem = f"{type(error).__name__}: {error}"
    outcomes = channel.all_gather_objects((result, problem))
    for rank, (_, text) in enumerate(outcomes):
        if text is not None:
            raise _StepFailedError(f"rank {rank}: {text}")
    return [found for found, _ in outcomes]
