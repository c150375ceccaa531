"""The launcher against a real Slurm: two virtual nodes on this machine, each as large as the tests need.

The runs train on two processes over gloo and are compared, bit for bit, with one that nothing happened to. One of them
runs into its time limit, which takes Slurm a while: it goes on beside the other tests, and is looked at last.
"""

import re
import sys
import time

import pytest
from support.launched_run import LAUNCHER, PATIENCE_S, ROOT, STEPS, LaunchedRun
from support.slurm_cluster import SlurmCluster, processes_with, why_no_cluster
from support.training import TINY_RUN

from dinov2.run.status_runs import find_runs, read_status

pytestmark = [pytest.mark.integration, pytest.mark.dist]

TWO_NODES = ("--nodes", "2", "--ngpus", "1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
ENDS_WITHIN_S = 120  # the other ranks, when one has died, and a cancelled job


class Slurm:
    """A cluster, and the launcher beside it."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def launch(self, *arguments):
        """Call the launcher; returns what it prints."""
        command = [sys.executable, LAUNCHER, "--cluster", "slurm", *arguments]
        result = self.cluster.run(*command, cwd=self.folder, timeout_s=PATIENCE_S)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    def submit(self, run, *options):
        """Submit a run; returns the number of the job."""
        printed = self.launch("--output-dir", run.folder, "--timeout", "60", *options, *run.arguments())
        return re.match(r"job (\d+):", printed)[1]

    def wait_for_end(self, run, job):
        run.wait_until(lambda: self.cluster.state(job) in ENDED, what=f"job {job} ends")

    def is_gone(self, job):
        """Say whether no process of a job is left."""
        wanted = {"SLURM_JOB_ID": job, "SLURM_CONF": self.cluster.configuration}
        return not processes_with(wanted, program="train.py")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := why_no_cluster():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield Slurm(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def time_limited(slurm):
    """A run that is too slow for its time limit, and its job."""
    run = LaunchedRun(slurm.folder / "time_limited").slow_down(step_s=2)
    return run, slurm.submit(run, *TWO_NODES, "--timeout", "3", "--signal-delay", "100")


@pytest.fixture(scope="module")
def straight(slurm, time_limited):
    """A run to which nothing happens, on two nodes; and its job."""
    run = LaunchedRun(slurm.folder / "straight")
    job = slurm.submit(run, *TWO_NODES)
    slurm.wait_for_end(run, job)
    return run, job


def test_two_nodes_compute_what_two_processes_of_one_node_compute(slurm, straight):
    run, job = straight
    assert slurm.cluster.state(job) == "COMPLETED"
    assert slurm.cluster.detail(job, "NumNodes") == "2"
    assert run.status().step == STEPS and run.status().job == job

    on_one = LaunchedRun(slurm.folder / "one_node")
    printed = slurm.launch("--output-dir", on_one.folder, "--ngpus", "2", "--follow", *on_one.arguments())
    job = re.match(r"job (\d+):", printed)[1]
    assert f"step={STEPS} loss=" in printed and printed.splitlines()[-1] == f"job {job}: done"
    assert slurm.cluster.detail(job, "NumNodes") == "1"
    on_one.assert_same_as(run)


def test_slurm_accepts_the_script_that_a_dry_run_shows(slurm):
    run = LaunchedRun(slurm.folder / "dry")
    known = slurm.cluster.ask("squeue", "--noheader", "--states=all", "--format=%i")
    options = ["--partition", "low", "--comment", "a dry run", "--mem", "1", "--slurm-extra", "nice=5"]
    script = slurm.launch("--output-dir", run.folder, "--dry-run", *TWO_NODES, *options, *run.arguments())
    assert not run.folder.exists()
    assert slurm.cluster.ask("squeue", "--noheader", "--states=all", "--format=%i") == known
    path = slurm.folder / "shown.sh"
    path.write_text(script)
    tried = slurm.cluster.run("sbatch", "--test-only", path, cwd=slurm.folder)
    assert tried.returncode == 0 and "using 2 processors on nodes node[1-2]" in tried.stderr, tried.stderr


def test_a_run_whose_job_is_cancelled_ends_and_can_be_submitted_again(slurm, straight):
    run = LaunchedRun(slurm.folder / "cancelled").slow_down()
    job = slurm.submit(run, *TWO_NODES)
    run.catch()
    slurm.cluster.ask("scancel", job)
    run.wait_until(lambda: slurm.is_gone(job), what=f"job {job} is gone", timeout_s=ENDS_WITHIN_S)
    slurm.wait_for_end(run, job)
    assert slurm.cluster.state(job) == "CANCELLED"
    assert slurm.cluster.restarts(job) == 0
    assert run.status().state == "stopped"

    run.hurry()
    slurm.wait_for_end(run, slurm.submit(run, *TWO_NODES))
    run.assert_same_as(straight[0])


def test_a_run_that_loses_a_process_goes_on_from_its_last_checkpoint(slurm, straight):
    run = LaunchedRun(slurm.folder / "killed").slow_down()
    job = slurm.submit(run, *TWO_NODES, "--max-restarts", "2")
    run.catch()
    slurm.cluster.kill_task(job, rank=1, program="train.py")
    run.hurry()
    killed_s = time.monotonic()
    run.wait_until(lambda: run.attempts(), what="the attempt ends", timeout_s=ENDS_WITHIN_S)
    assert time.monotonic() - killed_s < ENDS_WITHIN_S
    slurm.wait_for_end(run, job)
    assert slurm.cluster.state(job) == "COMPLETED"
    first, second = run.attempts()
    assert (first["code"], first["rank"], first["host"], first["verdict"]) == (137, 1, "node2", "restarted")
    assert second["verdict"] == "finished"
    run.assert_same_as(straight[0])


def test_a_run_gives_way_to_another_job_and_comes_back(slurm, straight):
    run = LaunchedRun(slurm.folder / "preempted").slow_down()
    job = slurm.submit(run, *TWO_NODES, "--partition", "low", "--cpus-per-task", "2")
    run.catch()
    slurm.cluster.ask("sbatch", "--nodes=2", "--ntasks-per-node=3", "--output=/dev/null", "--wrap=sleep 1")
    run.wait_until(lambda: slurm.cluster.state(job) != "RUNNING", what=f"job {job} gives way", timeout_s=ENDS_WITHIN_S)
    run.hurry()
    slurm.wait_for_end(run, job)
    assert slurm.cluster.state(job) == "COMPLETED"
    assert slurm.cluster.restarts(job) == 1
    first, second = run.attempts()
    assert (first["code"], first["verdict"], first["at_time_limit"]) == (0, "requeued", False)
    assert second["verdict"] == "finished"
    run.assert_same_as(straight[0])


def test_a_sweep_is_an_array_of_jobs_each_in_its_folder(slurm):
    folder = slurm.folder / "sweep"
    sweep = ["--sweep", "optim.base_lr=1e-3,5e-4", "--ngpus", "1", "--timeout", "60", "--output-dir", folder]
    printed = slurm.launch(*sweep, *TINY_RUN, "train.max_steps=2")
    (array,) = set(re.findall(r"\b(\d+)_[01]\b", printed))
    jobs = [f"{array}_0", f"{array}_1"]
    LaunchedRun(folder).wait_until(
        lambda: all(slurm.cluster.state(job) in ENDED for job in jobs), what=f"jobs {jobs} end"
    )
    runs = [read_status(run) for run in find_runs([folder])]
    assert [run.state for run in runs] == ["finished", "finished"]
    assert {run.folder for run in runs} == {f"{folder}/optim.base_lr=1e-3", f"{folder}/optim.base_lr=5e-4"}
    assert {run.job for run in runs} == set(jobs)
    shown = slurm.cluster.run(sys.executable, ROOT / "run" / "status.py", folder, cwd=slurm.folder)
    assert shown.stdout.splitlines()[-1] == "2 runs: 2 finished"


def test_a_run_at_its_time_limit_is_requeued_and_ends_as_if_it_had_none(slurm, time_limited, straight):
    run, job = time_limited
    run.wait_until(
        lambda: run.was_stopped_in_the_middle() or slurm.cluster.state(job) in ENDED,
        what=f"job {job} is stopped at its time limit",
    )
    run.hurry()
    slurm.wait_for_end(run, job)
    assert slurm.cluster.state(job) == "COMPLETED"
    *stopped, last = run.attempts()
    assert {(attempt["verdict"], attempt["at_time_limit"]) for attempt in stopped} == {("requeued", True)}
    assert last["verdict"] == "finished" and last["progress"]["began_at"] > 0
    assert slurm.cluster.restarts(job) == len(stopped)
    run.assert_same_as(straight[0])
