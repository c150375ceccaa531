"""What runs inside a job: the program, once for each task, told its place among the others.

Under Slurm each task of the job is one `ProgramJob` that runs the program as one rank; the program reads the variables
of the job step itself, and `submit_after` decides in the job's script what follows. On this machine one `ProgramJob`
runs all ranks, see `submit_local`.
"""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import submitit

from dinov2.run.submit_attempts import Limits, progress_of
from dinov2.run.submit_local import LocalRanks
from dinov2.run.submit_process import Processes, end_with_parent, without_launcher

RESTARTS = "SLURM_RESTART_COUNT"  # how often Slurm has requeued a job
_STARTS_ANEW = ("--no-resume", "--overwrite")  # options of the training; a config file may say the first one, too


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How the program ended on one rank of a Slurm job; `submit_after` reads it."""

    rank: int
    host: str
    code: int  # 128 + the signal that ended it
    stopped_by: str | None  # signal that told it to stop
    ended: float  # seconds since 1970
    restarts: str  # of the job by Slurm, so that what an earlier one left is not taken for this one's

    @staticmethod
    def path(folder: Path, job_id: str, rank: int | str) -> Path:
        """Return the file of one rank."""
        return folder / f"{job_id}_{rank}_ended.json"


@dataclass(frozen=True, kw_only=True)
class ProgramJob:
    """A program and its arguments; calling it inside a job runs it."""

    program: Path
    arguments: tuple[str, ...]  # as the user gave them, without those of the launcher
    output_dir: str | None  # of --output-dir, may hold %j; None: the program is not told
    folder: Path  # where the program is started
    limits: Limits
    timeout_s: float  # of the job
    signal_delay_s: float  # that the program is told to stop ahead of it
    is_swept: bool = False  # one of the jobs of a sweep: %j is the number that they share
    run_dir: str | None = None  # where it writes, if it is known and a training; may hold %j
    code: Path | None = None  # copy of the library to run
    local: LocalRanks | None = None  # None: a Slurm job

    def command(self, job_id: str) -> list[str]:
        """Return the command of each rank."""
        told = [] if self.output_dir is None else ["--output-dir", self._numbered(self.output_dir, job_id)]
        return [sys.executable, str(self.program), *told, *self._arguments(job_id)]

    def run_folder(self, job_id: str) -> Path | None:
        """Return the folder in which a training says how far it has come."""
        return None if self.run_dir is None else self.folder / self._numbered(self.run_dir, job_id)

    def run(self, job_id: str, variables: Mapping[str, str]) -> int:
        """Run the program as one process with these variables, and return its exit code."""
        with Processes(in_own_sessions=True) as processes:
            return processes.wait(self._start(processes, job_id, variables))

    def __call__(self) -> int:
        """Run the program as one task of a Slurm job, or as all of a job on this machine."""
        job = submitit.JobEnvironment()
        if self.local is not None:
            end_with_parent()  # it is submitit's, and what the launcher waits for
            code = self.local.run(self, folder=job.paths.folder, job_id=job.job_id)
        else:
            code = self._run_rank(job)
        if code:
            atexit.register(_end_with, code)  # later than submitit writes down the code, and seen by Slurm
        return code

    def variables(self) -> dict[str, str]:
        """Return the environment of the program, but for its place among the ranks."""
        variables = without_launcher()
        variables["PYTHONUNBUFFERED"] = "1"  # log lines and results in the order in which they were written
        if self.code is not None:
            paths = [str(self.code), *filter(None, [variables.get("PYTHONPATH")])]
            variables["PYTHONPATH"] = os.pathsep.join(paths)
        return variables

    def _numbered(self, path: str, job_id: str) -> str:
        return path.replace("%j", job_id.partition("_")[0] if self.is_swept else job_id)

    def _arguments(self, job_id: str) -> Sequence[str]:
        """Return the program's arguments; starting anew is said for one start, not for all of the job."""
        if self.run_dir is None or progress_of(self.run_folder(job_id)).job != job_id:
            return self.arguments
        return [*(text for text in self.arguments if text not in _STARTS_ANEW), "train.resume=true"]

    def _run_rank(self, job: submitit.JobEnvironment) -> int:
        with Processes() as processes:
            code = processes.wait(self._start(processes, job.job_id, self.variables()))
            end = RankEnd(
                rank=job.global_rank,
                host=job.hostname,
                code=code,
                stopped_by=processes.stopped_by,
                ended=time.time(),
                restarts=os.environ.get(RESTARTS, "0"),
            )
            path = RankEnd.path(job.paths.folder, job.job_id, job.global_rank)
            path.write_text(json.dumps(asdict(end)), encoding="utf-8")
            return code

    def _start(self, processes: Processes, job_id: str, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return processes.start(self.command(job_id), folder=self.folder, variables=variables)


def _end_with(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
