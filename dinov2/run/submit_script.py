"""What submitit and sbatch are told about a job, and the script that sbatch gets."""

import shlex
import sys
from pathlib import Path
from typing import Any

import submitit

from dinov2.run.submit_after import AGAIN
from dinov2.run.submit_options import JobOptions

# Python that does not import from the current folder, which may hold another dinov2.
PYTHON = f"{shlex.quote(sys.executable)} -P"
_NO_LIMIT_MIN = 10 * 365 * 24 * 60  # `submit_local` keeps the time limit; submitit's would kill what is saving


def generic_parameters(options: JobOptions) -> dict[str, Any]:
    """Return what submitit knows under one name for all clusters."""
    is_slurm = options.cluster == "slurm"
    parameters = {
        "name": options.name,
        "timeout_min": options.timeout_min if is_slurm else _NO_LIMIT_MIN,
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node if is_slurm else 1,  # which starts the ranks
        "cpus_per_task": options.cpus_per_task,
        "mem_gb": options.mem_gb,
        "stderr_to_stdout": True,
    }
    if options.needs_gpus and is_slurm:
        parameters["gpus_per_node"] = options.tasks_per_node
    return {name: value for name, value in parameters.items() if value is not None}


def slurm_parameters(options: JobOptions, *, code: Path | None) -> dict[str, Any]:
    """Return what only Slurm knows; nothing for another cluster.

    Args:
        options: of the job.
        code: copy of the library to run, if there is one.
    """
    if options.cluster != "slurm":
        return {}
    requeue = {"requeue": True} if options.limits.max_requeues else {"no-requeue": True}  # also by Slurm, itself
    parameters = options.slurm | {
        "signal_delay_s": options.signal_delay_s,
        "setup": _before_srun(code),
        "teardown": _after_srun(options.log_dir.absolute()),
        "srun_args": ["--kill-on-bad-exit=1"],  # the others would wait for the one that has failed
        "additional_parameters": requeue | options.slurm_extra,
    }
    if options.num_at_once is not None:
        parameters["array_parallelism"] = options.num_at_once
    return parameters


def describe_script(options: JobOptions, *, num_jobs: int) -> str:
    """Write the script for sbatch, also on a machine that has no Slurm; submits nothing."""
    writer = _ScriptWriter(options.log_dir, python=PYTHON)
    slurm = slurm_parameters(options, code=None)
    if num_jobs > 1:
        writer.parameters["map_count"] = num_jobs
    return writer.script(generic_parameters(options), slurm)


class _ScriptWriter(submitit.SlurmExecutor):
    """Slurm's executor, for the script alone."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self, generic: dict[str, Any], slurm: dict[str, Any]) -> str:
        self.update_parameters(**self._convert_parameters(generic), **slurm)
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def _before_srun(code: Path | None) -> list[str]:
    """Return the lines ahead of srun.

    The shell must outlive the signals that Slurm sends to a job, for what comes after srun; srun starts again after a
    failure, in the same nodes.
    """
    path = [] if code is None else [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    return ["trap : TERM USR1 USR2", *path, f"code={AGAIN}", f"while [ $code = {AGAIN} ]; do"]


def _after_srun(folder: Path) -> list[str]:
    return [f"{PYTHON} -m dinov2.run.submit_after {shlex.quote(str(folder))} $?", "code=$?", "done", "exit $code"]
