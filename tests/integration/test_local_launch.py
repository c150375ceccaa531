"""The launcher on this machine: whatever happens to a run on the way, it ends as if nothing had.

The runs train on two processes over gloo and are compared, bit for bit, with one that nothing happened to.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest
from support.launched_run import LAUNCHER, PATIENCE_S, LaunchedRun
from support.slurm_cluster import PYTHONPATH, processes_with
from support.training import TINY_RUN

from dinov2.run.status_runs import find_runs, read_status

pytestmark = [pytest.mark.integration, pytest.mark.dist]


@contextlib.contextmanager
def launched(*arguments, cwd):
    """Call the launcher, which waits for its job, from a folder of the user's own; its output is read from a pipe."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    variables |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, LAUNCHER, "--cluster", "local", *map(str, arguments)],
        cwd=cwd,
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # twice: it tells its job to end, and waits no longer
        process.send_signal(signal.SIGINT)
        process.communicate()


def launch(run, *options):
    return launched("--ngpus", "2", "--output-dir", run.folder, *options, *run.arguments(), cwd=run.folder.parent)


def printed_by(process):
    """Wait for the end of the launcher; returns what it printed once it has succeeded."""
    out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, f"{out}\n{error}"
    return out


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run to which nothing happens."""
    run = LaunchedRun(tmp_path_factory.mktemp("local") / "straight")
    with launch(run) as process:
        printed = printed_by(process)
    job = re.match(r"job (\d+): 2 process", printed)[1]
    assert printed.splitlines()[-1] == f"job {job}: done"
    return run


def test_a_run_at_its_time_limit_starts_again_and_ends_as_if_it_had_none(straight):
    run = LaunchedRun(straight.folder.with_name("time_limited")).slow_down(step_s=1.2)
    with launch(run, "--timeout", "2", "--signal-delay", "70") as process:
        run.wait_until(run.was_stopped_in_the_middle, what="it is stopped at its time limit")
        run.hurry()
        printed = printed_by(process)
    *stopped, last = run.attempts()
    assert {(attempt["verdict"], attempt["at_time_limit"]) for attempt in stopped} == {("requeued", True)}
    assert last["verdict"] == "finished" and last["progress"]["began_at"] > 0
    assert "stopped by SIGUSR2 (time limit)" in printed
    run.assert_same_as(straight)


def test_a_run_that_loses_a_process_goes_on_from_its_last_checkpoint(straight):
    run = LaunchedRun(straight.folder.with_name("killed")).slow_down()
    with launch(run) as process:
        run.catch()
        (killed,) = processes_with({"RANK": "1"}, program="train.py", argument=str(run.folder))
        os.kill(killed, signal.SIGKILL)
        run.hurry()
        printed_by(process)
    first, second = run.attempts()
    assert (first["code"], first["rank"], first["verdict"]) == (137, 1, "restarted")
    assert second["verdict"] == "finished" and second["progress"]["began_at"] > 0
    run.assert_same_as(straight)


def test_a_run_that_is_interrupted_saves_and_can_be_launched_again(straight):
    run = LaunchedRun(straight.folder.with_name("interrupted")).slow_down()
    with launch(run) as process:
        run.catch()
        process.send_signal(signal.SIGINT)
        printed = printed_by(process)
    assert printed.splitlines()[-1].endswith("; submit again to go on")
    assert not processes_with({}, program="train.py", argument=str(run.folder))
    assert run.status().state == "stopped"
    run.hurry()
    with launch(run) as process:
        printed_by(process)
    run.assert_same_as(straight)


def test_a_sweep_runs_each_of_its_runs_in_its_folder(tmp_path):
    folder = tmp_path / "sweep"
    sweep = ["--sweep", "optim.base_lr=1e-3,5e-4", "--array", "2", "--output-dir", folder]
    with launched(*sweep, *TINY_RUN, "train.max_steps=2", cwd=tmp_path) as process:
        printed_by(process)
    runs = [read_status(run) for run in find_runs([folder])]
    assert {run.folder for run in runs} == {f"{folder}/optim.base_lr=1e-3", f"{folder}/optim.base_lr=5e-4"}
    assert [(run.state, run.step) for run in runs] == [("finished", 2)] * 2
