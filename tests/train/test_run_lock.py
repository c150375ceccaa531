"""Two runs never share a folder; the end of its owner, however it comes, frees the lock."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.training import PROGRAM, TINY_RUN

from dinov2.errors import ConfigError
from dinov2.train.run_lock import RunLock, look_at_lock

TIME_LIMIT_S = 60  # for processes that nobody ends, if a test fails
SETTING = "train.output_dir=outputs/run"


def in_another_process(fn) -> str:
    """Run `fn` in a fork of this process; returns what it returns, or the sentence of its ConfigError."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = fn()
        except ConfigError as error:
            text = str(error)
        os.write(writer, (text or "").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def enter(folder: Path) -> str:
    with RunLock(folder, setting=SETTING):
        return "entered"


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path):
    with RunLock(tmp_path, setting=SETTING):
        refused = in_another_process(lambda: enter(tmp_path))
    now = time.strftime("%Y-%m-%d", time.gmtime())
    before, _, after = refused.partition(f"started {now} ")
    assert before == f"{SETTING} is in use by another run (process {os.getpid()} on {socket.gethostname()}, "
    assert after[8:] == " UTC); wait for its end, or choose another folder"
    assert in_another_process(lambda: enter(tmp_path)) == "entered"


def test_children_neither_hold_nor_free_the_lock(tmp_path):
    """As loader workers do, they close what they inherited when they end."""
    with RunLock(tmp_path, setting=SETTING):
        assert in_another_process(lambda: "a worker") == "a worker"
        for _ in range(2):
            assert "is in use by another run" in in_another_process(lambda: enter(tmp_path))


def test_a_worker_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path):
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        signal.alarm(TIME_LIMIT_S)
        with RunLock(tmp_path, setting=SETTING):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            else:
                signal.alarm(TIME_LIMIT_S)
            signal.pause()
    worker = int(os.read(reader, 20))
    try:
        refused = in_another_process(lambda: enter(tmp_path))
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        assert "is in use by another run" in refused
        assert in_another_process(lambda: enter(tmp_path)) == "entered"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_who_only_looks_sees_the_owner_and_whether_it_was_killed(tmp_path):
    assert look_at_lock(tmp_path) is None
    enter(tmp_path)
    assert look_at_lock(tmp_path) is None
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        signal.alarm(TIME_LIMIT_S)
        with RunLock(tmp_path, setting=SETTING):
            os.write(writer, b"held")
            signal.pause()
    os.read(reader, 4)
    os.close(reader)
    os.close(writer)
    held = look_at_lock(tmp_path)
    refused = in_another_process(lambda: enter(tmp_path))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    left = look_at_lock(tmp_path)
    assert held.holds and (held.pid, held.host) == (owner, socket.gethostname())
    assert f"(process {owner} on {socket.gethostname()}, started {held.started})" in refused
    assert left == replace(held, holds=False)


def test_an_owner_that_has_not_yet_written_its_name(tmp_path):
    with RunLock(tmp_path, setting=SETTING):
        (tmp_path / ".lock").write_text("")  # a write by another name: this closes the file, and frees the lock
        with (tmp_path / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            refused = in_another_process(lambda: enter(tmp_path))
    assert refused == f"{SETTING} is in use by another run (just started); wait for its end, or choose another folder"


def test_the_file_that_stays_is_empty(tmp_path):
    enter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"] and (tmp_path / ".lock").read_text() == ""


def test_a_folder_that_cannot_be_written():
    with pytest.raises(ConfigError) as caught:
        enter(Path("/proc/self"))
    assert str(caught.value).startswith(f"{SETTING} cannot be written (") and "choose another folder" in str(
        caught.value
    )


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert enter(tmp_path) == "entered"
    assert caplog.messages == [f"{SETTING} cannot be locked (No locks available): start no second run in it"]


def test_the_program_leaves_the_folder_of_another_run_alone(tmp_path):
    command = [sys.executable, str(PROGRAM), "--output-dir", str(tmp_path), *TINY_RUN, "--no-resume", "--overwrite"]
    (tmp_path / "model_0000003.rank_0.pth.tmp").write_text("being written")
    with RunLock(tmp_path, setting="train.output_dir=x"):
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: train.output_dir={tmp_path} is in use by another run (process {os.getpid()} "
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model_0000003.rank_0.pth.tmp"]
