"""What runs inside a job, once for each task: the program, as a process of its own, told its place among the others.

A process of its own, because a program sets its own signal handlers and ends in its own way; what submitit started
only waits for it. Under Slurm the program reads the variables of the job step itself; on this machine it is told as
torchrun would tell it (see `dinov2.distributed.launch_environment`).
"""

import atexit
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import submitit

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GPUS = "CUDA_VISIBLE_DEVICES"
_END_S = 20  # for a program that is told to end


@dataclass(frozen=True, kw_only=True)
class ProgramJob:
    """A program and its arguments; calling it inside a job runs it."""

    program: Path
    arguments: tuple[str, ...]  # as the user gave them, without --output-dir
    output_dir: str | None  # may hold %j; None: the program is not told
    folder: Path  # where the program is started
    port: int | None = None  # where the processes of one machine meet; None: Slurm says it
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES of the launcher, for a job on this machine

    def command(self, job_id: str) -> list[str]:
        """Return the command of each task."""
        told = [] if self.output_dir is None else ["--output-dir", self.output_dir.replace("%j", job_id)]
        return [sys.executable, str(self.program), *told, *self.arguments]

    def run(self, job_id: str, variables: Mapping[str, str]) -> int:
        """Run the program with these variables and return its exit code; 128 + the signal that ended it."""
        process = subprocess.Popen(self.command(job_id), cwd=self.folder, env=dict(variables))
        try:
            code = process.wait()
        except BaseException:  # the job is ended, by submitit or by hand
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        return code if code >= 0 else 128 - code

    def __call__(self) -> int:
        """Run the program as one task of a job; submitit keeps the exit code, and this process ends with it too."""
        job = submitit.JobEnvironment()
        code = self.run(job.job_id, self.variables(job))
        if code:
            atexit.register(_end_with, code)  # later than submitit writes down the code, and seen by Slurm
        return code

    def variables(self, job: submitit.JobEnvironment) -> dict[str, str]:
        """Return the environment of one task."""
        variables = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        variables["PYTHONUNBUFFERED"] = "1"  # log lines and results in the order in which they were written
        if self.port is None:
            return variables
        variables.pop(_GPUS, None)  # submitit gives a local job those from 0 on, or none
        if self.gpus is not None:
            variables[_GPUS] = self.gpus
        place = {
            "RANK": job.global_rank,
            "WORLD_SIZE": job.num_tasks,
            "LOCAL_RANK": job.local_rank,
            "LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port,
        }
        return variables | {name: str(value) for name, value in place.items()}


def _end_with(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
