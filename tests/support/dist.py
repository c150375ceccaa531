"""Run a test function under torchrun on several gloo processes and hand back what each rank returned.

The function lives at the top level of a test file, is called as `function(**args)` on every rank with the process
group up, and returns what `torch.load(weights_only=True)` reads: tensors, numbers, strings, lists, dicts.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
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
    timeout_s: float = 120,
) -> list[Any]:
    """Run `function` on every rank and return the ranks' results in order.

    Args:
        function: a top-level function of a test file, or "path/from/tests/test_file.py:function".
        num_processes: ranks, all on this machine.
        args: keyword arguments, as JSON can hold them.
        env: further environment variables.
        timeout_s: all ranks are killed after this time.

    Raises:
        AssertionError: a rank failed or did not end; the message holds what the ranks wrote to stderr.
    """
    file, name = _locate(function)
    with tempfile.TemporaryDirectory() as folder:
        process = launch(
            [__file__, "--file", str(file), "--function", name, "--args", json.dumps(args or {}), "--out", folder],
            num_processes=num_processes,
            env=env,
            log_dir=folder,
            timeout_s=timeout_s,
        )
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
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)} | (env or {})
    process = subprocess.Popen(
        [*torchrun, *command], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its workers
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
    parts = [f"--- {path.parent.name}/{path.name}\n{path.read_text()}" for path in Path(folder).rglob("std*.log")]
    return "\n".join(sorted(parts))


def _main() -> None:
    from dinov2 import distributed

    parser = argparse.ArgumentParser()
    for option in ("--file", "--function", "--args", "--out"):
        parser.add_argument(option, required=True)
    options = parser.parse_args()
    environment = distributed.init("cpu", timeout_s=60)
    spec = importlib.util.spec_from_file_location("distributed_test", options.file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_test"] = module
    spec.loader.exec_module(module)
    result = getattr(module, options.function)(**json.loads(options.args))
    torch.save(result, Path(options.out) / f"rank_{environment.rank}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    _main()
