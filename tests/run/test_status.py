"""`run/status.py`: which runs it finds, what it says of each, and that it only looks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dinov2.run import status
from dinov2.run.status import main
from dinov2.run.status_runs import read_status
from dinov2.train.run_lock import RunLock

TIME_LIMIT_S = 60  # for processes that nobody ends, if a test fails
LONG_AGO_S = 3600
STATE = {
    "state": "running",
    "iteration": 39,
    "total_steps": 100,
    "started": "2026-11-21T10:00:00Z",
    "updated": "2026-11-21T10:05:00Z",
    "attempts": 2,
    "began_at": 20,
    "failures": [],
    "settings": "d1g3s7x2",
    "job": "17_3",
    "host": "node9",
    "pid": 4321,
}


def make_run(folder, *, steps=40, speed=50.0, knn=(), **state):
    """Write what a run leaves behind: `state` over STATE, or no state at all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"iteration": step, "total_loss": float(step), "images_per_s": speed, "current_batch_size": 24}
        for step in range(steps)
    ]
    (folder / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_plan.json").write_text(json.dumps({"last_step": 100, "global_batch_size": 24}))
    for name, accuracy in knn:
        place = folder / "eval" / name
        place.mkdir(parents=True)
        (place / "results_eval_knn.json").write_text(json.dumps({"knn_top1_pct": accuracy}))
    if state:
        (folder / "run_state.json").write_text(json.dumps(STATE | state))
    return folder


def make_old(folder):
    for path in folder.iterdir():
        os.utime(path, (time.time() - LONG_AGO_S,) * 2)


def hold_lock(folder):
    """Start a process that holds the lock of a run; returns its id once it does."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(TIME_LIMIT_S)
        with RunLock(folder, setting="train.output_dir=run"):
            os.write(writer, b"held")
            signal.pause()
    os.read(reader, 4)
    os.close(reader)
    os.close(writer)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def table(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_is_running_while_its_lock_is_held_and_dead_when_its_process_was_killed(tmp_path, capsys):
    folder = make_run(tmp_path / "run", knn=[("start", 30.0), ("training_9", 41.5), ("training_29", 44.25)], job="17")
    pid = hold_lock(folder)
    try:
        running = read_status(folder)
        header, row, *rest = table(capsys, tmp_path)
    finally:
        kill(pid)
    assert running.state == "running"
    assert (running.step, running.total_steps, running.loss) == (40, 100, 19.5)
    assert (running.knn_start_pct, running.knn_pct) == (30.0, 44.25)
    assert running.eta_s == pytest.approx(60 * 24 / 50)
    assert header.split()[:4] == ["run", "state", "step", "loss"]
    cells = [cell for cell in row.split("  ") if cell]
    wanted = [str(folder), "running", "40/100", "19.5000", "30.00 -> 44.25", "50", "29 s"]
    assert [cell.strip() for cell in cells[:7]] == wanted
    assert [cell.strip() for cell in cells[8:]] == ["2", "17"]
    assert rest == ["", "1 run: 1 running"]

    dead = read_status(folder)
    assert dead.state == "dead" and dead.eta_s is None
    assert dead.problem.startswith(f"since process {pid} on {os.uname().nodename}, started ")
    assert dead.problem.endswith(", ended without a word; the same command goes on from the newest checkpoint")


def test_looking_does_not_take_the_lock(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / ".lock").touch()
    before = (folder / ".lock").stat()
    read_status(folder)
    assert (folder / ".lock").stat().st_mtime_ns == before.st_mtime_ns
    with RunLock(folder, setting="train.output_dir=run"):
        pass


def test_a_run_of_another_machine_is_dead_after_a_long_silence(tmp_path):
    """Its lock may not be seen from here."""
    folder = make_run(tmp_path / "run", host="node9")
    assert read_status(folder).state == "running"
    (folder / ".lock").write_text('{"pid": 4321, "host": "node9", "started": "2026-11-21 10:00:00 UTC"}')
    assert read_status(folder).state == "running"
    make_old(folder)
    found = read_status(folder)
    assert found.state == "dead" and found.silent_s == pytest.approx(LONG_AGO_S, abs=60)
    assert found.problem.startswith("since process 4321 on node9, started 2026-11-21 10:00:00 UTC, ended")


def test_runs_that_have_ended(tmp_path, capsys):
    failure = {"iteration": 40, "began_at": 20, "reason": "loss=nan three times", "time": "2026-11-21T10:05:00Z"}
    make_run(tmp_path / "lr=1e-4" / "one", steps=100, state="finished", iteration=99)
    make_run(tmp_path / "lr=1e-4" / "two", state="failed", attempts=3, failures=[failure])
    make_run(tmp_path / "other" / "three", state="failed", failures=[failure | {"iteration": None}])
    make_run(tmp_path / "other" / "four", state="stopped")
    make_run(tmp_path / "untold" / "five", steps=100)  # by a version that wrote no state
    make_run(tmp_path / "untold" / "six")
    lines = table(capsys, tmp_path)
    states = {Path(line.split()[0]).name: line.split()[1:3] for line in lines[1:7]}
    assert states == {
        "one": ["finished", "100/100"],
        "two": ["failed", "40/100"],
        "four": ["stopped", "40/100"],
        "three": ["failed", "40/100"],
        "five": ["finished", "100/100"],
        "six": ["stopped", "40/100"],
    }
    assert lines[7:] == [
        "",
        f"{tmp_path}/lr=1e-4/two: failed at iteration 40, attempt 3: loss=nan three times",
        f"{tmp_path}/other/three: failed before training began, attempt 2: loss=nan three times",
        "",
        "6 runs: 2 finished, 2 stopped, 2 failed",
    ]


def test_damaged_files_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", steps=10, knn=[("start", 1.0), ("training_3", 50.0), ("training_5", 1.0)])
    (folder / "eval" / "training_5" / "results_eval_knn.json").write_text('{"knn_top1')
    (folder / "eval" / "start" / "results_eval_knn.json").write_text("[1, 2]")
    with (folder / "training_metrics.json").open("ab") as file:
        file.write(
            b'{"iteration": 10, "total_loss": null}\n\xff\xfe\x00\n[]\n{"iteration": "x"}\n{"iteration": 11, "tot'
        )
    (folder / "run_state.json").write_text('{"state": "runn')
    (folder / "run_plan.json").write_text("")
    found = read_status(folder)
    assert (found.state, found.step, found.total_steps, found.loss) == ("stopped", 11, None, 4.5)
    assert (found.knn_start_pct, found.knn_pct) == (None, 50.0)
    (folder / "training_metrics.json").write_bytes(b"\x00" * 5000)
    assert read_status(folder).step is None


def test_a_run_that_has_just_begun_or_is_of_another_program(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run_state.json").write_text(json.dumps(STATE | {"iteration": None, "total_steps": None}))
    (tmp_path / "parents").mkdir()
    (tmp_path / "parents" / "training_metrics.json").write_text('{"iteration": 10, "total_loss": 9.5}\n')
    _, new, parents, *_ = table(capsys, tmp_path)
    assert new.split()[1:7] == ["running", "-", "-", "-", "-", "-"]
    assert parents.split()[1:6] == ["stopped", "11", "9.5000", "-", "-"]


def test_runs_are_found_below_runs_but_not_in_their_own_folders(tmp_path, capsys):
    outer = make_run(tmp_path / "outer")
    for name in ("eval/copy", "logs/copy", "cache/copy", "jobs/code/copy", ".hidden", "inner"):
        make_run(outer / name)
    (tmp_path / "link").symlink_to(outer / "inner")
    (tmp_path / "notes").mkdir()
    found = json.loads("\n".join(table(capsys, tmp_path, outer, "--json")))
    assert [run["folder"] for run in found] == [str(outer), str(outer / "inner")]
    assert found[0]["state"] == "stopped" and found[0]["step"] == 40 and found[0]["eta_s"] is None
    assert table(capsys, tmp_path / "link")[1].split()[0] == str(tmp_path / "link")


def test_wrong_use_is_a_sentence(tmp_path, capsys):
    assert table(capsys, tmp_path) == [f"no runs in or below {tmp_path}"]
    assert main([str(tmp_path / "none")]) == 2
    sentence = "is no folder; give the output directory of a run, or a folder above several"
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: {sentence}\n"
    assert main([str(tmp_path), "--watch", "0"]) == 2
    assert capsys.readouterr().err.endswith("argument --watch: '0' is not a number of seconds above 0\n")


def test_watching_shows_it_again_until_ctrl_c(tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "run", state="stopped")
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        make_run(folder, steps=100, state="finished", iteration=99)

    monkeypatch.setattr(status.time, "sleep", pause)
    lines = table(capsys, folder, "--watch", "5")
    assert pauses == [5, 5]
    assert [line.split()[1] for line in lines if line.startswith(str(folder))] == ["stopped", "finished"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min"), (200000, "2 d 7 h")],
)
def test_times_are_written_in_two_units(tmp_path, capsys, seconds, text):
    folder = make_run(tmp_path / "run", state="stopped")
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)
    assert f"  {text}  " in table(capsys, folder)[1]
