"""`run_state.json`: how a run is doing, for `run/status.py`, for the launcher, and for the next start of the same run.

Rank 0 writes it, whole or not at all, at the start, every few seconds while training, and at the end:

    state        running | stopped | finished | failed
                   running   it is being prepared or trains, unless nobody holds the folder's lock: then it was killed
                   stopped   asked to (a signal, a time limit); saved; the same command goes on
                   finished  all steps are done, up to train.max_steps where that is set
                   failed    ended by an error, the last one of `failures`
    iteration    last iteration that was done, counted from 0; null before the first
    total_steps  iterations of the whole run, at most train.max_steps; null before that is known
    started      of this attempt, UTC, such as 2026-11-21T15:04:05Z
    updated      when this was written, UTC
    attempts     starts in this folder so far, this one included
    began_at     iteration that this attempt began with, after loading a checkpoint; null while it is being prepared
    failures     failures in a row, newest last, at most ten of them, each with iteration (that was not finished; null
                 while it was being prepared), began_at, reason, time, settings (as below); emptied by a stop on
                 request and by the end of the run
    is_final     failed, and another start would end so, too: a guard rail has ended the run, or it has failed three
                 times at the same step
    settings     digest of the resolved config and the number of processes
    job          number of the job (123, or 123_4 of an array), null outside of a scheduler
    host, pid    of rank 0

Times are written by the clock of rank 0's machine.
"""

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dinov2 import distributed
from dinov2.configs import Config, config_digest
from dinov2.errors import GuardRailError, TrainingError

logger = logging.getLogger("dinov2.train")

STATE_NAME = "run_state.json"
RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"
MAX_FAILURES_AT_A_STEP = 3
KILLED = "ended without a word (killed, out of memory, or its machine was lost)"
_NUM_FAILURES_KEPT = 10
_WRITE_PERIOD_S = 5.0
_MAX_REASON_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one attempt ended that did not end well."""

    iteration: int | None
    began_at: int | None
    reason: str
    time: str
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What stands in the file; the fields are described at the top of this module."""

    state: str
    iteration: int | None = None
    total_steps: int | None = None
    started: str
    updated: str
    attempts: int = 0
    began_at: int | None = None
    failures: tuple[Failure, ...] = ()
    is_final: bool = False
    settings: str = ""
    job: str | None = None
    host: str
    pid: int


def read_run_state(folder: Path) -> RunRecord | None:
    """Read the state of the run in a folder; None where there is none, or it cannot be read."""
    try:
        found = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        failures = tuple(Failure(**failure) for failure in found.pop("failures"))
        known = {item.name for item in fields(RunRecord)}  # a later version may have more
        return RunRecord(failures=failures, **{name: value for name, value in found.items() if name in known})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def failures_at_the_same_step(failures: tuple[Failure, ...]) -> tuple[Failure, ...]:
    """Return the failures in a row, newest last, that the newest one repeats.

    It repeats another one that had the same settings and failed at the same iteration, or began at the same one: then
    no checkpoint was completed in between, and where exactly a killed attempt was is known to a few seconds only.
    Failures before training began do not count: whoever looks for the right settings meets many.
    """
    counted = [failure for failure in failures if failure.iteration is not None]
    start = len(counted)
    while start and _is_same(counted[start - 1], counted[-1]):
        start -= 1
    return tuple(counted[start:])


def _are_enough(failures: tuple[Failure, ...]) -> bool:
    """Say whether the next start would only repeat the last ones."""
    return len(failures_at_the_same_step(failures)) >= MAX_FAILURES_AT_A_STEP


def _is_same(one: Failure, other: Failure) -> bool:
    is_near = one.iteration == other.iteration or one.began_at == other.began_at
    return is_near and one.settings == other.settings


class RunState:
    """Keeps the state file of a run up to date from entering to leaving; called by all ranks, written by rank 0.

    It is entered by who holds the lock of the folder: a state that says `running` is then that of an attempt that ended
    without a word, and is counted among the failures.

    Args:
        cfg: config of the run; the file is in its output directory.
        retry: forget earlier failures.
        anew: the run starts anew: nothing that is in the file concerns it, and it stays as it is until `begin`.

    Raises:
        TrainingError: on entering: the last three starts failed at the same step, and nothing was changed since.
    """

    def __init__(self, cfg: Config, *, retry: bool = False, anew: bool = False) -> None:
        self._folder = Path(cfg.train.output_dir)
        continued = replace(cfg, train=replace(cfg.train, resume=True))  # starting anew is said for one start
        self._settings = f"{config_digest(continued)[:16]}x{distributed.get_world_size()}"
        self._retry = retry
        self._anew = anew
        self._lock = threading.Lock()  # a rank may be found missing by another thread
        self._record: RunRecord | None = None  # of rank 0
        self._written_at_s = 0.0
        self._writes = True

    def __enter__(self) -> Self:
        distributed.on_main_first(self._open)
        distributed.call_before_ending(self._end_with_others)
        return self

    def begin(self, step: int, total_steps: int) -> None:
        """Note that training begins.

        Args:
            step: iteration that comes first.
            total_steps: iterations of the whole run.
        """
        self._writes = True
        self._update(iteration=step - 1 if step else None, total_steps=total_steps, began_at=step)
        distributed.note_step(step)

    def note(self, step: int) -> None:
        """Note that an iteration is done; the file follows within seconds."""
        distributed.note_step(step + 1)
        if self._record is None:
            return
        with self._lock:
            self._record = replace(self._record, iteration=step)
            if time.monotonic() - self._written_at_s >= _WRITE_PERIOD_S:
                self._write()

    def fail(self, reason: str, *, is_final: bool = False) -> None:
        """Note that this attempt ends with an error, said in one sentence; the first one counts.

        Args:
            reason: the sentence.
            is_final: another start would end with the same one.
        """
        if self._record is None or self._record.state == FAILED:
            return
        failures = _with_failure(self._record, reason=reason, at=_now())
        self._update(state=FAILED, failures=failures, is_final=is_final or _are_enough(failures))

    def _end_with_others(self, reason: str, is_failure: bool) -> None:
        if is_failure:
            self.fail(reason)
        else:
            self._update(state=STOPPED, failures=())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        distributed.end_with_lost_rank(error)  # its sentence is a better reason than what a collective says
        distributed.call_before_ending(None)
        if isinstance(error, KeyboardInterrupt):
            self._update(state=STOPPED, failures=())
        elif error is not None:
            reason = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
            self.fail(reason, is_final=isinstance(error, GuardRailError))
        elif self._record is not None:
            is_done = self._record.iteration is not None and self._record.iteration + 1 >= self._record.total_steps
            self._update(state=FINISHED if is_done else STOPPED, failures=())
        self._record = None

    def _open(self) -> None:
        now = _now()
        record = None if self._anew else read_run_state(self._folder)
        failures: tuple[Failure, ...] = ()
        if record is not None and not self._retry:
            killed = record.state == RUNNING
            failures = _with_failure(record, reason=KILLED, at=record.updated) if killed else record.failures
        same = failures_at_the_same_step(failures)
        if _are_enough(failures) and same[-1].settings == self._settings:
            if record.state == RUNNING:
                self._record = record
                self._update(state=FAILED, failures=failures, is_final=True)
                self._record = None
            raise TrainingError(self._report(same))
        self._writes = not (self._anew and (self._folder / STATE_NAME).exists())
        self._record = RunRecord(
            state=RUNNING,
            iteration=None if record is None else record.iteration,
            total_steps=None if record is None else record.total_steps,
            started=now,
            updated=now,
            attempts=1 if record is None else record.attempts + 1,
            failures=failures,
            settings=self._settings,
            job=distributed.job_id(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._update()

    def _report(self, same: tuple[Failure, ...]) -> str:
        at = ", ".join(f"iteration {failure.iteration} ({failure.time})" for failure in same)
        reasons = "; ".join(dict.fromkeys(failure.reason for failure in same))
        return (
            f"train.output_dir={self._folder}: the last {len(same)} starts failed at the same step and another one "
            f"would too: {at}: {reasons}. The logs are in {self._folder / 'logs'}; remove the cause and start with "
            f"--retry, or change a setting"
        )

    def _update(self, **changes: Any) -> None:
        if self._record is not None:
            with self._lock:
                self._record = replace(self._record, **changes)
                self._write()

    def _write(self) -> None:
        """Write the file under another name and rename it; what cannot be written must not end a run."""
        if not self._writes:
            return
        self._written_at_s = time.monotonic()
        self._record = replace(self._record, updated=_now())
        content = asdict(self._record)
        path = self._folder / STATE_NAME
        unfinished = path.with_name(f"{STATE_NAME}.tmp")
        try:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", path, error.strerror)


def _with_failure(record: RunRecord, *, reason: str, at: str) -> tuple[Failure, ...]:
    """Return the failures of a record and one more: that of the attempt it tells of."""
    done = -1 if record.iteration is None else record.iteration
    failure = Failure(
        iteration=None if record.began_at is None else done + 1,
        began_at=record.began_at,
        reason=" ".join(reason.split())[:_MAX_REASON_CHARS],
        time=at,
        settings=record.settings,
    )
    return (*record.failures, failure)[-_NUM_FAILURES_KEPT:]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
