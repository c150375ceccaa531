"""Wait for jobs: show their logs, and say how they ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

import submitit

from dinov2.run.submit_attempts import FINISHED, STOPPED, Record
from dinov2.run.submit_local import log_of
from dinov2.run.submit_process import ending_signals
from dinov2.signals import HandledSignals

_POLL_S = 0.5
_ASK_SLURM_S = 5.0
_SETTLE_S = 3.0  # for files to be seen after the end of a job, on a shared file system
_LAST_LINES = 15


class Follower:
    """One job that is waited for.

    Args:
        job: submitted.
        name: put before each of its lines; none if the job is the only one.
    """

    def __init__(self, job: submitit.Job[int], *, name: str = "") -> None:
        self.job = job
        self.code = 0  # once it has ended
        self._folder = job.paths.folder
        self._log = _Log(job.paths.stdout, prefix=f"[{name}] " if name else "")
        self._asked_s = time.monotonic()
        self._is_here = not isinstance(job, submitit.SlurmJob)

    def interrupt(self) -> None:
        """Tell the job to save and end, if it runs here; leave it alone if Slurm runs it.

        Raises:
            KeyboardInterrupt: it is left alone, and waiting for it ends.
        """
        job_id = self.job.job_id
        if not self._is_here:
            print(f"job {job_id} goes on; to end it: scancel {job_id}", flush=True)
            raise KeyboardInterrupt
        print(f"job {job_id} saves and ends; Ctrl-C again to wait no longer", flush=True)
        os.kill(int(job_id), signal.SIGTERM)  # its number is that of its process

    def look(self) -> bool:
        """Show what is new; say whether the job runs, and how it ended if it does not."""
        self._log.show_new()
        record = Record.open(self._folder, self.job.job_id)
        if record.end is None:
            if self._goes_on():
                return True
            time.sleep(0 if self._is_here else _SETTLE_S)
            record = Record.open(self._folder, self.job.job_id)
        self._log.show_new()
        self.code = self._conclude(record)
        return False

    def _goes_on(self) -> bool:
        """Ask whether the job is still known."""
        if self._is_here:
            return not self.job.done()
        if time.monotonic() - self._asked_s < _ASK_SLURM_S:
            return True
        self._asked_s = time.monotonic()
        answer = subprocess.run(
            ["squeue", "--noheader", "--jobs", self.job.job_id, "--format=%T"], capture_output=True, text=True
        )
        if answer.returncode:  # Slurm may be busy; an ended job is unknown to it after some minutes
            return "Invalid job id" not in answer.stderr
        return bool(answer.stdout.strip())

    def _conclude(self, record: Record) -> int:
        job_id = self.job.job_id
        if record.end is None:
            log = self.job.paths.stdout
            print(f"error: job {job_id}: was ended before its program was; log: {log}", file=sys.stderr)
            return 1
        kind, code, reason = record.end["kind"], record.end["code"], record.end["reason"]
        if kind == FINISHED:
            print(f"job {job_id}: done", flush=True)
        elif kind == STOPPED and code == 0:
            print(f"job {job_id}: {reason}; submit again to go on", flush=True)
        else:
            print(f"error: job {job_id}: {reason}", file=sys.stderr)
            if rank := record.attempts[-1].rank:
                print(_last_lines(log_of(self._folder, job_id, rank)), file=sys.stderr)
        return code


def follow(waiting: Sequence[Callable[[int], Follower]], *, num_at_once: int) -> int:
    """Start jobs in turn and wait for all.

    Ctrl-C, and what ends the job around the launcher, tells those of this machine to save and end, and starts no more.

    Args:
        waiting: start a job each, told which of the `num_at_once` places is free, from 0 on.
        num_at_once: jobs that may run at the same time.

    Returns:
        0, or the exit code of the job that failed first.

    Raises:
        KeyboardInterrupt: at the first Ctrl-C, while the jobs are Slurm's, or at the second.
    """
    waiting = list(waiting)
    running: dict[int, Follower] = {}  # by their places
    code = 0
    is_interrupted = False
    with _Interrupts() as interrupts:
        while running or waiting:
            for place in range(num_at_once):
                if waiting and place not in running:
                    running[place] = waiting.pop(0)(place)
            for place, follower in list(running.items()):
                if not follower.look():
                    del running[place]
                    code = code or follower.code
            if interrupts.num_received and not is_interrupted:
                is_interrupted = True
                waiting.clear()
                for follower in running.values():
                    follower.interrupt()
            if interrupts.num_ctrl_c > 1:
                raise KeyboardInterrupt
            if running:
                time.sleep(_POLL_S)
    return code


class _Interrupts(HandledSignals):
    """While entered, what would end this process is counted instead."""

    def __init__(self) -> None:
        super().__init__()
        self.num_received = 0
        self.num_ctrl_c = 0

    def _numbers(self) -> Iterable[int]:
        return ending_signals()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.num_received += 1
        self.num_ctrl_c += number == signal.SIGINT


class _Log:
    """A log file that is being written."""

    def __init__(self, path: Path, *, prefix: str) -> None:
        self._path = path
        self._prefix = prefix
        self._shown = 0  # bytes

    def show_new(self) -> None:
        """Print what has been added; with a prefix, whole lines only."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._shown)
            added = file.read()
        if self._prefix:
            added = added[: added.rfind(b"\n") + 1]
        self._shown += len(added)
        text = added.decode(errors="replace")
        if self._prefix:
            text = "".join(f"{self._prefix}{line}" for line in text.splitlines(keepends=True))
        sys.stdout.write(text)
        sys.stdout.flush()


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-_LAST_LINES:])
