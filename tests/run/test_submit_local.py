"""A job on this machine: ranks that end together, time limits, preemption, failures; each with real processes."""

import signal
import time
from types import SimpleNamespace

import pytest

from dinov2.run import submit_local
from dinov2.run.submit_attempts import Limits, Record
from dinov2.run.submit_job import ProgramJob
from dinov2.run.submit_local import LocalRanks

# Like the training: it goes on where it has stopped, and says how far it has come.
BEGIN = """
import json, os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[sys.argv.index("--output-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
told = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(signal.Signals(number).name))
path = folder / "run_state.json"
step = json.loads(path.read_text())["iteration"] + 1 if path.exists() else 0
def wait():
    while not told:
        time.sleep(0.01)
def end(state):
    if rank == "0":
        path.write_text(json.dumps({"state": state, "iteration": step, "began_at": step}))
    print("rank", rank, "attempt at step", step, state, told, flush=True)
    sys.exit(0)
"""
PREEMPT = "os.kill(os.getppid(), signal.SIGUSR2)"


@pytest.fixture
def job(tmp_path):
    (tmp_path / "jobs").mkdir()

    def make(body, *, num_ranks=1, max_restarts=4, **changes):
        program = tmp_path / "program.py"
        program.write_text(BEGIN + body)
        options = {"timeout_s": 60.0, "signal_delay_s": 10.0} | changes
        return ProgramJob(
            program=program,
            arguments=(),
            output_dir="runs/%j",
            run_dir="runs/%j",
            folder=tmp_path,
            limits=Limits(max_requeues=5, max_restarts=max_restarts, knows_steps=True),
            local=LocalRanks(num_ranks=num_ranks),
            **options,
        )

    return make


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(submit_local, "_OTHERS_S", 0.2)
    monkeypatch.setattr(submit_local, "_END_S", 0.2)

    def run(job):
        code = job.local.run(job, folder=tmp_path / "jobs", job_id="77")
        record = Record.open(tmp_path / "jobs", "77")
        assert record.end["code"] == code
        return code, [one.verdict for one in record.attempts], capfd.readouterr().out

    return run


def test_a_preempted_job_goes_on_under_its_number(job, run, tmp_path):
    code, verdicts, out = run(job(f"if step < 2:\n    {PREEMPT}\n    wait()\nend('stopped' if told else 'finished')"))
    assert (code, verdicts) == (0, ["requeued", "requeued", "finished"])
    assert "rank 0 attempt at step 0 stopped ['SIGUSR2']" in out
    assert "job 77, attempt 1: stopped by SIGUSR2 at step 1; requeued (1 of at most 5)" in out
    assert "rank 0 attempt at step 2 finished []" in out and out.endswith("job 77, attempt 3: done\n")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["77"]


def test_all_ranks_are_told_to_stop_ahead_of_the_time_limit(job, run, tmp_path, monkeypatch):
    ready = [tmp_path / f"ready{rank}" for rank in (0, 1)]
    clock = SimpleNamespace(time=time.time, sleep=time.sleep)
    clock.monotonic = lambda: 51.0 if all(path.exists() for path in ready) else 0.0
    monkeypatch.setattr(submit_local, "time", clock)
    body = "Path(f'ready{rank}').touch()\nif step < 1:\n    wait()\nend('stopped' if told else 'finished')"
    code, verdicts, out = run(job(body, num_ranks=2))
    assert (code, verdicts) == (0, ["requeued", "finished"])
    assert "job 77, attempt 1: stopped by SIGUSR2 (time limit) at step 1; requeued" in out
    log = (tmp_path / "jobs" / "77_1_log.out").read_text()
    assert "rank 1 attempt at step 0 stopped ['SIGUSR2']" in log and "finished" in log


def test_what_does_not_end_when_it_is_told_to_is_killed(job, run):
    body = f"{PREEMPT}\nwhile True:\n    time.sleep(0.1)"
    code, verdicts, out = run(job(body, signal_delay_s=0.1, max_restarts=1))
    assert (code, verdicts) == (137, ["restarted", "failed"])
    assert "process 0 was ended by SIGKILL; restarted (1 of at most 1)" in out


def test_a_job_that_somebody_ends_saves_and_does_not_go_on(job, run):
    body = "os.kill(os.getppid(), signal.SIGTERM)\nwait()\nend('stopped')"
    code, verdicts, out = run(job(body))
    assert (code, verdicts) == (0, ["stopped"])
    assert out.endswith("job 77, attempt 1: stopped by SIGTERM at step 1\n")


def test_all_ranks_end_when_one_is_killed_and_the_job_starts_again(job, run):
    body = (
        "mark = folder / 'killed'\n"
        "if rank == '1' and not mark.exists():\n"
        "    mark.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if rank == '0' and not (folder / 'waited').exists():\n"
        "    (folder / 'waited').touch()\n"
        "    while True:\n"
        "        time.sleep(1)\n"
        "end('finished')"
    )
    code, verdicts, out = run(job(body, num_ranks=2))
    assert (code, verdicts) == (0, ["restarted", "finished"])
    assert "job 77, attempt 1: process 1 was ended by SIGKILL; restarted (1 of at most 4)" in out


def test_three_failures_at_one_step_end_the_job_with_a_report(job, run, tmp_path):
    code, verdicts, out = run(job("sys.exit(3)"))
    assert (code, verdicts) == (3, ["restarted", "restarted", "failed"])
    log = tmp_path / "jobs" / "77_0_log.out"
    ending = f"3 failures in a row at the same step, not restarted again; log: {log}"
    assert f"job 77, attempt 3: process 0 ended with exit code 3; {ending}\n  attempt 1, " in out


def test_a_wrong_setting_is_met_once(job, run):
    code, verdicts, out = run(job("sys.exit(2)"))
    assert (code, verdicts) == (2, ["failed"])


def test_signal_handlers_are_put_back(job, run):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)
    run(job("end('finished')"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)) == before
