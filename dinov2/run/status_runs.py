"""Find the runs below a folder and read how each is doing: from what it writes, without disturbing it."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.errors import ConfigError
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.logging.metrics_file import read_last_metrics
from dinov2.train.evaluation import KNN_NAME, START
from dinov2.train.run_folder import PLAN_NAME
from dinov2.train.run_lock import LockOwner, look_at_lock
from dinov2.train.run_state import FAILED, FINISHED, RUNNING, STATE_NAME, STOPPED, RunRecord, read_run_state

DEAD = "dead"  # says that it is running, and is not: it was killed
STATES = (RUNNING, FINISHED, STOPPED, FAILED, DEAD)
_MADE_BY_EVERY_RUN = (STATE_NAME, METRICS_NAME, PLAN_NAME)
_NO_RUNS_IN = ("eval", "logs", "cache", "jobs", "tensorboard", "wandb")  # folders of a run itself
_NUM_STEPS = 50  # the last ones, over which loss and speed are means
_SILENT_S = 600  # of a run whose lock cannot be seen from here
_KNN = "knn_top1_pct"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How one run is doing; None is what is not known."""

    folder: str
    state: str  # one of STATES
    step: int | None  # steps done
    total_steps: int | None
    loss: float | None  # mean over the last 50 steps
    knn_start_pct: float | None  # k-NN accuracy before the first step
    knn_pct: float | None  # of the newest evaluation
    images_per_s: float | None  # mean over the last 50 steps
    eta_s: float | None  # of a running one: to its last step, evaluations left out
    silent_s: float | None  # since it last wrote something
    job: str | None  # of the scheduler
    attempts: int | None  # starts so far
    problem: str | None  # how it failed, or was lost


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Find the folders of runs in and below these, sorted; links are followed only where they are given.

    Raises:
        ConfigError: one of these is no folder, or cannot be read.
    """
    found = {run: None for folder in folders for run in _runs_below(folder)}
    return sorted(found)


def read_status(folder: Path) -> RunStatus:
    """Read how the run in a folder is doing; files that are missing or damaged are left out."""
    record = read_run_state(folder)
    rows = _last_rows(folder / METRICS_NAME)
    step = _steps_done(rows, record)
    total_steps = _total_steps(folder, record)
    silent_s = _silent_s(folder)
    lock = look_at_lock(folder)
    state = _state(record, lock, silent_s=silent_s, is_done=None not in (step, total_steps) and step >= total_steps)
    images_per_s = _mean(rows, "images_per_s")
    eta_s = None
    if state == RUNNING and rows and images_per_s and total_steps is not None:
        eta_s = (total_steps - step) * _number(rows[-1].get("current_batch_size"), 0.0) / images_per_s or None
    return RunStatus(
        folder=str(folder),
        state=state,
        step=step,
        total_steps=total_steps,
        loss=_mean(rows, "total_loss"),
        knn_start_pct=_knn_pct(folder / "eval" / START),
        knn_pct=_newest_knn_pct(folder / "eval"),
        images_per_s=images_per_s,
        eta_s=eta_s,
        silent_s=silent_s,
        job=None if record is None else record.job,
        attempts=None if record is None else record.attempts,
        problem=_problem(state, record, lock),
    )


def _runs_below(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give the output directory of a run, or a folder above several")
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(name in files for name in _MADE_BY_EVERY_RUN):
            folders[:] = [name for name in folders if name not in _NO_RUNS_IN]
            yield Path(place)


def _state(record: RunRecord | None, lock: LockOwner | None, *, silent_s: float | None, is_done: bool) -> str:
    if lock is not None and lock.holds:
        return RUNNING
    if record is None and lock is None:  # made by a version that told no state, or by another program
        return FINISHED if is_done else STOPPED
    if record is not None and record.state != RUNNING:
        return record.state
    # It has not said that it ended. Where the lock was taken on this machine, it would be seen if it were held.
    was_here = lock is not None and lock.host == socket.gethostname()
    return DEAD if was_here or silent_s is None or silent_s > _SILENT_S else RUNNING


def _problem(state: str, record: RunRecord | None, lock: LockOwner | None) -> str | None:
    owner = lock or record
    if state == DEAD and owner is not None:
        return (
            f"since process {owner.pid} on {owner.host}, started {owner.started}, ended without a word; the same "
            f"command goes on from the newest checkpoint"
        )
    if state != FAILED or record is None or not record.failures:
        return None
    failure = record.failures[-1]
    where = "before training began" if failure.iteration is None else f"at iteration {failure.iteration}"
    return f"{where}, attempt {record.attempts}: {failure.reason}"


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_last_metrics(path, _NUM_STEPS)
    except OSError:
        return []


def _steps_done(rows: Sequence[Mapping[str, Any]], record: RunRecord | None) -> int | None:
    """Return the larger of what the metrics say, written in bunches, and the state, written every few seconds."""
    known = [row["iteration"] for row in rows[-1:]]
    if record is not None and record.iteration is not None:
        known.append(record.iteration)
    return max(known) + 1 if known else None


def _total_steps(folder: Path, record: RunRecord | None) -> int | None:
    if record is not None and record.total_steps is not None:
        return record.total_steps
    total = _read_json(folder / PLAN_NAME).get("last_step")
    return total if isinstance(total, int) else None


def _silent_s(folder: Path) -> float | None:
    written = []
    for name in (*_MADE_BY_EVERY_RUN, os.path.join("logs", "log.txt")):
        with contextlib.suppress(OSError):
            written.append((folder / name).stat().st_mtime)
    return max(time.time() - max(written), 0.0) if written else None


def _knn_pct(folder: Path) -> float | None:
    return _number(_read_json(folder / KNN_NAME).get(_KNN))


def _newest_knn_pct(folder: Path) -> float | None:
    """Return the accuracy of the evaluation after the latest iteration that has one."""
    numbers = [path.parent.name.removeprefix("training_") for path in folder.glob(f"training_*/{KNN_NAME}")]
    for number in sorted((int(text) for text in numbers if text.isdecimal()), reverse=True):
        if (accuracy := _knn_pct(folder / f"training_{number}")) is not None:
            return accuracy
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    numbers = [number for row in rows if (number := _number(row.get(name))) is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _number(value: Any, otherwise: float | None = None) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise
