"""The launcher of all programs: run one as a job, on a Slurm cluster or on this machine, through submitit.

    python run/train/train.py --nodes 2 --ngpus 4 --partition P --output-dir 'runs/%j' --config-file F ... [key=value]
    python run/eval/knn.py --ngpus 4 --timeout 60 --output-dir 'runs/%j' --config-file F ...
    python run/submit.py --ngpus 2 my_program.py --its-own options

run/train/train.py and each file in run/eval/ name their program; run/submit.py takes any. What the launcher does not
know it passes on. A job that is preempted or comes to its time limit saves, is requeued under its number, and goes on.
"""

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import submitit
import torch

from dinov2.errors import ConfigError
from dinov2.logging import run_program
from dinov2.run.submit_attempts import Record
from dinov2.run.submit_follow import Follower, follow
from dinov2.run.submit_job import ProgramJob
from dinov2.run.submit_local import LocalRanks
from dinov2.run.submit_options import JobOptions, check_options, check_training, get_args_parser, is_training
from dinov2.run.submit_script import PYTHON, describe_script, generic_parameters, slurm_parameters
from dinov2.run.submit_snapshot import program_in, take_snapshot, with_own_config
from dinov2.run.submit_sweep import SweepRun, read_sweep


@dataclass(frozen=True, kw_only=True)
class NamedJob:
    """A job, and what it is called in a sweep; empty for the only one."""

    name: str
    job: ProgramJob


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
    runs = read_sweep(args.sweep, given=passed_on)
    jobs, options = plan_jobs(options, program=program, passed_on=passed_on, runs=runs, output_dir=args.output_dir)
    if options.is_dry_run:
        print(describe(jobs, options))
        return 0
    if options.takes_snapshot:
        jobs = with_snapshot(jobs, options)
    if options.cluster == "debug":
        codes = [named.job.run("debug", os.environ) for named in jobs]
        return next((code for code in codes if code), 0)
    if options.cluster == "local":
        return run_here(jobs, options)
    submitted = submit(jobs, options)
    followers = []
    for named, job in zip(jobs, submitted, strict=True):
        _say(named, job, options)
        followers.append(Follower(job, name=named.name))
    if not options.follows:
        return 0
    return follow([lambda place: followers[place]] * len(followers), num_at_once=len(followers))


def plan_jobs(
    options: JobOptions, *, program: Path, passed_on: Sequence[str], runs: Sequence[SweepRun], output_dir: str | None
) -> tuple[list[NamedJob], JobOptions]:
    """Say which jobs there will be, one for each run of a sweep, and where.

    Args:
        options: of all of them.
        program: that they run.
        passed_on: its own arguments.
        runs: of the sweep; one without overrides where there is none.
        output_dir: as given; None: the program decides.

    Returns:
        The jobs, and the options with the output folder as the program will know it.

    Raises:
        ConfigError: the settings of a training are wrong.
    """
    run_dir = None
    if is_training(program):
        for run in runs:
            cfg = check_training([*passed_on, *run.overrides], num_ranks=options.nodes * options.tasks_per_node)
        run_dir = output_dir or cfg.train.output_dir
        output_dir = run_dir if "%j" in run_dir else output_dir
        options = replace(options, output_dir=run_dir)
    # On this machine the jobs of a sweep have no number in common, but the launcher that starts them.
    shared_dir = (
        options.output_dir if options.cluster == "slurm" else options.output_dir.replace("%j", str(os.getpid()))
    )
    jobs = []
    for run in runs:
        told = str(Path(shared_dir) / run.name) if run.name else output_dir
        job = ProgramJob(
            program=program.resolve(),
            arguments=(*passed_on, *run.overrides),
            output_dir=told,
            folder=Path.cwd(),
            limits=options.limits,
            timeout_s=options.timeout_min * 60,
            signal_delay_s=options.signal_delay_s,
            is_swept=bool(run.name),
            run_dir=None if run_dir is None else told or run_dir,
            local=_local_ranks(options),
        )
        jobs.append(NamedJob(name=run.name, job=job))
    return jobs, options


def with_snapshot(jobs: Sequence[NamedJob], options: JobOptions) -> list[NamedJob]:
    """Copy the code and the config file, and return jobs that run the copies."""
    code = take_snapshot(options.log_dir)
    print(f"the code is copied to {code}", flush=True)
    changed = []
    for named in jobs:
        arguments = tuple(with_own_config(named.job.arguments, snapshot=code))
        job = replace(named.job, program=program_in(code, named.job.program), arguments=arguments, code=code)
        changed.append(replace(named, job=job))
    return changed


def submit(jobs: Sequence[NamedJob], options: JobOptions) -> list[submitit.Job[int]]:
    """Hand jobs over to Slurm, several of them as one array; or start them in the background of this machine.

    Raises:
        ConfigError: the folder of the logs cannot be written, or Slurm refuses the job.
    """
    try:
        executor = submitit.AutoExecutor(
            folder=options.log_dir, cluster=options.cluster, slurm_python=PYTHON, local_python=PYTHON
        )
        code = jobs[0].job.code
        slurm = {f"slurm_{name}": value for name, value in slurm_parameters(options, code=code).items()}
        executor.update_parameters(**generic_parameters(options), **slurm)
        submitted = executor.submit_array([named.job for named in jobs])
        for job in submitted:
            Record.forget(job.paths.folder, job.job_id)
        return submitted
    except OSError as error:
        raise ConfigError(f"--output-dir {options.output_dir}: cannot be written ({error.strerror})") from error
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ConfigError(f"Slurm refuses the job: {reason}") from error


def run_here(jobs: Sequence[NamedJob], options: JobOptions) -> int:
    """Run jobs on this machine, as many at a time as the options say, and wait for them; returns the exit code."""
    num_at_once = options.num_at_once or 1
    gpus = _gpus_of_places(options, num_places=num_at_once)

    def start(place: int, *, named: NamedJob) -> Follower:
        local = replace(named.job.local, gpus=gpus[place])
        with _ignoring_interrupts():
            (job,) = submit([replace(named, job=replace(named.job, local=local))], options)
        _say(named, job, options)
        return Follower(job, name=named.name if num_at_once > 1 else "")

    return follow([partial(start, named=named) for named in jobs], num_at_once=num_at_once)


def describe(jobs: Sequence[NamedJob], options: JobOptions) -> str:
    """Say what would be submitted: the script for sbatch, or the commands on this machine."""
    commands = [shlex.join(named.job.command("%j")) for named in jobs]
    notes = [f"the code would be copied into {options.log_dir}, and run there"] if options.takes_snapshot else []
    if options.cluster == "slurm":
        script = describe_script(options, num_jobs=len(jobs))
        each = ["each task runs"] if len(jobs) == 1 else ["each task of the jobs runs, one line a job"]
        return "\n".join([script, *(f"# {line}" for line in [*notes, *each, *commands])])
    return "\n".join([f"{_size(options)}, in {jobs[0].job.folder}:", *commands, *notes])


def _take_program(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        given = f"{arguments[0]} is no option of the launcher; " if arguments else ""
        raise ConfigError(f"{given}name the program before its own options, e.g. submit.py --ngpus 2 eval/knn.py ...")
    return Path(arguments[0]).expanduser(), list(arguments[1:])


def _local_ranks(options: JobOptions) -> LocalRanks | None:
    if options.cluster == "slurm":
        return None
    return LocalRanks(num_ranks=options.tasks_per_node, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))


def _gpus_of_places(options: JobOptions, *, num_places: int) -> list[str | None]:
    """Divide the GPUs of this machine among jobs that run at the same time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if num_places == 1 or not options.needs_gpus or not torch.cuda.is_available():
        return [visible] * num_places
    size = options.tasks_per_node
    gpus = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if len(gpus) < num_places * size:
        raise ConfigError(
            f"--array {num_places} --ngpus {size}: {num_places * size} GPUs would be in use at the same time and this "
            f"machine has {len(gpus)}; give a smaller --array"
        )
    return [",".join(gpus[place * size : (place + 1) * size]) for place in range(num_places)]


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let processes that are started ignore Ctrl-C: the launcher passes it on, so that they end in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(named: NamedJob, job: submitit.Job[int], options: JobOptions) -> None:
    name = f"{named.name}, " if named.name else ""
    print(f"job {job.job_id}: {name}{_size(options)}, log: {job.paths.stdout}", flush=True)


def _size(options: JobOptions) -> str:
    where = "on this machine" if options.cluster != "slurm" else f"on {options.nodes} node(s) of Slurm"
    return f"{options.tasks_per_node} process(es) {where}, at most {options.timeout_min} min"
