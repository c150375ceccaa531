"""Show how the runs below some folders are doing: state, step, loss, k-NN, speed, time left.

    python run/status.py outputs
    python run/status.py runs/sweep runs/first --watch 10
    python run/status.py outputs --json

It only reads, at any time and from any machine that sees the folders.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dinov2.logging import run_program
from dinov2.run.checkpoint_files import format_columns, format_plural
from dinov2.run.status_runs import STATES, RunStatus, find_runs, read_status

_HEADER = ["run", "state", "step", "loss", "k-NN %", "images/s", "left", "silent", "starts", "job"]
_UNKNOWN = "-"
_CLEAR = "\x1b[H\x1b[2J\x1b[3J"  # the terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Show what the command line asks for; returns the exit code (0 shown, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="status.py",
        description="Show how training runs are doing.",
        epilog="States: running; finished, all steps are done; stopped, saved on request, the same command goes on; "
        "failed, by the error that is shown; dead, ended without a word (killed, out of memory, its machine lost). "
        "Loss and images/s are means over the last 50 steps; k-NN % is the accuracy at the start and now; left is the "
        "time to the last step, evaluations not counted; silent is the time since the run last wrote something.",
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="output directory of a run, or a folder above several"
    )
    parser.add_argument(
        "--watch", type=_seconds, metavar="S", help="show it again every S seconds, until Ctrl-C; default: once"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list; default: a table")
    return parser


def format_runs(runs: Sequence[RunStatus]) -> str:
    """Lay runs out as a table, problems and a count of the states below it."""
    rows = [_HEADER, *(_cells(run) for run in runs)]
    problems = [f"{run.folder}: {run.state} {run.problem}" for run in runs if run.problem]
    counts = Counter(run.state for run in runs)
    counted = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    parts = [format_columns(rows), "\n".join(problems), f"{format_plural(len(runs), 'run')}: {counted}"]
    return "\n\n".join(filter(None, parts))


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_args(argv)
    folders = [Path(folder).expanduser() for folder in args.folders]
    if args.watch is None:
        print(_describe(folders, as_json=args.json))
        return 0
    try:
        while True:
            shown = _describe(folders, as_json=args.json)
            print(f"{_CLEAR if sys.stdout.isatty() else ''}{shown}", flush=True)
            time.sleep(args.watch)
    except KeyboardInterrupt:  # how watching ends
        return 0


def _describe(folders: Sequence[Path], *, as_json: bool) -> str:
    runs = [read_status(folder) for folder in find_runs(folders)]
    if as_json:
        return json.dumps([asdict(run) for run in runs], indent=2)
    return format_runs(runs) if runs else f"no runs in or below {', '.join(map(str, folders))}"


def _cells(run: RunStatus) -> list[str]:
    if run.step is None and run.total_steps is None:
        step = _UNKNOWN
    else:
        step = f"{run.step or 0}" if run.total_steps is None else f"{run.step or 0}/{run.total_steps}"
    knn = _number(run.knn_pct, ".2f")
    if run.knn_start_pct is not None:
        knn = f"{run.knn_start_pct:.2f} -> {knn}"
    return [
        run.folder,
        run.state,
        step,
        _number(run.loss, ".4f"),
        knn,
        _number(run.images_per_s, ".0f"),
        _time(run.eta_s),
        _time(run.silent_s),
        _number(run.attempts, "d"),
        run.job or _UNKNOWN,
    ]


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    """Write a time for people, in its two largest units: `2 d 3 h`, `5 min 12 s`."""
    if seconds is None:
        return _UNKNOWN
    total = round(seconds)
    for large, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if total >= size:
            return f"{total // size} {large} {total % size // part} {small}"
    return f"{total} s"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
