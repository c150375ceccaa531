"""Saving and resuming a sharded run: one file per rank, complete only with its manifest.

All methods are called by all ranks together; they choose, succeed or fail together. Files: `checkpoint_format`.
"""

import datetime
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from dinov2 import checkpoint_format as files
from dinov2.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
    on_every_rank,
    on_main_first,
)
from dinov2.errors import CheckpointError
from dinov2.fsdp.part import PartToSave
from dinov2.fsdp.rng import RngState
from dinov2.fsdp.snapshot import HostBuffers
from dinov2.fsdp.state import load_model_state, load_optimizer_state
from dinov2.fsdp.writer import Writer, copy_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)


class FSDPCheckpointer(Checkpointer):
    """Writes and reads rank-sharded checkpoints of a model, its optimiser and other objects with a `state_dict`.

    A checkpoint can be read by any number of processes and under any sharding strategy. `copy_to`, if set, is a second
    folder: every complete checkpoint is copied there, and looked for there.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        sharding_strategy: str = "NO_SHARD",
        config_text: str = "",
        config_digest: str = "",
        global_batch_size: int | None = None,
        background: bool = False,
        save_to_disk: bool = True,
        optional_parts: tuple[str, ...] = (),
        **checkpointables: Any,
    ) -> None:
        """Only remembers its arguments; reads and writes nothing.

        Args:
            model: sharded or not; its parameters and persistent buffers are saved.
            save_dir: folder of the run; made by the first save if it is not there yet, not again if it vanishes later.
                Empty: nothing is saved or found.
            sharding_strategy: under which `model` was sharded, stored for the reader.
            config_text: resolved config, JSON, stored for the reader.
            config_digest: of the resolved config, stored in the manifest.
            global_batch_size: images of an optimiser step, stored in the manifest.
            background: `save` copies the state to host memory and returns; a thread writes it. `raise_failure` tells
                what went wrong there, `close` ends the thread. False: `save` returns when all is written.
            save_to_disk: False turns `save` off.
            optional_parts: beginnings of names in `model` that a checkpoint may lack, so that they stay as they are, or
                have beyond those of `model`.
            checkpointables: objects with `state_dict()` and `load_state_dict()`, named; optimisers of `model`'s
                parameters are saved by parameter name; one with `starts_empty = True` need not be in what is loaded.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logger
        self.sharding_strategy = sharding_strategy
        self.config_text = config_text
        self.config_digest = config_digest
        self.global_batch_size = global_batch_size
        self.background = background
        self.optional_parts = optional_parts
        self.copy_to: str | None = None
        self.on_complete: Callable[[str, list[Path]], None] | None = None  # (name, folders), in rank 0's writer thread
        self.loaded: files.StoredCheckpoint | None = None  # what `load` or `resume_or_load` has read last
        self._part = PartToSave()
        self._buffers = HostBuffers()
        self._writer: Writer | None = None
        self._missing_folders = {save_dir} if save_dir and not os.path.isdir(save_dir) else set()

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint; in the background, or so that it is complete and on the disk when this returns.

        Waits for an earlier one that is still being written.

        Args:
            name: e.g. `model_0003749`; a checkpoint of this name is replaced.
            kwargs: `iteration`, and further plain values or tensors that `load` returns; of these, `metrics`, a dict of
                numbers, also stands in the manifest.

        Raises:
            CheckpointError: a rank could not write (in the background: an earlier checkpoint); all other checkpoints
                are intact and nothing is left of this one.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "iteration" not in kwargs:
            raise ValueError("save needs iteration=..., the iteration after which the state is saved")
        if self._writer is None:
            self._writer = Writer(background=self.background)
        elif self._writer.is_busy:
            if is_main_process():
                logger.warning("%s waits for the checkpoint before it: save less often, or to a faster disk", name)
            self.wait()
        self.raise_failure()
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = self._snapshot(kwargs, time=time)
        batch = self.global_batch_size  # of this step: it may be another one when the manifest is written

        def make_manifest(records: dict[str, files.FileRecord]) -> files.Manifest:
            return self._manifest(name, data, records, global_batch_size=batch)

        self._writer.submit(lambda: self._write(name, data, make_manifest))
        if not self.background:
            self.raise_failure()

    def also_copy_to(self, folder: str | None) -> None:
        """Copy every complete checkpoint into a second folder, too, and look for checkpoints there; None: do not.

        The folder is made by the first copy if it is not there yet, not again if it vanishes later.
        """
        self.copy_to = folder
        if folder and not os.path.isdir(folder):
            self._missing_folders.add(folder)

    def wait(self) -> None:
        """Return when nothing is being written any more; whether that went well is told by `raise_failure`."""
        if self._writer is not None:
            self._writer.wait()

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a checkpoint that could not be written; asks no other rank."""
        return self._writer is not None and self._writer.failure is not None

    def raise_failure(self) -> None:
        """Raise on all ranks if a checkpoint could not be written; all ranks together.

        Raises:
            CheckpointError: with the sentence of the first rank that failed.
        """
        failures = all_gather_objects(self._writer.failure if self._writer is not None else None)
        for failure in failures:
            if failure is not None:
                self._writer.failure = None
                raise CheckpointError(failure)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on rank 0 after what is being written now; all ranks together."""
        self._submit(job if is_main_process() else lambda: None)

    def close(self) -> None:
        """Wait until all is written, and end the thread; all ranks together, at the end of the program."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def clean_up(self) -> None:
        """Remove what a killed run has left unfinished; only where no other run can be writing there.

        For the checkpoint of `save_dir` that was loaded, do what that run may not have come to after its manifest:
        tags, the copy, and deleting older ones.
        """
        on_main_first(self._clean_up)
        stored = self.loaded
        if stored is None or not self.save_dir or stored.folder != Path(self.save_dir):
            return
        num_files = stored.manifest.world_size
        is_copied = not self.copy_to or on_main_first(files.has_manifest, Path(self.copy_to), stored.name)
        self._submit(lambda: self._follow_up(stored.name, num_files=num_files, is_copied=is_copied))
        self.wait()

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Read a checkpoint, whatever the number of processes and the sharding strategy that saved it.

        Args:
            path: any rank's file, the pattern with `{rank}`, the manifest or the name without suffix; "" loads nothing.
            checkpointables: names of the objects to restore besides the model; None means all.

        Returns:
            `iteration` and what else was given to `save`; empty for an empty path.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or does not fit what is running.
        """
        if not path:
            return {}
        folder, name = files.split_path(path)
        return self._load(folder, name=name, keys=self.checkpointables if checkpointables is None else checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue from the newest sound checkpoint of `save_dir` or `copy_to`, or else load the model from `path`.

        Args:
            path: as for `load`; used when there is nothing to resume.
            resume: False ignores what is in `save_dir`.

        Returns:
            As `load`.

        Raises:
            CheckpointError: there are checkpoints but all are damaged, or the newest does not fit what is running.
        """
        found = self._complete_checkpoints() if resume else []
        reasons: list[str] = []
        for folder, name in reversed(found):
            try:
                return self._load(folder, name=name, keys=self.checkpointables)
            except files.DamagedCheckpointError as error:
                reasons.append(str(error))
                if is_main_process():
                    where = name if str(folder) == self.save_dir else folder / name
                    logger.warning("%s is damaged, trying the one before it: %s", where, error)
        if reasons:
            where = " and ".join(sorted({str(folder) for folder, _ in found}, key=lambda item: item != self.save_dir))
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {where} is sound ({reasons[0]}); "
                "pass --no-resume to start again"
            )
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Say whether `save_dir` or `copy_to` holds a complete checkpoint."""
        return bool(self._complete_checkpoints())

    def newest_manifest(self) -> files.Manifest | None:
        """Return the manifest of the checkpoint that `resume_or_load` would try first and that has all its files."""
        for folder, name in reversed(self._complete_checkpoints()):
            try:
                return on_main_first(files.open_checkpoint, folder, name)
            except files.DamagedCheckpointError:
                continue
        return None

    def get_checkpoint_file(self) -> str:
        """Return this rank's file of the newest complete checkpoint, "" if there is none."""
        return (self.get_all_checkpoint_files() or [""])[-1]

    def get_all_checkpoint_files(self) -> list[str]:
        """Return this rank's files of all complete checkpoints, oldest first."""
        return [str(folder / files.rank_file_name(name, get_rank())) for folder, name in self._complete_checkpoints()]

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the parents' tag file of this rank; it is for people and other tools, the manifests decide."""
        tag = Path(self.save_dir) / f"last_checkpoint.rank_{get_rank()}"
        try:
            files.write_text(tag, last_filename_basename)
        except OSError as error:
            logger.warning("cannot write %s: %s", tag, error.strerror)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._writer is None:
            self._writer = Writer(background=self.background)
        self._writer.submit(job)

    def _folders(self) -> list[Path]:
        return [Path(folder) for folder in (self.save_dir, self.copy_to) if folder]

    def _complete_checkpoints(self) -> list[tuple[Path, str]]:
        """List folder and name of complete checkpoints, oldest first; of the same iteration, `save_dir`'s is last."""
        self.wait()

        def find() -> list[tuple[Path, str]]:
            found = [(folder, name) for folder in reversed(self._folders()) for name in files.find_checkpoints(folder)]
            return sorted(found, key=lambda item: files.iteration_of(item[1]))

        return on_main_first(find) if self.save_dir else []

    def _clean_up(self) -> None:
        for folder in self._folders():
            if not folder.is_dir():
                continue
            try:
                files.remove_leftovers(folder, num_ranks=get_world_size())
                files.remove_incomplete(folder)
            except OSError as error:
                logger.warning("cannot remove unfinished checkpoints in %s: %s", folder, error.strerror)

    def _snapshot(self, extra: Mapping[str, Any], *, time: str) -> dict[str, Any]:
        """Copy what this rank's file holds to host memory."""
        optimizers = {
            key: item for key, item in self.checkpointables.items() if isinstance(item, torch.optim.Optimizer)
        }
        part = self._part.collect(self.model, optimizers)
        others = {key: item.state_dict() for key, item in self.checkpointables.items() if key not in optimizers}
        data = {
            "format_version": files.FORMAT_VERSION,
            "rank": get_rank(),
            "world_size": get_world_size(),
            "sharding_strategy": self.sharding_strategy,
            "versions": {"torch": str(torch.__version__)},
            "time": time,
            "config": self.config_text,
            "model": {},
            "checkpointables": part.optimizers | others,
            "extra": dict(extra),
        }
        return self._buffers.snapshot(data, part.tensors) | {"layout": part.layout}

    def _manifest(
        self,
        name: str,
        data: Mapping[str, Any],
        records: dict[str, files.FileRecord],
        *,
        global_batch_size: int | None,
    ) -> files.Manifest:
        return files.Manifest(
            name=name,
            iteration=data["extra"]["iteration"],
            world_size=data["world_size"],
            sharding_strategy=data["sharding_strategy"],
            config_digest=self.config_digest,
            files=records,
            time=data["time"],
            versions=data["versions"],
            metrics=data["extra"].get("metrics") or {},
            global_batch_size=global_batch_size,
        )

    def _write(
        self,
        name: str,
        data: dict[str, Any],
        make_manifest: Callable[[dict[str, files.FileRecord]], files.Manifest],
    ) -> None:
        """Do what the writer's thread does for a save."""
        folder, channel = Path(self.save_dir), self._writer.channel
        self._make_folder(folder)
        write_checkpoint(channel, folder, name=name, data=data, make_manifest=make_manifest)
        logger.info("saved %s", folder / name)
        self._follow_up(name, num_files=get_world_size())

    def _follow_up(self, name: str, *, num_files: int, is_copied: bool = False) -> None:
        """Do what comes after a checkpoint is complete; in the writer's thread of every rank."""
        folder = Path(self.save_dir)
        if get_rank() < num_files:
            self.tag_last_checkpoint(files.rank_file_name(name, get_rank()))
        if self.copy_to and not is_copied:
            self._make_folder(Path(self.copy_to))
            try:
                copy_checkpoint(self._writer.channel, folder, Path(self.copy_to), name=name, num_files=num_files)
            except CheckpointError as error:
                if is_main_process():
                    logger.warning("%s; the run goes on with those in %s", error, folder)
        if self.on_complete is not None and is_main_process():
            self.on_complete(name, self._folders())

    def _make_folder(self, folder: Path) -> None:
        """Make a folder that was missing at the start; one that vanished since is for the user to hear of."""
        if str(folder) not in self._missing_folders:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._missing_folders.discard(str(folder))
        except OSError:
            pass  # writing into it fails next, with the reason and on all ranks together

    def _load(self, folder: Path, *, name: str, keys: Iterable[str]) -> dict[str, Any]:
        self.wait()
        manifest = on_main_first(files.open_checkpoint, folder, name)
        mine = range(get_rank(), manifest.world_size, get_world_size())
        indexes = on_every_rank(lambda: [files.read_rank_index(folder, manifest, rank) for rank in mine])
        indexes = [index for share in all_gather_objects(indexes) for index in share]
        stored = on_every_rank(lambda: files.StoredCheckpoint(folder, manifest, indexes))
        on_every_rank(lambda: self._restore(stored, keys=keys))
        extra = on_every_rank(lambda: stored.extra)
        if is_main_process():
            logger.info("loaded %s, saved after iteration %d", folder / name, manifest.iteration)
            if manifest.world_size != get_world_size():
                logger.info("it was saved by %s, this run has %d", _processes(manifest.world_size), get_world_size())
        stored.release()
        self.loaded = stored
        return extra

    def _restore(self, stored: files.StoredCheckpoint, *, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in stored.checkpointable_names and not getattr(self.checkpointables[key], "starts_empty", False):
                raise CheckpointError(f"{stored.name} holds no {key}; it was saved by a run without one")
        self._part.forget()  # loading replaces the optimiser's tensors; nothing may hold the old ones
        load_model_state(self.model, stored.model, optional=self.optional_parts)
        rank, num_saved = get_rank(), stored.manifest.world_size
        others = stored.rank_values(rank if rank < num_saved else 0) if keys else {}
        for key in keys:
            item = self.checkpointables[key]
            if key not in stored.checkpointable_names:
                if is_main_process():
                    logger.info("%s holds no %s, which start empty", stored.name, key)
                continue
            try:
                if isinstance(item, torch.optim.Optimizer):
                    load_optimizer_state(self.model, item, stored.optimizer_state(key))
                elif isinstance(item, RngState) and rank >= num_saved:
                    item.load_state_of_another(others[key], rank=rank)
                else:
                    item.load_state_dict(others[key])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{stored.name}: the state of {key} does not fit: {error}") from error


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"
