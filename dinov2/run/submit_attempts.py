"""What became of the attempts of a job, and what follows: done, once more, or stop with a report.

A job is one number and one output folder; each time its program is started is an attempt. The record lies beside the
logs (`jobs/<number>_attempts.json`) and outlives the processes: a job that Slurm has requeued goes on counting.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # the job has ended
REQUEUED, RESTARTED = "requeued", "restarted"  # it goes on

_BAD_USAGE = 2  # exit codes of our programs: it would be the same again
_HAS_A_REASON = 1  # an error that they have said in a sentence
_LAST_TIMES = 3  # failures in a row at one step, after which the next would be no better
_RUN_STATE = "run_state.json"  # of the output folder, by the training program


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often a job goes on by itself."""

    max_requeues: int  # after a time limit or a preemption
    max_restarts: int  # after a failure
    knows_steps: bool = False  # the program is a training, which says how far it has come


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training says it has come; None: it does not say."""

    state: str | None = None  # finished, stopped, ...
    step: int | None = None  # iterations that are done
    began_at: int | None = None  # the same when the attempt began
    is_final: bool = False  # it has failed, and would again
    job: str | None = None  # number of the job that has started the run last


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the program, on all ranks, and how it ended."""

    number: int  # from 1
    ended: float  # seconds since 1970
    code: int  # 0, or of the first process that failed; 128 + the signal that ended it
    rank: int | None = None  # that failed first; None: it is not known, or none has
    host: str | None = None  # of that rank
    stopped_by: str | None = None  # signal that told the program to stop
    at_time_limit: bool = False
    was_preempted: bool = False  # Slurm has taken its nodes, for a job that goes first
    progress: Progress = Progress()
    verdict: str = ""
    reason: str = ""

    @property
    def has_failed(self) -> bool:
        """Say whether it ended neither by itself nor because it was told to."""
        return self.code != 0 and not self.was_ended_by_its_signal

    @property
    def was_ended_by_its_signal(self) -> bool:
        """Say whether the signal that told it to stop ended it: it had no handler for it, or not yet."""
        return self.stopped_by is not None and self.code == 128 + signal.Signals[self.stopped_by]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows from the last attempt."""

    kind: str
    reason: str
    code: int = 0  # of the job, if it ends

    @property
    def goes_on(self) -> bool:
        """Say whether there is another attempt."""
        return self.kind in (REQUEUED, RESTARTED)


@dataclass(kw_only=True)
class Record:
    """The attempts of one job, in its file."""

    path: Path
    attempts: list[Attempt] = field(default_factory=list)
    end: dict[str, Any] | None = None  # kind, code, reason, once the job has ended

    @staticmethod
    def forget(folder: Path, job_id: str) -> None:
        """Remove the record of an earlier job of this number: numbers come back, if only those of processes."""
        _record_path(folder, job_id).unlink(missing_ok=True)

    @classmethod
    def open(cls, folder: Path, job_id: str) -> "Record":
        """Read the record of a job; an empty one if there is none, or none that can be read."""
        path = _record_path(folder, job_id)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            attempts = [
                Attempt(**attempt | {"progress": Progress(**attempt["progress"])}) for attempt in content["attempts"]
            ]
            return cls(path=path, attempts=attempts, end=content["end"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path=path)

    def add(self, attempt: Attempt, verdict: Verdict) -> None:
        """Write down an attempt and what follows from it."""
        self.attempts.append(replace(attempt, verdict=verdict.kind, reason=verdict.reason))
        if not verdict.goes_on:
            self.end = {"kind": verdict.kind, "code": verdict.code, "reason": verdict.reason}
        self.write()

    def write(self) -> None:
        """Write the file, by rename: it is read while the job runs."""
        content = {"attempts": [asdict(attempt) for attempt in self.attempts], "end": self.end}
        new = self.path.with_name(f"{self.path.name}.tmp")
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def judge(attempts: Sequence[Attempt], limits: Limits, *, is_cancelled: bool, log: str) -> Verdict:
    """Decide what follows from the last of the attempts.

    Args:
        attempts: of the job, at least one; all but the last with their verdicts.
        limits: how often it may go on.
        is_cancelled: somebody has ended the job, or the scheduler deals with it by itself.
        log: where to look, for the report.
    """
    last = attempts[-1]
    if last.code == 0 and (last.stopped_by is None or last.progress.state == "finished"):
        return Verdict(kind=STOPPED if last.progress.state == "stopped" else FINISHED, reason=_how(last))
    if is_cancelled and not last.has_failed:
        return Verdict(kind=STOPPED, reason=_how(last), code=last.code)
    if last.was_preempted:
        return _after_stop(attempts, limits)
    may_start_again = limits.knows_steps or not last.at_time_limit
    if last.code == 0 or (last.was_ended_by_its_signal and may_start_again):
        return _after_stop(attempts, limits)
    if is_cancelled:
        return Verdict(kind=FAILED, reason=_how(last), code=last.code)
    return _after_failure(attempts, limits, log=log)


def progress_of(folder: Path | None) -> Progress:
    """Read `run_state.json` in the output folder (see `dinov2.train.run_state`).

    It is read here once more, so that a process that only waits for a program does not import PyTorch.
    """
    try:
        found = json.loads((folder / _RUN_STATE).read_text(encoding="utf-8")) if folder is not None else {}
        done = found.get("iteration")
        step = None if done is None else int(done) + 1
        return Progress(
            state=found.get("state"),
            step=step,
            began_at=found.get("began_at"),
            is_final=bool(found.get("is_final")),
            job=found.get("job"),
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return Progress()


def report(attempts: Sequence[Attempt]) -> str:
    """List attempts, one a line, with how each ended."""
    lines = []
    for attempt in attempts:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(attempt.ended))
        lines.append(f"  attempt {attempt.number}, {when}: {_how(attempt)}")
    return "\n".join(lines)


def _after_stop(attempts: Sequence[Attempt], limits: Limits) -> Verdict:
    last = attempts[-1]
    latest = _latest_at_one_step(attempts, limits)
    if latest and all(attempt.at_time_limit for attempt in latest):
        reason = f"{_how(last)}, like the {_LAST_TIMES - 1} attempts before it; raise --timeout"
        return Verdict(kind=FAILED, reason=reason, code=1)
    past = sum(attempt.verdict == REQUEUED for attempt in attempts)
    if past >= limits.max_requeues:
        reason = f"{_how(last)}; --max-requeues {limits.max_requeues} allows no more, submit again to go on"
        return Verdict(kind=STOPPED, reason=reason, code=1)
    reason = f"{_how(last)}; requeued ({past + 1} of at most {limits.max_requeues})"
    return Verdict(kind=REQUEUED, reason=reason)


def _after_failure(attempts: Sequence[Attempt], limits: Limits, *, log: str) -> Verdict:
    last = attempts[-1]
    how = _how(last)
    latest = _latest_at_one_step(attempts, limits)
    past = sum(attempt.verdict == RESTARTED for attempt in attempts)
    if last.code == _BAD_USAGE:
        ending = "a wrong setting, which a restart would meet again"
    elif limits.max_restarts == 0:
        ending = "raise --timeout" if last.at_time_limit else f"log: {log}"
    elif last.code == _HAS_A_REASON and last.progress.state is not None and last.progress.began_at is None:
        ending = f"before training began, not restarted; log: {log}"
    elif last.code == _HAS_A_REASON and last.progress.is_final:
        ending = f"not restarted, it would end so again; log: {log}"
    elif latest and all(attempt.code for attempt in latest):
        ending = f"{_LAST_TIMES} failures in a row at the same step, not restarted again; log: {log}\n{report(latest)}"
    elif past >= limits.max_restarts:
        ending = f"--max-restarts {limits.max_restarts} allows no more; log: {log}\n{report(attempts)}"
    else:
        return Verdict(kind=RESTARTED, reason=f"{how}; restarted ({past + 1} of at most {limits.max_restarts})")
    return Verdict(kind=FAILED, reason=f"{how}; {ending}", code=last.code)


def _latest_at_one_step(attempts: Sequence[Attempt], limits: Limits) -> Sequence[Attempt]:
    """Return the last attempts if all of them ended, or all began, at one step; else none."""
    latest = attempts[-_LAST_TIMES:]
    for name in ("step", "began_at"):
        if limits.knows_steps and len({getattr(attempt.progress, name) for attempt in latest}) == 1:
            return latest if len(latest) == _LAST_TIMES else ()
    return ()


def _how(attempt: Attempt) -> str:
    at_step = "" if attempt.progress.step is None else f" at step {attempt.progress.step}"
    limit = " (time limit)" if attempt.at_time_limit else " (preempted)" if attempt.was_preempted else ""
    if attempt.code == 0 and attempt.stopped_by is None:
        return "stopped on request" + at_step if attempt.progress.state == "stopped" else "done"
    if attempt.code == 0:
        return f"stopped by {attempt.stopped_by}{limit}{at_step}"
    if attempt.was_ended_by_its_signal:
        return f"ended by {attempt.stopped_by}{limit}{at_step}, before it could save"
    which = "a process" if attempt.rank is None else f"process {attempt.rank}"
    where = "" if attempt.host is None else f" on {attempt.host}"
    return f"{which}{where} {describe_code(attempt.code)}{limit}{at_step}"


def describe_code(code: int) -> str:
    """Say how a process ended: 1 -> `ended with exit code 1`, 137 -> `was ended by SIGKILL`."""
    try:
        return f"was ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"ended with exit code {code}"


def _record_path(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_attempts.json"
