"""Look at the checkpoints of runs, verify, convert and compare them, without a GPU and without starting processes.

    python run/checkpoint.py list RUN
    python run/checkpoint.py verify CHECKPOINT ...
    python run/checkpoint.py inspect CHECKPOINT
    python run/checkpoint.py consolidate CHECKPOINT --output teacher_checkpoint.pth
    python run/checkpoint.py reshard CHECKPOINT --ranks 2 --output-dir D
    python run/checkpoint.py diff A B

Nothing in a checkpoint is ever executed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dinov2.errors import CheckpointError
from dinov2.fsdp.wrap import STRATEGIES
from dinov2.logging import run_program, setup_logging
from dinov2.run.checkpoint_consolidate import NETWORKS, consolidate
from dinov2.run.checkpoint_diff import compare, format_differences, open_sides
from dinov2.run.checkpoint_files import CHECKPOINT_HELP, format_plural, open_stored
from dinov2.run.checkpoint_inspect import describe, format_description
from dinov2.run.checkpoint_list import format_list, list_checkpoints
from dinov2.run.checkpoint_reshard import reshard
from dinov2.run.checkpoint_verify import checkpoints_of, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code (0 done, 1 failed, damaged or different, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the commands and their options."""
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description="Look at checkpoints of runs, verify, convert and compare them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the checkpoints of a run: iterations, sizes, which are complete")
    listing.add_argument("folder", metavar="RUN", help="output directory of the run")
    verifying = commands.add_parser(
        "verify",
        help="compare every byte with the checksums",
        epilog="exit code: 0 all sound; 1 something is damaged or missing, which is named; 2 bad usage",
    )
    verifying.add_argument(
        "paths",
        metavar="CHECKPOINT",
        nargs="+",
        help="RUN/model_0003749, one of its rank files, its manifest, or the folder RUN, which means all in it",
    )
    inspecting = commands.add_parser("inspect", help="what a checkpoint holds: settings, modules, optimiser groups")
    inspecting.add_argument("path", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    inspecting.add_argument(
        "--depth", type=_positive, default=2, metavar="N", help="parts of a name that make a module; default: 2"
    )
    for command in (listing, inspecting):
        command.add_argument("--json", action="store_true", help="print JSON; default: a table")
    _add_consolidate(commands.add_parser("consolidate", help="put the networks together into one file of weights"))
    _add_reshard(commands.add_parser("reshard", help="write the whole state anew for another number of ranks"))
    _add_diff(
        commands.add_parser(
            "diff",
            help="compare two checkpoints: tensors, settings that alter results, optimisers",
            epilog="exit code, as of diff(1): 0 equal; 1 different; 2 trouble (bad usage, or one cannot be read)",
        )
    )
    return parser


def _add_consolidate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT", help=f"{CHECKPOINT_HELP}; or a DCP folder of DINOv3")
    parser.add_argument(
        "--output", metavar="F", required=True, help="file; .pth as training writes it, or .safetensors"
    )
    parser.add_argument("--network", choices=NETWORKS, default="teacher", help="which one; default: teacher")
    parser.add_argument(
        "--backbone-only",
        action="store_true",
        help="no heads, and bare names as in the released backbones; default: with heads",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists; default: refuse")


def _add_reshard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument("--ranks", type=_positive, required=True, metavar="V", help="number of rank files")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="sharding strategy that it is written under; default: as it was"
    )
    parser.add_argument("--output-dir", metavar="D", required=True, help="folder, made if it is not there")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint of the same name there; default: refuse"
    )


def _add_diff(parser: argparse.ArgumentParser) -> None:
    for name, metavar in (("first", "A"), ("second", "B")):
        parser.add_argument(
            name,
            metavar=metavar,
            help="checkpoint, folder of a run (the newest in it), or weights that training can start from",
        )
    parser.add_argument("--json", action="store_true", help="print JSON; default: a table")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_args(argv)
    setup_logging(None, rank=0)
    return _COMMANDS[args.command](args)


def _list(args: argparse.Namespace) -> int:
    print(format_list(list_checkpoints(Path(args.folder).expanduser()), as_json=args.json))
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = [place for path in args.paths for place in checkpoints_of(path)]
    num_damaged = 0
    for folder, name in found:
        what, problems = verify(folder, name)
        print("\n".join(f"{folder}/{problem}" for problem in problems) or f"{folder}/{what}: sound")
        num_damaged += bool(problems)
    if num_damaged:
        raise CheckpointError(f"{num_damaged} of {format_plural(len(found), 'checkpoint')} not sound")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    found = describe(open_stored(args.path), depth=args.depth)
    print(json.dumps(found, indent=2, default=str) if args.json else format_description(found))
    return 0


def _consolidate(args: argparse.Namespace) -> int:
    options = {"network": args.network, "backbone_only": args.backbone_only, "overwrite": args.overwrite}
    print(consolidate(args.path, args.output, **options))
    return 0


def _reshard(args: argparse.Namespace) -> int:
    options = {"num_ranks": args.ranks, "strategy": args.strategy, "overwrite": args.overwrite}
    print(reshard(args.path, args.output_dir, **options))
    return 0


def _diff(args: argparse.Namespace) -> int:
    first, second = open_sides(args.first, args.second)
    differences = list(compare(first, second))
    num_tensors = len(first.tensors.keys() & second.tensors.keys())
    print(format_differences(differences, num_tensors=num_tensors, as_json=args.json))
    return int(bool(differences))


_COMMANDS = {
    "list": _list,
    "verify": _verify,
    "inspect": _inspect,
    "consolidate": _consolidate,
    "reshard": _reshard,
    "diff": _diff,
}
