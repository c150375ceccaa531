"""Options of the launcher: what it keeps for itself, and what it passes on to the program."""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.configs import Config, batch_size_per_rank, load_config, require_train_dataset, require_trainable
from dinov2.errors import ConfigError
from dinov2.run.submit_attempts import Limits
from dinov2.train.arguments import parse_arguments

CLUSTERS = ("auto", "slurm", "local", "debug")
TRAIN_PROGRAM = Path(__file__).resolve().parents[1] / "train" / "train.py"
_DEVICE = "compute_precision.device="
_SLURM_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "comment", "dependency")  # as of sbatch
_MAX_REQUEUES, _MAX_RESTARTS = 100, 10
_SIGNAL_DELAY_S = 120


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job needs; all of it checked."""

    cluster: str  # slurm, local or debug
    name: str
    nodes: int
    tasks_per_node: int
    timeout_min: int
    needs_gpus: bool  # one for each task
    cpus_per_task: int | None
    mem_gb: float | None  # of a node
    slurm: dict[str, str]  # option of sbatch: value
    slurm_extra: dict[str, str]  # the same, which submitit does not know
    signal_delay_s: int
    limits: Limits
    num_at_once: int | None  # jobs of a sweep; None: as many as the cluster runs, one on this machine
    output_dir: str  # may hold %j, for the number of the job
    is_dry_run: bool
    follows: bool
    takes_snapshot: bool

    @property
    def log_dir(self) -> Path:
        """Folder of submitit's files: scripts, logs and results; one for all jobs, whose numbers the files bear."""
        parts = Path(self.output_dir).parts
        without_number = itertools.takewhile(lambda part: "%j" not in part, parts)
        return Path(*without_number) / "jobs"


def get_args_parser(prog: str, *, takes_program: bool) -> argparse.ArgumentParser:
    """Describe the launcher's own options; `takes_program`: the program to run is named among the arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [options of the job] {'PROGRAM [its options]' if takes_program else '[options of the program]'}",
        description=f"Run {'a program' if takes_program else prog} as a job: on a Slurm cluster, or on this "
        "machine. Everything that is not listed here is passed on untouched.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default="auto",
        help="slurm; local: processes on this machine, in the background; debug: one process, here; "
        "auto: slurm where there is sbatch, else local; default: auto",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; default: 1")
    parser.add_argument(
        "--ngpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on a machine, each with a GPU unless compute_precision.device is cpu; default: 1",
    )
    parser.add_argument(
        "--timeout",
        type=int,
        default=1440,
        metavar="MIN",
        help="longest time, minutes; ahead of it the program is told to save, and the job is requeued; default: 1440",
    )
    parser.add_argument(
        "--signal-delay",
        type=int,
        metavar="S",
        help=f"how long ahead, seconds: what it takes to end a step and save; default: {_SIGNAL_DELAY_S}, at most half "
        "the time",
    )
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=_MAX_REQUEUES,
        metavar="N",
        help=f"how often a job goes on after its time limit or a preemption; default: {_MAX_REQUEUES}",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="how often a job goes on from its last checkpoint after a failure (a process was killed, a GPU was lost); "
        f"three failures in a row at the same step end it; default: {_MAX_RESTARTS} of a training, else 0",
    )
    _add_slurm_options(parser)
    _add_launch_options(parser)
    return parser


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--partition", metavar="P", help="of the Slurm cluster; default: its own")
    parser.add_argument("--account", metavar="A", help="charged by Slurm; default: your own")
    parser.add_argument("--qos", metavar="Q", help="quality of service of Slurm; default: its own")
    parser.add_argument("--constraint", metavar="C", help="features of a node that Slurm must find; default: none")
    parser.add_argument(
        "--use-volta32",
        dest="constraint",
        action="store_const",
        const="volta32gb",
        help="as in the official code: --constraint volta32gb; default: no",
    )
    parser.add_argument("--exclude", metavar="NODES", help="nodes that Slurm must not take; default: none")
    parser.add_argument("--dependency", metavar="D", help="start it after other jobs, e.g. afterok:123; default: none")
    parser.add_argument("--comment", metavar="TEXT", help="of the Slurm job; default: none")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of a process; default: Slurm's own")
    parser.add_argument("--mem", type=float, metavar="GB", help="memory of a node, GB; default: Slurm's own")
    parser.add_argument(
        "--slurm-extra",
        action="append",
        default=[],
        metavar="K=V",
        help="any other option of sbatch, e.g. reservation=mine; may be given several times",
    )


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job-name", metavar="NAME", help="default: dinov2-PROGRAM")
    parser.add_argument(
        "--output-dir",
        metavar="D",
        help="passed on to the program, %%j becoming the number of the job; logs go to D/jobs, of "
        "runs/%%j to runs/jobs; default: here",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="a job for each value, with the folder D/KEY=A of its own; given for several keys, for each combination",
    )
    parser.add_argument(
        "--array",
        type=int,
        metavar="N",
        help="jobs of a sweep that run at the same time; default: as many as Slurm starts, local: 1",
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="run a copy of the code and of the config file (in D/jobs), so that changing them while the job waits "
        "does not change it; default: no",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and stop")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="wait for a Slurm job, show its log, and end as it ends; local always does",
    )


def check_options(args: argparse.Namespace, *, program: Path, passed_on: Sequence[str]) -> JobOptions:
    """Check the launcher's options, and choose the cluster.

    Args:
        args: as parsed.
        program: that is to run.
        passed_on: the program's own arguments, which say whether it needs GPUs.

    Raises:
        ConfigError: an option is wrong, or there is no Slurm here.
    """
    _check_numbers(args)
    cluster = _choose_cluster(args)
    if cluster != "slurm" and args.nodes > 1:
        raise ConfigError(
            f"--nodes {args.nodes}: --cluster {cluster} has one machine; use --nodes 1, or a Slurm cluster"
        )
    if cluster == "debug" and args.ngpus > 1:
        raise ConfigError(f"--ngpus {args.ngpus}: --cluster debug runs one process; use --ngpus 1, or --cluster local")
    if args.array is not None and not args.sweep:
        raise ConfigError(f"--array {args.array}: says how many jobs of a --sweep run at the same time; there is none")
    slurm = {name: getattr(args, name) for name in _SLURM_OPTIONS if getattr(args, name) is not None}
    if cluster != "slurm" and (slurm or args.slurm_extra):
        given = ", ".join([f"--{name}" for name in slurm] + ["--slurm-extra"] * bool(args.slurm_extra))
        raise ConfigError(f"{given}: only a Slurm cluster knows it, and the job runs with --cluster {cluster}")
    return JobOptions(
        cluster=cluster,
        name=args.job_name or f"dinov2-{program.stem}",
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        timeout_min=args.timeout,
        needs_gpus=device_of(passed_on) != "cpu",
        cpus_per_task=args.cpus_per_task,
        mem_gb=args.mem,
        slurm=slurm,
        slurm_extra=_extras(args.slurm_extra),
        signal_delay_s=args.signal_delay or min(_SIGNAL_DELAY_S, args.timeout * 60 // 2),
        limits=_limits(args, is_training=is_training(program)),
        num_at_once=args.array,
        output_dir=args.output_dir or ".",
        is_dry_run=args.dry_run,
        follows=args.follow,
        takes_snapshot=args.snapshot,
    )


def is_training(program: Path) -> bool:
    """Say whether a program is the training, whose arguments and output folder the launcher knows."""
    return program.resolve() == TRAIN_PROGRAM


def check_training(arguments: Sequence[str], *, num_ranks: int) -> Config:
    """Read the settings of a training as it would itself, so that wrong ones are said before it waits in a queue.

    Args:
        arguments: of the training program.
        num_ranks: processes it will run on.

    Raises:
        ConfigError: the config file, a key or an option is wrong.
    """
    args = parse_arguments(arguments)
    cfg = load_config(args.config_file, args.overrides)
    require_train_dataset(cfg)
    require_trainable(cfg)
    batch_size_per_rank(cfg, world_size=num_ranks)
    return cfg


def device_of(arguments: Sequence[str]) -> str:
    """Find out which device a program with these arguments computes on: auto, cpu or cuda.

    Raises:
        ConfigError: the config file is missing or wrong.
    """
    overrides = [text for text in arguments if text.startswith(_DEVICE)]
    return load_config(_config_file(arguments), overrides).compute_precision.device


def _config_file(arguments: Sequence[str]) -> str | None:
    """Find the config file that a program's arguments name."""
    config_file = None
    for place, text in enumerate(arguments):
        option, equals, value = text.partition("=")
        if option in ("--config-file", "--config"):
            config_file = value if equals else next(iter(arguments[place + 1 :]), None)
    return config_file


def _limits(args: argparse.Namespace, *, is_training: bool) -> Limits:
    max_restarts = args.max_restarts
    if max_restarts is None:
        max_restarts = _MAX_RESTARTS if is_training else 0
    return Limits(max_requeues=args.max_requeues, max_restarts=max_restarts, knows_steps=is_training)


def _check_numbers(args: argparse.Namespace) -> None:
    for option in ("nodes", "ngpus", "timeout", "cpus_per_task", "mem", "signal_delay", "array"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise ConfigError(f"--{option.replace('_', '-')} {value:g}: must be above 0")
    for option in ("max_requeues", "max_restarts"):
        value = getattr(args, option)
        if value is not None and value < 0:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: must be 0 or more")
    if args.signal_delay is not None and args.signal_delay >= args.timeout * 60:
        raise ConfigError(
            f"--signal-delay {args.signal_delay}: is not less than --timeout, {args.timeout * 60} s; give less"
        )


def _choose_cluster(args: argparse.Namespace) -> str:
    has_slurm = shutil.which("sbatch") is not None
    if args.cluster == "auto":
        return "slurm" if has_slurm else "local"
    if args.cluster == "slurm" and not has_slurm and not args.dry_run:
        raise ConfigError(
            "--cluster slurm: there is no sbatch here; submit on a machine of the cluster, or use --cluster local"
        )
    return args.cluster


def _extras(texts: Sequence[str]) -> dict[str, str]:
    extras = {}
    for text in texts:
        key, equals, value = text.removeprefix("--").partition("=")
        if not key or not equals:
            raise ConfigError(f"--slurm-extra {text}: must be an option of sbatch and its value, e.g. reservation=mine")
        extras[key] = value
    return extras
