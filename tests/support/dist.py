"""Run a test function on several gloo processes and hand back what each rank returned.

The function lives at the top level of a test file, is called as `function(**args)` on every rank with the process
group up, and returns what `torch.load(weights_only=True)` reads: tensors, numbers, strings, lists, dicts.

Importing PyTorch takes most of such a test, so the ranks are forked from one fresh process that has imported it, with
the environment variables that torchrun would set; `launcher="torchrun"` uses torchrun itself.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
        command = [__file__, "--file", str(file), "--function", name, "--args", json.dumps(args or {})]
        command += ["--out", folder]
        if launcher == "torchrun":
            process = launch(command, num_processes=num_processes, env=env, log_dir=folder, timeout_s=timeout_s)
        else:
            command = [sys.executable, *command, "--num-processes", str(num_processes)]
            process = _run(command, env=env, log_dir=folder, timeout_s=timeout_s)
        if process.returncode != 0:
            raise AssertionError(f"{name} failed on {num_processes} processes\n{_rank_logs(folder)}\n{process.stderr}")
        paths = [Path(folder) / f"rank_{rank}.pt" for rank in range(num_processes)]
        return [torch.load(path, weights_only=True) for path in paths]


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
        process.terminate()  # both launchers end their ranks then
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


def _run_rank(function: Callable[..., Any], options: argparse.Namespace) -> None:
    from dinov2 import distributed

    environment = distributed.init("cpu", timeout_s=60)
    result = function(**json.loads(options.args))
    torch.save(result, Path(options.out) / f"rank_{environment.rank}.pt")
    distributed.shutdown()


def _fork_ranks(function: Callable[..., Any], options: argparse.Namespace) -> int:
    """Fork the ranks, serve their meeting point, and end all as soon as one fails."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first optimiser imports much; once is enough
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    os.environ |= {
        "WORLD_SIZE": str(options.num_processes),
        "LOCAL_WORLD_SIZE": str(options.num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process serves the store, rank 0 does not
    }
    pids = [_fork_rank(rank, function, options) for rank in range(options.num_processes)]
    signal.signal(signal.SIGTERM, lambda *_: [_kill(pid) for pid in pids])
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach())
    failed = 0
    for _ in pids:
        failed_now = os.waitstatus_to_exitcode(os.wait()[1])
        if failed_now and not failed:
            failed = 1
            for pid in pids:
                _kill(pid)
    del store
    return failed


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _fork_rank(rank: int, function: Callable[..., Any], options: argparse.Namespace) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    log = os.open(Path(options.out) / f"rank_{rank}.std.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        _run_rank(function, options)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("--file", "--function", "--args", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("--num-processes", type=int, help="fork so many ranks; torchrun has started them otherwise")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("distributed_test", options.file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_test"] = module
    spec.loader.exec_module(module)
    function = getattr(module, options.function)
    if options.num_processes:
        return _fork_ranks(function, options)
    _run_rank(function, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
