"""What follows in the script of a Slurm job after srun: what Slurm says, and what the ranks have left, decide."""

import json
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from dinov2.run import submit_after
from dinov2.run.submit_attempts import Limits, Record
from dinov2.run.submit_job import ProgramJob, RankEnd

SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" >> requeued; cat refusal >&2 2>/dev/null && exit 1; exit 0; fi
echo "JobId=12 JobName=x UserId=me(1) Nice=0 $(cat facts)"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job 12 that has ended its srun, and an `scontrol` that answers as the test says."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(SCONTROL)
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    job = ProgramJob(
        program=tmp_path / "train.py",
        arguments=(),
        output_dir="runs/%j",
        run_dir="runs/%j",
        folder=tmp_path,
        limits=Limits(max_requeues=5, max_restarts=2, knows_steps=True),
        timeout_s=3600.0,
        signal_delay_s=120.0,
    )
    (tmp_path / "jobs").mkdir()
    (tmp_path / "runs" / "12").mkdir(parents=True)
    DelayedSubmission(job).dump(tmp_path / "jobs" / "12_submitted.pkl")
    return tmp_path / "jobs"


def facts(state="RUNNING", *, reason="None", left_min=30.0, preempted="None"):
    end = (datetime.now() + timedelta(minutes=left_min)).isoformat(timespec="seconds")
    times = f"StartTime=2026-01-01T00:00:00 EndTime={end} PreemptTime={preempted}"
    Path("facts").write_text(f"JobState={state} Reason={reason} {times}")


def rank_ended(folder, rank, *, code=0, stopped_by=None, ended=0.0, restarts="0"):
    end = RankEnd(rank=rank, host=f"node{rank}", code=code, stopped_by=stopped_by, ended=ended, restarts=restarts)
    RankEnd.path(folder, "12", rank).write_text(json.dumps(asdict(end)))


def training_says(state, step):
    Path("runs/12/run_state.json").write_text(json.dumps({"state": state, "iteration": step - 1, "began_at": 0}))


def conclude(folder, code):
    """Run the program of the script; returns its exit code and the last attempt."""
    result = submit_after.main([str(folder), str(code)])
    assert not list(folder.glob("*_ended.json"))  # nothing stays for the next attempt
    return result, Record.open(folder, "12").attempts[-1]


def was_requeued():
    return Path("requeued").read_text().split() if Path("requeued").exists() else []


def test_a_job_that_is_done_ends(slurm):
    facts()
    training_says("finished", 9)
    rank_ended(slurm, 0)
    code, attempt = conclude(slurm, 0)
    assert (code, attempt.verdict, was_requeued()) == (0, "finished", [])


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        ({"left_min": 2.5}, "stopped by SIGUSR2 (time limit) at step 7; requeued (1 of at most 5)"),
        ({"left_min": 30}, "stopped by SIGUSR2 at step 7; requeued (1 of at most 5)"),
        (
            {"left_min": 1, "preempted": "2026-01-01T00:09:00"},
            "stopped by SIGUSR2 (preempted) at step 7; requeued (1 of at most 5)",
        ),
        (
            {"state": "COMPLETING", "reason": "TimeLimit"},
            "stopped by SIGUSR2 (time limit) at step 7; requeued (1 of at most 5)",
        ),
    ],
    ids=["time limit", "preemption", "preemption with a grace time", "over time"],
)
def test_a_job_that_was_told_to_stop_is_requeued(slurm, view, reason):
    facts(**view)
    training_says("stopped", 7)
    rank_ended(slurm, 0, stopped_by="SIGUSR2")
    code, attempt = conclude(slurm, 0)
    assert (code, attempt.reason, was_requeued()) == (0, reason, ["12"])


@pytest.mark.parametrize("preempted", ["None", "2025-12-31T00:00:00"], ids=["never", "an earlier attempt"])
def test_a_job_that_was_cancelled_is_not_requeued(slurm, preempted):
    facts("COMPLETING", preempted=preempted)
    training_says("stopped", 7)
    rank_ended(slurm, 0, stopped_by="SIGTERM")
    code, attempt = conclude(slurm, 0)
    assert (code, attempt.reason, was_requeued()) == (0, "stopped by SIGTERM at step 7", [])


def test_after_a_failure_srun_starts_again(slurm):
    facts()
    training_says("failed", 7)
    rank_ended(slurm, 0, code=143, stopped_by="SIGTERM", ended=20.0)  # by srun, for rank 1 had failed
    rank_ended(slurm, 1, code=137, ended=10.0)
    code, attempt = conclude(slurm, 143)
    assert (code, was_requeued()) == (75, [])
    assert attempt.reason == "process 1 on node1 was ended by SIGKILL at step 7; restarted (1 of at most 2)"
    training_says("failed", 8)
    conclude(slurm, 137)
    training_says("failed", 9)
    code, attempt = conclude(slurm, 137)
    assert (code, attempt.verdict) == (137, "failed")


def test_a_failure_short_of_the_time_limit_takes_new_time(slurm):
    facts(left_min=1)
    training_says("failed", 7)
    rank_ended(slurm, 0, code=1, stopped_by="SIGUSR2")
    code, attempt = conclude(slurm, 1)
    assert (code, attempt.verdict, was_requeued()) == (0, "restarted", ["12"])


def test_what_an_earlier_start_has_left_does_not_count(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its node was lost: nothing was read
    facts()
    training_says("finished", 9)
    rank_ended(slurm, 0, code=1, restarts="0")
    RankEnd.path(slurm, "12", 1).write_text('{"rank"')
    code, attempt = conclude(slurm, 0)
    assert (code, attempt.verdict) == (0, "finished")


@pytest.mark.parametrize("code", [143, 137])
def test_a_preemption_that_came_before_the_program_had_saved_is_no_failure(slurm, code):
    facts("COMPLETING", preempted="2026-01-01T00:09:00")
    Path("refusal").write_text("Job is pending execution")  # Slurm has requeued it already
    training_says("running", 7)
    rank_ended(slurm, 0, code=code, stopped_by="SIGUSR2")
    result, attempt = conclude(slurm, code)
    assert (result, attempt.verdict, Record.open(slurm, "12").end) == (0, "requeued", None)


def test_a_refused_requeue_is_said(slurm, capsys):
    facts(left_min=2)
    Path("refusal").write_text("slurm_requeue error: Job is\nnot requeueable\n")
    training_says("stopped", 7)
    rank_ended(slurm, 0, stopped_by="SIGUSR2")
    code, attempt = conclude(slurm, 0)
    assert code == 1 and Record.open(slurm, "12").end["code"] == 1
    sentence = "Slurm does not requeue job 12 (slurm_requeue error: Job is not requeueable); submit again to go on"
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert Record.open(slurm, "12").end["reason"] == sentence


def test_a_job_that_starts_anew_does_so_once(slurm):
    job = DelayedSubmission.load(slurm / "12_submitted.pkl").function
    job = replace(job, arguments=("--config-file", "F", "--no-resume", "--overwrite", "optim.epochs=3"))
    state = Path("runs/12/run_state.json")
    state.write_text(json.dumps({"state": "finished", "job": "11"}))
    assert job.command("12")[4:] == list(job.arguments)
    state.write_text(json.dumps({"state": "stopped", "job": "12"}))
    assert job.command("12")[4:] == ["--config-file", "F", "optim.epochs=3", "train.resume=true"]
    assert replace(job, run_dir=None).command("12")[4:] == list(job.arguments)  # another program's option


def test_the_jobs_of_a_sweep_share_the_number_in_their_folders(slurm):
    job = DelayedSubmission.load(slurm / "12_submitted.pkl").function
    assert job.command("12_3")[2:] == ["--output-dir", "runs/12_3"]
    swept = replace(job, is_swept=True)
    assert swept.command("12_3")[2:] == ["--output-dir", "runs/12"]
    assert swept.run_folder("12_3") == job.folder / "runs" / "12"
