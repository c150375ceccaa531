"""What follows from the attempts of a job: once more, or the end, and in which words."""

from dataclasses import replace

import pytest

from dinov2.run.submit_attempts import Attempt, Limits, Progress, Record, judge, progress_of

TRAINING = Limits(max_requeues=2, max_restarts=4, knows_steps=True)
EVALUATION = Limits(max_requeues=2, max_restarts=0)


def attempt(code=0, *, step=None, began_at=0, state="running", is_final=False, **changes):
    progress = Progress(state=state, step=step, began_at=began_at, is_final=is_final)
    return Attempt(number=1, ended=0.0, code=code, progress=progress, **changes)


def stop(signal="SIGUSR2", *, step=7, **changes):
    return attempt(stopped_by=signal, step=step, state="stopped", **changes)


def follow(*attempts, limits=TRAINING, is_cancelled=False):
    """Judge attempts one after the other; returns the last verdict."""
    past = []
    for number, one in enumerate(attempts, 1):
        one = replace(one, number=number)
        verdict = judge([*past, one], limits, is_cancelled=is_cancelled, log="the.log")
        past.append(replace(one, verdict=verdict.kind, reason=verdict.reason))
    return verdict


@pytest.mark.parametrize(
    ("last", "limits", "kind", "code", "reason"),
    [
        (attempt(state="finished", step=9), TRAINING, "finished", 0, "done"),
        (attempt(state="stopped", step=9), TRAINING, "stopped", 0, "stopped on request at step 9"),
        (stop(), TRAINING, "requeued", 0, "stopped by SIGUSR2 at step 7; requeued (1 of at most 2)"),
        (
            stop(at_time_limit=True),
            TRAINING,
            "requeued",
            0,
            "stopped by SIGUSR2 (time limit) at step 7; requeued (1 of at most 2)",
        ),
        (
            attempt(140, stopped_by="SIGUSR2", at_time_limit=True),
            TRAINING,
            "requeued",
            0,
            "ended by SIGUSR2 (time limit), before it could save; requeued (1 of at most 2)",
        ),
        (
            attempt(140, stopped_by="SIGUSR2", at_time_limit=True),
            EVALUATION,
            "failed",
            140,
            "ended by SIGUSR2 (time limit), before it could save; raise --timeout",
        ),
        (
            attempt(143, stopped_by="SIGTERM"),
            EVALUATION,
            "requeued",
            0,
            "ended by SIGTERM, before it could save; requeued (1 of at most 2)",
        ),
        (attempt(1, rank=1), EVALUATION, "failed", 1, "process 1 ended with exit code 1; log: the.log"),
        (
            attempt(2, rank=0),
            TRAINING,
            "failed",
            2,
            "process 0 ended with exit code 2; a wrong setting, which a restart would meet again",
        ),
        (
            attempt(1, rank=0, began_at=None),
            TRAINING,
            "failed",
            1,
            "process 0 ended with exit code 1; before training began, not restarted; log: the.log",
        ),
        (
            attempt(1, rank=0, step=50, is_final=True),
            TRAINING,
            "failed",
            1,
            "process 0 ended with exit code 1 at step 50; not restarted, it would end so again; log: the.log",
        ),
        (
            attempt(137, rank=3, host="node2", step=50),
            TRAINING,
            "restarted",
            0,
            "process 3 on node2 was ended by SIGKILL at step 50; restarted (1 of at most 4)",
        ),
        (attempt(137), TRAINING, "restarted", 0, "a process was ended by SIGKILL; restarted (1 of at most 4)"),
    ],
)
def test_one_attempt_and_what_follows(last, limits, kind, code, reason):
    verdict = follow(last, limits=limits)
    assert (verdict.kind, verdict.code, verdict.reason) == (kind, code, reason)


def test_a_training_that_finished_while_it_was_told_to_stop_is_done():
    assert follow(attempt(stopped_by="SIGUSR2", state="finished", step=9)).kind == "finished"


@pytest.mark.parametrize(
    ("last", "kind", "code"),
    [(stop("SIGTERM"), "stopped", 0), (attempt(143, stopped_by="SIGTERM"), "stopped", 143), (attempt(1), "failed", 1)],
)
def test_a_job_that_somebody_ends_does_not_go_on(last, kind, code):
    verdict = follow(last, is_cancelled=True)
    assert (verdict.kind, verdict.code, verdict.goes_on) == (kind, code, False)


def test_requeues_are_limited():
    verdict = follow(stop(step=1), stop(step=2), stop(step=3))
    ending = "--max-requeues 2 allows no more, submit again to go on"
    assert (verdict.kind, verdict.code) == ("stopped", 1)
    assert verdict.reason == f"stopped by SIGUSR2 at step 3; {ending}"


def test_time_limits_in_which_no_step_is_done_end_the_job():
    limits = replace(TRAINING, max_requeues=100)
    stuck = [stop(at_time_limit=True)] * 3
    verdict = follow(*stuck, limits=limits)
    assert (verdict.kind, verdict.code) == ("failed", 1)
    assert verdict.reason == "stopped by SIGUSR2 (time limit) at step 7, like the 2 attempts before it; raise --timeout"
    assert follow(stop(), *stuck[:2], limits=limits).kind == "requeued"  # a preemption among them says nothing
    moved = [stop(step=step, began_at=step, at_time_limit=True) for step in (1, 2, 3)]
    assert follow(*moved, limits=limits).kind == "requeued"


@pytest.mark.parametrize("at", [{"step": 57}, {"began_at": 50}], ids=["same step", "no checkpoint in between"])
def test_three_failures_at_one_step_end_the_job_with_a_report(at):
    fails = [attempt(137, rank=1, **{"step": step, "began_at": step - 9} | at) for step in (55, 58, 61)]
    assert follow(*fails[:2]).kind == "restarted"
    verdict = follow(*fails)
    assert (verdict.kind, verdict.code) == ("failed", 137)
    first, *lines = verdict.reason.splitlines()
    step = at.get("step", 61)
    ending = "3 failures in a row at the same step, not restarted again; log: the.log"
    assert first == f"process 1 was ended by SIGKILL at step {step}; {ending}"
    assert len(lines) == 3 and lines[0].startswith("  attempt 1, 1970-01-01 00:00:00 UTC: process 1 was ended by SIG")


def test_failures_at_other_steps_are_counted():
    fails = [attempt(1, step=step, began_at=step) for step in range(5)]
    assert follow(*fails[:4]).kind == "restarted"
    verdict = follow(*fails)
    assert verdict.kind == "failed" and "; --max-restarts 4 allows no more; log: the.log\n" in verdict.reason
    between = [fails[0], fails[0], stop(), fails[0]]
    assert follow(*between).kind == "restarted"


def test_a_program_that_tells_no_steps_is_restarted_as_often_as_asked():
    limits = Limits(max_requeues=0, max_restarts=3)
    assert follow(*[attempt(1, began_at=None, state=None)] * 3, limits=limits).kind == "restarted"
    assert follow(*[attempt(1, began_at=None, state=None)] * 4, limits=limits).kind == "failed"


def test_the_record_comes_back_from_its_file(tmp_path):
    record = Record.open(tmp_path, "12_3")
    for one in (stop(), attempt(state="finished", step=9)):
        record.add(one, judge([*record.attempts, one], TRAINING, is_cancelled=False, log=""))
    again = Record.open(tmp_path, "12_3")
    assert again == record and again.end == {"kind": "finished", "code": 0, "reason": "done"}
    assert [one.verdict for one in again.attempts] == ["requeued", "finished"]
    (tmp_path / "12_3_attempts.json").write_text('{"attempts": [{"num')
    assert Record.open(tmp_path, "12_3").attempts == []
    Record.forget(tmp_path, "12_3")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "progress"),
    [
        ('{"state": "stopped", "iteration": 6, "began_at": 2}', Progress(state="stopped", step=7, began_at=2)),
        ('{"state": "running", "iteration": null, "began_at": null}', Progress(state="running")),
        ('{"state": "failed", "is_final": true, "job": "7_1"}', Progress(state="failed", is_final=True, job="7_1")),
        ("[]", Progress()),
        ('{"state', Progress()),
    ],
)
def test_progress_is_what_the_run_says(tmp_path, text, progress):
    assert progress_of(tmp_path) == Progress() == progress_of(None)
    (tmp_path / "run_state.json").write_text(text)
    assert progress_of(tmp_path) == progress
