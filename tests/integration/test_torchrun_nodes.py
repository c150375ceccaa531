"""torchrun on two nodes: two launchers on this machine meet as those of two do, and start again after a kill."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.dist import launch
from support.training import PROGRAM, TINY_RUN, assert_same_state, metrics_of

from dinov2.train.run_state import read_run_state

TIME_LIMIT_S = 400  # for a loaded machine; it takes half a minute
STEPS = 40
LAST = f"model_{STEPS - 1:07d}"
RUN = (
    f"train.OFFICIAL_EPOCH_LENGTH={STEPS}",
    "train.batch_size_per_gpu=6",
    "logging.period_steps=1",
    "checkpointing.period=4",
    "checkpointing.background=false",
)

pytestmark = [pytest.mark.integration, pytest.mark.dist]


@contextlib.contextmanager
def two_nodes(folder, *options, max_restarts):
    """Start a launcher for each node, with one process each; both are ended when this is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=7", f"--max-restarts={max_restarts}"]
    command = [*torchrun, str(PROGRAM), "--output-dir", str(folder), *TINY_RUN, *RUN, *options]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        launchers = []
        for node in range(2):
            log = stack.enter_context((folder.parent / f"launcher_{node}.txt").open("w"))
            launcher = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(end, launcher)
            launchers.append(launcher)
        yield launchers


def end(launcher):
    if launcher.poll() is None:
        launcher.terminate()
        launcher.wait(60)


def logs_of(folder):
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.parent.glob("launcher_*.txt")))


def wait_until(condition, folder):
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, logs_of(folder)
        time.sleep(0.02)


def worker_of(launcher):
    """Return the process that a launcher has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name_ended = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(name_ended[1]) == launcher.pid and b"train.py" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
    raise AssertionError("the launcher has no worker")


@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_worker_is_started_again_and_the_run_is_the_one_that_was_not_interrupted(tmp_path, node):
    folder = tmp_path / "nodes"
    with two_nodes(folder, max_restarts=2) as launchers:
        wait_until(lambda: list(folder.glob("model_*.manifest.json")), folder)
        os.kill(worker_of(launchers[node]), signal.SIGKILL)
        wait_until(lambda: all(launcher.poll() is not None for launcher in launchers), folder)
        assert [launcher.returncode for launcher in launchers] == [0, 0], logs_of(folder)
    found = read_run_state(folder)
    assert (found.state, found.attempts, found.failures) == ("finished", 2, ())
    assert found.began_at and found.began_at % 4 == 0  # after a checkpoint
    assert [row["iteration"] for row in metrics_of(folder)] == list(range(STEPS))
    sentence = r"error: rank [01]: rank [01] \(process \d+ on .*\) has ended without a word"
    assert len(re.findall(sentence, logs_of(folder))) == 1

    command = [str(PROGRAM), "--output-dir", str(tmp_path / "whole"), *TINY_RUN, *RUN]
    whole = launch(command, timeout_s=TIME_LIMIT_S)
    assert whole.returncode == 0, whole.stderr
    assert_same_state(tmp_path / "whole", folder, name=LAST, num_ranks=2)


def test_an_error_at_the_same_step_is_tried_three_times(tmp_path):
    """The learning rate makes every loss infinite: the program ends the run itself, and torchrun starts it again."""
    folder = tmp_path / "nodes"
    with two_nodes(folder, "optim.base_lr=1e30", "optim.clip_grad=0", max_restarts=3) as launchers:
        wait_until(lambda: all(launcher.poll() is not None for launcher in launchers), folder)
        assert all(launcher.returncode == 1 for launcher in launchers), logs_of(folder)
    found = read_run_state(folder)
    assert (found.state, found.attempts, len(found.failures)) == ("failed", 3, 3)
    assert "the last 3 starts failed at the same step and another one would too" in logs_of(folder)
