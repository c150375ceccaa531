"""Run a test function on several gloo processes and hand back what each rank returned.

The function lives at the top level of a test file, is called as `function(**args)` on every rank with the process
group up, and returns what `torch.load(weights_only=True)` reads: tensors, numbers, strings, lists, dicts.

Importing PyTorch takes most of such a test, so the ranks are forked from one fresh process that has imported it;
`launcher="torchrun"` uses torchrun itself.
"""

import argparse
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.fork_server import ForkedRanks

TESTS = Path(__file__).resolve().parent.parent


def run_distributed(
    function: Callable[..., Any] | str,
    *,
    num_processes: int = 2,
    args: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    launcher: str = "fork",
    timeout_s: float = 120,
) -> list[Any]:
    """Run `function` on every rank and return the ranks' results in order.

    Args:
        function: a top-level function of a test file, or "path/from/tests/test_file.py:function".
        num_processes: ranks, all on this machine.
        args: keyword arguments, as JSON can hold them.
        env: further environment variables.
        launcher: fork, or torchrun.
        timeout_s: all ranks are killed after this time.

    Raises:
        AssertionError: a rank failed or did not end; the message holds what the ranks wrote.
    """
    file, name = _locate(function)
    with tempfile.TemporaryDirectory() as folder:
        command = _command(file, name, args=args, out=folder)
        if launcher == "torchrun":
            process = launch(command, num_processes=num_processes, env=env, log_dir=folder, timeout_s=timeout_s)
        else:
            command = [sys.executable, *command, "--num-processes", str(num_processes)]
            process = _run(command, env=env, log_dir=folder, timeout_s=timeout_s)
        if process.returncode != 0:
            raise AssertionError(f"{name} failed on {num_processes} processes\n{_rank_logs(folder)}\n{process.stderr}")
        paths = [Path(folder) / f"rank_{rank}.pt" for rank in range(num_processes)]
        return [torch.load(path, weights_only=True) for path in paths]


def run_alone(function: Callable[..., Any], *, args: dict[str, Any] | None = None, timeout_s: float = 120) -> Any:
    """Run `function` in one fresh process, without a process group, and return its result; it may fork ranks itself.

    Args:
        function: a top-level function of a test file.
        args: keyword arguments, as JSON can hold them.
        timeout_s: the process is ended after this time.

    Raises:
        AssertionError: it failed or did not end; the message holds what it wrote.
    """
    file, name = _locate(function)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *_command(file, name, args=args, out=folder), "--alone"]
        process = _run(command, env=None, log_dir=folder, timeout_s=timeout_s)
        if process.returncode != 0:
            raise AssertionError(f"{name} failed\n{process.stdout}\n{process.stderr}")
        return torch.load(Path(folder) / "rank_0.pt", weights_only=True)


def launch(
    command: list[str],
    *,
    num_processes: int = 2,
    env: dict[str, str] | None = None,
    log_dir: str | None = None,
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script with arguments under torchrun on a free port; returns once all ranks have ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    if log_dir is not None:
        torchrun += ["--log_dir", log_dir, "--redirects", "3"]
    return _run([*torchrun, *command], env=env, log_dir=log_dir, timeout_s=timeout_s)


def _command(file: Path, function: str, *, args: dict[str, Any] | None, out: str) -> list[str]:
    return [__file__, "--file", str(file), "--function", function, "--args", json.dumps(args or {}), "--out", out]


def _run(
    command: list[str], *, env: dict[str, str] | None, log_dir: str | None, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)} | (env or {})
    process = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # all launchers end their ranks then
        stdout, stderr = process.communicate()
        logs = _rank_logs(log_dir) if log_dir is not None else ""
        raise AssertionError(f"{command} did not end within {timeout_s} s\n{logs}\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _locate(function: Callable[..., Any] | str) -> tuple[Path, str]:
    if isinstance(function, str):
        file, name = function.rsplit(":", 1)
        return TESTS / file, name
    return Path(function.__code__.co_filename), function.__name__


def _rank_logs(folder: str) -> str:
    parts = [f"--- {path.parent.name}/{path.name}\n{path.read_text()}" for path in Path(folder).rglob("*std*.log")]
    return "\n".join(sorted(parts))


def _run_rank(function: Callable[..., Any], options: argparse.Namespace) -> int:
    from dinov2 import distributed

    environment = distributed.init("cpu", timeout_s=60)
    result = function(**json.loads(options.args))
    torch.save(result, Path(options.out) / f"rank_{environment.rank}.pt")
    distributed.shutdown()
    return 0


def _fork_ranks(function: Callable[..., Any], options: argparse.Namespace) -> int:
    """Fork the ranks, and end all as soon as one fails or this process is told to."""
    run = functools.partial(_run_rank, function, options)
    with ForkedRanks(run, num_processes=options.num_processes, log_dir=Path(options.out)) as ranks:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return 0 if ranks.end_with_the_first_failure() else 1


def _main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("--file", "--function", "--args", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("--num-processes", type=int, help="fork so many ranks; torchrun has started them otherwise")
    parser.add_argument("--alone", action="store_true", help="there are no ranks")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("distributed_test", options.file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_test"] = module
    spec.loader.exec_module(module)
    function = getattr(module, options.function)
    if options.num_processes:
        return _fork_ranks(function, options)
    if options.alone:
        torch.save(function(**json.loads(options.args)), Path(options.out) / "rank_0.pt")
        return 0
    return _run_rank(function, options)


if __name__ == "__main__":
    raise SystemExit(_main())
