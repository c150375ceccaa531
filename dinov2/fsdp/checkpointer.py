"""Saving and resuming a sharded run: one file per rank, complete only with its manifest.

All methods are called by all ranks together; they choose, succeed or fail together. Files: `checkpoint_format`.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from dinov2 import checkpoint_format as files
from dinov2.distributed import (
    all_gather_objects,
    gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
    on_every_rank,
    on_main_first,
)
from dinov2.errors import CheckpointError
from dinov2.fsdp.state import load_model_state, load_optimizer_state, model_layout, model_state, optimizer_state

logger = logging.getLogger(__name__)


class FSDPCheckpointer(Checkpointer):
    """Writes and reads rank-sharded checkpoints of a model, its optimiser and other objects with a `state_dict`."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        sharding_strategy: str = "NO_SHARD",
        config_text: str = "",
        config_digest: str = "",
        save_to_disk: bool = True,
        **checkpointables: Any,
    ) -> None:
        """Only remembers its arguments; reads and writes nothing.

        Args:
            model: sharded or not; its parameters and persistent buffers are saved.
            save_dir: folder of the run; made by the first save. Empty: nothing is saved or found.
            sharding_strategy: under which `model` was sharded; a checkpoint is read back under the same one.
            config_text: resolved config, stored for the reader.
            config_digest: of the resolved config; another one at resume is logged.
            save_to_disk: False turns `save` off.
            checkpointables: objects with `state_dict()` and `load_state_dict()`, named; optimisers of `model`'s
                parameters are saved by parameter name.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logger
        self.sharding_strategy = sharding_strategy
        self.config_text = config_text
        self.config_digest = config_digest

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint; when this returns it is complete and on the disk.

        Args:
            name: e.g. `model_0003749`; a checkpoint of this name is replaced.
            kwargs: `iteration`, and further plain values or tensors that `load` returns.

        Raises:
            CheckpointError: a rank could not write; all other checkpoints are intact and nothing is left of this one.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "iteration" not in kwargs:
            raise ValueError("save needs iteration=..., the iteration after which the state is saved")
        folder, rank = Path(self.save_dir), get_rank()
        self._together(lambda: folder.mkdir(parents=True, exist_ok=True), name=name)
        data = files.to_plain(self._collect(kwargs))
        record = self._together(lambda: files.write_rank_file(folder, name=name, rank=rank, data=data), name=name)
        self._together(lambda: is_main_process() and files.remove_manifest(folder, name), name=name)
        self._together(lambda: files.publish_rank_file(folder, name=name, rank=rank), name=name)
        records = gather_objects((files.rank_file_name(name, rank), record))
        self._together(lambda: self._write_manifest(name, kwargs["iteration"], records), name=name)
        logger.info("saved %s", folder / name)
        self.tag_last_checkpoint(files.rank_file_name(name, rank))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Read a checkpoint that was saved by as many processes under the same sharding strategy.

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
        """Continue from the newest sound checkpoint of `save_dir`, or else load only the model from `path`.

        Args:
            path: as for `load`; used when there is nothing to resume.
            resume: False ignores what is in `save_dir`.

        Returns:
            As `load`.

        Raises:
            CheckpointError: there are checkpoints but all are damaged, or the newest does not fit what is running.
        """
        names = self._complete_checkpoints() if resume else []
        if resume and self.save_dir:
            on_main_first(files.remove_leftovers, Path(self.save_dir))
        reasons: list[str] = []
        for name in reversed(names):
            try:
                return self._load(Path(self.save_dir), name=name, keys=self.checkpointables)
            except files.DamagedCheckpointError as error:
                reasons.append(str(error))
                if is_main_process():
                    logger.warning("%s is damaged, trying the one before it: %s", name, error)
        if reasons:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints in {self.save_dir} is sound ({reasons[0]}); "
                "pass --no-resume to start again"
            )
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Say whether `save_dir` holds a complete checkpoint."""
        return bool(self._complete_checkpoints())

    def get_checkpoint_file(self) -> str:
        """Return this rank's file of the newest complete checkpoint in `save_dir`, "" if there is none."""
        return (self.get_all_checkpoint_files() or [""])[-1]

    def get_all_checkpoint_files(self) -> list[str]:
        """Return this rank's files of all complete checkpoints in `save_dir`, oldest first."""
        names = self._complete_checkpoints()
        return [os.path.join(self.save_dir, files.rank_file_name(name, get_rank())) for name in names]

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the parents' tag file of this rank; it is for people and other tools, the manifests decide."""
        tag = Path(self.save_dir) / f"last_checkpoint.rank_{get_rank()}"
        try:
            files.write_text(tag, last_filename_basename)
        except OSError as error:
            logger.warning("cannot write %s: %s", tag, error.strerror)

    def _complete_checkpoints(self) -> list[str]:
        return on_main_first(files.find_checkpoints, Path(self.save_dir)) if self.save_dir else []

    def _collect(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        states = {
            key: optimizer_state(self.model, item) if isinstance(item, torch.optim.Optimizer) else item.state_dict()
            for key, item in self.checkpointables.items()
        }
        return {
            "format_version": files.FORMAT_VERSION,
            "rank": get_rank(),
            "world_size": get_world_size(),
            "sharding_strategy": self.sharding_strategy,
            "versions": {"torch": str(torch.__version__)},
            "config": self.config_text,
            "model": model_state(self.model),
            "layout": model_layout(self.model),
            "checkpointables": states,
            "extra": dict(extra),
        }

    def _write_manifest(self, name: str, iteration: int, records: list[tuple[str, files.FileRecord]] | None) -> None:
        if records is None:
            return
        manifest = files.Manifest(
            name=name,
            iteration=iteration,
            world_size=get_world_size(),
            sharding_strategy=self.sharding_strategy,
            config_digest=self.config_digest,
            files=dict(records),
        )
        files.write_manifest(Path(self.save_dir), manifest)

    def _together(self, step: Callable[[], Any], *, name: str) -> Any:
        """Run one step of a save on every rank; if it fails on any, undo the save and raise on all."""
        result, problem = None, None
        try:
            result = step()
        except OSError as error:
            problem = error.strerror or str(error)
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(all_gather_objects(problem)) if text]
        if problems:
            files.discard_rank_file(Path(self.save_dir), name=name, rank=get_rank())
            raise CheckpointError(
                f"{name} could not be written to {self.save_dir} ({problems[0]}); earlier checkpoints are intact"
            )
        return result

    def _load(self, folder: Path, *, name: str, keys: Mapping[str, Any] | list[str]) -> dict[str, Any]:
        manifest = on_main_first(files.open_checkpoint, folder, name)
        self._check_running(manifest)
        data = on_every_rank(lambda: files.read_rank_file(folder, manifest, get_rank()))
        on_every_rank(lambda: self._restore(data, name=name, keys=keys))
        if is_main_process():
            logger.info("loaded %s, saved after iteration %d", folder / name, manifest.iteration)
            if self.config_digest and manifest.config_digest != self.config_digest:
                changes = _describe_changes(data["config"], self.config_text)
                logger.info("the config is not the one that %s was saved with%s", name, changes)
        return data["extra"]

    def _restore(self, data: Mapping[str, Any], *, name: str, keys: Mapping[str, Any] | list[str]) -> None:
        load_model_state(self.model, data["model"], layout=data["layout"])
        for key in keys:
            if key not in data["checkpointables"]:
                raise CheckpointError(f"{name} holds no {key}; it was saved by a run without one")
            item, state = self.checkpointables[key], data["checkpointables"][key]
            if isinstance(item, torch.optim.Optimizer):
                load_optimizer_state(self.model, item, state)
                continue
            try:
                item.load_state_dict(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{name}: the state of {key} does not fit: {error}") from error

    def _check_running(self, manifest: files.Manifest) -> None:
        same_strategy = manifest.sharding_strategy == self.sharding_strategy or manifest.world_size == 1
        if manifest.world_size == get_world_size() and same_strategy:
            return
        raise CheckpointError(
            f"{manifest.name} was saved by {_processes(manifest.world_size)} with {manifest.sharding_strategy}, "
            f"this run has {_processes(get_world_size())} with {self.sharding_strategy}; "
            "continue with the same number of processes and the same compute_precision.sharding_strategy"
        )


def _describe_changes(saved: str, running: str) -> str:
    """List the keys in which two configs, JSON texts, differ, as the end of a sentence; "" where they are no JSON."""
    try:
        before, now = (_flatten(json.loads(text)) for text in (saved, running))
    except ValueError:
        return ""
    changes = [
        f"{key} {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return f": {', '.join(changes)}" if changes else ""


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{path}.{key}" if path else key)
    return flat


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"
