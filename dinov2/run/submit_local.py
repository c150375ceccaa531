"""A job on this machine: its ranks, its time limit, and its next attempt, all in one process.

It does what Slurm, srun and `submit_after` do together: the ranks end together when one of them fails; ahead of the
time limit they are told to stop, save, and are started again.
"""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.run.submit_attempts import Attempt, Record, judge, progress_of
from dinov2.run.submit_process import Processes

if TYPE_CHECKING:
    from dinov2.run.submit_job import ProgramJob

_POLL_S = 0.1
_OTHERS_S = 15  # for ranks to find out by themselves that one has failed, and say so
_END_S = 20  # for a rank that is told to end
_BEGINS_ANEW = ("SIGUSR1", "SIGUSR2")  # a preemption or a time limit; the others are somebody's wish to end the job
_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class LocalRanks:
    """How many ranks run here, and what they see."""

    num_ranks: int
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES; None: as this machine has them

    def run(self, job: "ProgramJob", *, folder: Path, job_id: str) -> int:
        """Run attempts until the job has ended; returns its exit code."""
        record = Record.open(folder, job_id)
        while True:
            attempt = self._run_once(job, folder=folder, job_id=job_id, number=len(record.attempts) + 1)
            is_cancelled = attempt.stopped_by is not None and attempt.stopped_by not in _BEGINS_ANEW
            log = str(log_of(folder, job_id, attempt.rank or 0))
            verdict = judge([*record.attempts, attempt], job.limits, is_cancelled=is_cancelled, log=log)
            record.add(attempt, verdict)
            print(f"job {job_id}, attempt {attempt.number}: {verdict.reason}", flush=True)
            if not verdict.goes_on:
                return verdict.code

    def _run_once(self, job: "ProgramJob", *, folder: Path, job_id: str, number: int) -> Attempt:
        deadline = time.monotonic() + job.timeout_s
        with Processes(in_own_sessions=True) as processes, contextlib.ExitStack() as logs:
            ranks = []
            port = _free_port()
            for rank in range(self.num_ranks):
                log = logs.enter_context(log_of(folder, job_id, rank).open("ab")) if rank else None
                variables = self._variables(job.variables(), rank=rank, port=port)
                ranks.append(processes.start(job.command(job_id), folder=job.folder, variables=variables, output=log))
            watch = _Watch(processes, ranks, deadline=deadline, signal_delay_s=job.signal_delay_s)
            watch.wait()
        failed = watch.failed
        return Attempt(
            number=number,
            ended=time.time(),
            code=0 if failed is None else watch.codes[failed],
            rank=failed,
            stopped_by=processes.stopped_by,
            at_time_limit=watch.was_time_limit,
            progress=progress_of(job.run_folder(job_id)),
        )

    def _variables(self, variables: dict[str, str], *, rank: int, port: int) -> dict[str, str]:
        """Add what torchrun would tell a rank (see `dinov2.distributed.launch_environment`)."""
        variables.pop(_GPUS, None)  # submitit gives a local job those from 0 on, or none
        if self.gpus is not None:
            variables[_GPUS] = self.gpus
        place = {
            "RANK": rank,
            "WORLD_SIZE": self.num_ranks,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": self.num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        return variables | {name: str(value) for name, value in place.items()}


class _Watch:
    """Waits for ranks: ends them together, and ahead of the time limit."""

    def __init__(
        self, processes: Processes, ranks: Sequence[subprocess.Popen[bytes]], *, deadline: float, signal_delay_s: float
    ) -> None:
        self._processes = processes
        self._ranks = ranks
        self._to_save_s = max(signal_delay_s, _END_S)
        self._due = [(deadline - signal_delay_s, signal.SIGUSR2), (deadline, signal.SIGKILL)]  # in their order
        self._was_stopped = False
        self.codes: dict[int, int] = {}
        self.failed: int | None = None  # the first rank that did
        self.was_time_limit = False

    def wait(self) -> None:
        """Return when all ranks have ended."""
        while len(self.codes) < len(self._ranks):
            for rank, process in enumerate(self._ranks):
                if rank not in self.codes and (code := self._processes.ended(process)) is not None:
                    self.codes[rank] = code
                    if code and self.failed is None:
                        self.failed = rank
                        self._add(_OTHERS_S, signal.SIGTERM)
                        self._add(_OTHERS_S + _END_S, signal.SIGKILL)
            if self._processes.stopped_by is not None and not self._was_stopped:
                self._was_stopped = True
                self._add(self._to_save_s, signal.SIGKILL)
            self._send_what_is_due()
            time.sleep(_POLL_S)

    def _add(self, delay_s: float, number: signal.Signals) -> None:
        self._due.append((time.monotonic() + delay_s, number))
        self._due.sort()

    def _send_what_is_due(self) -> None:
        while self._due and time.monotonic() >= self._due[0][0]:
            _, number = self._due.pop(0)
            if number == signal.SIGUSR2:
                self.was_time_limit = self._processes.stopped_by is None
                self._processes.stop(number)
            else:
                self._processes.send(number)


def log_of(folder: Path, job_id: str, rank: int) -> Path:
    """Return the log of one rank; submitit gives the first one's its name."""
    return folder / f"{job_id}_{rank}_log.out"


def _free_port() -> int:
    """Find a port for processes of this machine to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
