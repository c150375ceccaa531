"""Options of the launcher: what it keeps for itself, and what it passes on to the program."""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.configs import load_config
from dinov2.errors import ConfigError

CLUSTERS = ("auto", "slurm", "local", "debug")
_DEVICE = "compute_precision.device="
_SLURM_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "comment")  # the same for sbatch


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
    slurm: dict[str, str]  # sbatch option: value
    slurm_extra: dict[str, str]  # the same, which submitit does not know
    output_dir: str  # may hold %j, for the number of the job
    is_dry_run: bool
    follows: bool

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
    parser.add_argument("--timeout", type=int, default=1440, metavar="MIN", help="longest time, minutes; default: 1440")
    parser.add_argument("--partition", metavar="P", help="of the Slurm cluster; default: its own")
    parser.add_argument("--account", metavar="A", help="charged by Slurm; default: your own")
    parser.add_argument("--qos", metavar="Q", help="quality of service of Slurm; default: its own")
    parser.add_argument("--constraint", metavar="C", help="features of a node that Slurm must find; default: none")
    parser.add_argument("--exclude", metavar="NODES", help="nodes that Slurm must not take; default: none")
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
    parser.add_argument("--job-name", metavar="NAME", help="default: dinov2-PROGRAM")
    parser.add_argument(
        "--output-dir",
        metavar="D",
        help="passed on to the program, %%j becoming the number of the job; logs go to D/jobs, of "
        "runs/%%j to runs/jobs; default: here",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and stop")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="wait for a Slurm job, show its log, and end as it ends; local always does",
    )
    return parser


def check_options(args: argparse.Namespace, *, program: Path, passed_on: Sequence[str]) -> JobOptions:
    """Check the launcher's options, and choose the cluster.

    Args:
        args: as parsed.
        program: that is to run.
        passed_on: the program's own arguments, which say whether it needs GPUs.

    Raises:
        ConfigError: an option is wrong, or there is no Slurm here.
    """
    for option in ("nodes", "ngpus", "timeout", "cpus_per_task", "mem"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise ConfigError(f"--{option.replace('_', '-')} {value:g}: must be above 0")
    cluster = _choose_cluster(args)
    if cluster != "slurm" and args.nodes > 1:
        raise ConfigError(
            f"--nodes {args.nodes}: --cluster {cluster} has one machine; use --nodes 1, or a Slurm cluster"
        )
    if cluster == "debug" and args.ngpus > 1:
        raise ConfigError(f"--ngpus {args.ngpus}: --cluster debug runs one process; use --ngpus 1, or --cluster local")
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
        output_dir=args.output_dir or ".",
        is_dry_run=args.dry_run,
        follows=args.follow,
    )


def device_of(arguments: Sequence[str]) -> str:
    """Find out which device a program with these arguments computes on: auto, cpu or cuda.

    Raises:
        ConfigError: the config file is missing or wrong.
    """
    config_file = None
    for place, text in enumerate(arguments):
        option, equals, value = text.partition("=")
        if option in ("--config-file", "--config"):
            config_file = value if equals else next(iter(arguments[place + 1 :]), None)
    overrides = [text for text in arguments if text.startswith(_DEVICE)]
    return load_config(config_file, overrides).compute_precision.device


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
