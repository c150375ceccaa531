"""The launcher of all programs: run one as a job, on a Slurm cluster or on this machine, through submitit.

    python run/eval/knn.py --nodes 1 --ngpus 4 --timeout 60 --partition P --output-dir 'runs/%j' --config-file F ...
    python run/submit.py --ngpus 2 my_program.py --its-own options

Each file in run/eval/ names its program; run/submit.py takes any. What the launcher does not know it passes on.
"""

import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from dinov2.errors import ConfigError
from dinov2.logging import run_program
from dinov2.run.submit_job import ProgramJob
from dinov2.run.submit_options import JobOptions, check_options, get_args_parser

_POLL_S = 0.5
_LAST_LINES = 15


def main(argv: Sequence[str] | None = None, *, program: Path | None = None) -> int:
    """Submit as the command line says.

    Args:
        argv: arguments without the launcher's name; None: those of the process.
        program: that is run; None: the first argument that is not the launcher's own.

    Returns:
        0 once a job is submitted; of a job that is waited for, its exit code; 2 for bad usage.
    """
    return run_program(lambda argv: _run(argv, program=program), argv)


def _run(argv: Sequence[str] | None, *, program: Path | None) -> int:
    prog = "submit.py" if program is None else program.name
    parser = get_args_parser(prog, takes_program=program is None)
    args, passed_on = parser.parse_known_args(argv)
    if program is None:
        program, passed_on = _take_program(passed_on)
    if not program.is_file():
        raise ConfigError(f"{program}: there is no such program")
    options = check_options(args, program=program, passed_on=passed_on)
    is_local = options.cluster == "local"
    job = ProgramJob(
        program=program.resolve(),
        arguments=tuple(passed_on),
        output_dir=args.output_dir,
        folder=Path.cwd(),
        port=_free_port() if is_local else None,
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES") if is_local else None,
    )
    if options.is_dry_run:
        print(describe(job, options))
        return 0
    if options.cluster == "debug":
        return job.run("debug", os.environ)
    submitted = submit(job, options)
    print(f"job {submitted.job_id}: {_size(options)}, log: {submitted.paths.stdout}", flush=True)
    return wait_for(submitted) if is_local or options.follows else 0


def submit(job: ProgramJob, options: JobOptions) -> submitit.Job[int]:
    """Hand a job over to Slurm, or start it in the background of this machine.

    Raises:
        ConfigError: the folder of the logs cannot be written, or Slurm refuses the job.
    """
    try:
        executor = submitit.AutoExecutor(folder=options.log_dir, cluster=options.cluster)
        slurm = {f"slurm_{name}": value for name, value in _slurm_parameters(options).items()}
        executor.update_parameters(**_parameters(options), **slurm)
        return executor.submit(job)
    except OSError as error:
        raise ConfigError(f"--output-dir {options.output_dir}: cannot be written ({error.strerror})") from error
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ConfigError(f"Slurm refuses the job: {reason}") from error


def wait_for(job: submitit.Job[int]) -> int:
    """Show the log of the first task while a job runs; returns the job's exit code, 1 if it was ended from outside."""
    log = _Log(job.paths.stdout)
    while not job.done():
        log.show_new()
        time.sleep(_POLL_S)
    log.show_new()
    parts = [job.task(rank) for rank in range(job.num_tasks)]
    codes = [_exit_code(part) for part in parts]
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if not failed:
        print(f"job {job.job_id}: done")
        return 0
    rank = failed[0]
    how = "was ended before its program was" if codes[rank] is None else f"ended with exit code {codes[rank]}"
    print(f"error: job {job.job_id}: process {rank} {how}; log: {parts[rank].paths.stdout}", file=sys.stderr)
    if rank:
        print(_last_lines(parts[rank].paths.stdout), file=sys.stderr)
    return codes[rank] or 1


def describe(job: ProgramJob, options: JobOptions) -> str:
    """Say what would be submitted: the script for sbatch, or the command on this machine."""
    command = shlex.join(job.command("%j"))
    if options.cluster != "slurm":
        return f"{_size(options)}, in {job.folder}:\n{command}"
    executor = _ScriptWriter(options.log_dir)
    return f"{executor.script(_parameters(options), _slurm_parameters(options))}\n# each task runs\n# {command}"


class _ScriptWriter(submitit.SlurmExecutor):
    """Slurm's executor on a machine that may have no Slurm: it writes the script and submits nothing."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self, generic: dict[str, Any], slurm: dict[str, Any]) -> str:
        """Return the script for sbatch."""
        self.update_parameters(**self._convert_parameters(generic), **slurm)
        return self._make_submission_file_text(self._submitit_command_str, uid="")


class _Log:
    """A log file that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shown = 0  # bytes

    def show_new(self) -> None:
        """Print what has been added."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._shown)
            added = file.read()
        self._shown += len(added)
        sys.stdout.write(added.decode(errors="replace"))
        sys.stdout.flush()


def _take_program(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        given = f"{arguments[0]} is no option of the launcher; " if arguments else ""
        raise ConfigError(f"{given}name the program before its own options, e.g. submit.py --ngpus 2 eval/knn.py ...")
    return Path(arguments[0]).expanduser(), list(arguments[1:])


def _parameters(options: JobOptions) -> dict[str, Any]:
    """Return what submitit knows under one name for all clusters."""
    parameters = {
        "name": options.name,
        "timeout_min": options.timeout_min,
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem_gb": options.mem_gb,
        "stderr_to_stdout": True,
    }
    if options.needs_gpus and options.cluster == "slurm":
        parameters["gpus_per_node"] = options.tasks_per_node
    return {name: value for name, value in parameters.items() if value is not None}


def _slurm_parameters(options: JobOptions) -> dict[str, Any]:
    if options.cluster != "slurm":
        return {}
    ends_together = {"srun_args": ["--kill-on-bad-exit=1"]}  # the others would wait for the one that has failed
    extra = {"additional_parameters": options.slurm_extra} if options.slurm_extra else {}
    return options.slurm | ends_together | extra


def _size(options: JobOptions) -> str:
    where = "on this machine" if options.cluster != "slurm" else f"on {options.nodes} node(s) of Slurm"
    return f"{options.tasks_per_node} process(es) {where}, at most {options.timeout_min} min"


def _exit_code(task: submitit.Job[int]) -> int | None:
    """Return the exit code of one task; None if it was ended from outside."""
    try:
        return task.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
        return None


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-_LAST_LINES:])


def _free_port() -> int:
    """Find a port for processes of this machine to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
