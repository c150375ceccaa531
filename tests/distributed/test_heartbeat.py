"""When one rank ends, is suspended or fails, the others end too, soon and with one sentence."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.dist import run_alone
from support.fork_server import ForkedRanks

from dinov2 import distributed
from dinov2.distributed.heartbeat import Heartbeat
from dinov2.distributed.launch_environment import LaunchEnvironment
from dinov2.errors import StoppedEarly
from dinov2.logging import run_program

ENDS_WITHIN_S = 30


def run_cases(folder):
    """Run each case on ranks of their own, forked from here; returns exit codes and what each rank wrote."""
    os.environ |= {"DINOV2_LOST_RANK_TIMEOUT_S": "2", "DINOV2_RENDEZVOUS_TIMEOUT_S": "2"}
    found = {}
    for name, (rank_does, num_processes, stop) in CASES.items():
        logs = Path(folder) / name
        logs.mkdir(parents=True)
        with ForkedRanks(lambda: run_program(rank_does, []), num_processes=num_processes, log_dir=logs) as ranks:  # noqa: B023
            if stop is not None:
                while not all("ready" in log_of(logs, rank) for rank in range(num_processes)):
                    time.sleep(0.02)
                started_s = time.monotonic()
                number, rank = stop
                ranks.kill(rank, number=number)
                while len(ranks.running) > (number == signal.SIGSTOP) and time.monotonic() < started_s + ENDS_WITHIN_S:
                    ranks.wait(0.1)
                ranks.kill(rank)
            assert ranks.wait_for_all(ENDS_WITHIN_S), f"{name}: {ranks.running} go on"
            codes = [ranks.exit_codes[rank] for rank in range(num_processes)]
        found[name] = [codes, [log_of(logs, rank) for rank in range(num_processes)]]
    return found


def log_of(folder, rank):
    path = folder / f"rank_{rank}.std.log"
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def group():
    environment = distributed.init("cpu")
    try:
        yield environment.rank
    finally:
        distributed.shutdown()


def wait_in_a_collective(argv):
    """All ranks but the last, which sleeps, wait for it."""
    with group() as rank:
        distributed.note_step(7)
        time.sleep(0.8)  # two beats tell the others of the step
        print("ready", flush=True)
        if rank == distributed.get_world_size() - 1:
            time.sleep(60)
        distributed.all_reduce_sum(torch.ones(1))
    return 0


def sleep_outside_of_collectives(argv):
    """No rank notices anything by itself."""
    with group():
        print("ready", flush=True)
        time.sleep(60)
    return 0


def fail_on_one_rank(argv):
    with group() as rank:
        if rank == 1:
            raise KeyError("an error that nobody foresaw")
        distributed.all_reduce_sum(torch.ones(1))
    return 0


def be_told_to_stop(argv):
    """Rank 2 alone, and before there is anything to save."""
    with group() as rank:
        distributed.call_before_ending(lambda reason, is_failure: print(is_failure, flush=True))
        if rank == 2:
            raise StoppedEarly("SIGTERM")
        if rank == 1:
            time.sleep(60)
        distributed.all_reduce_sum(torch.ones(1))
    return 0


def compute_for_long(argv):
    """Longer than a rank may be silent; rank 1 leaves before."""
    with group() as rank:
        if rank == 0:
            time.sleep(3)
    print("done", flush=True)
    return 0


def be_suspended_together(argv):
    """As schedulers do with a whole job: for longer than a rank may be silent."""
    with group():
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        distributed.barrier()
        os.kill(os.getpid(), signal.SIGSTOP)
        distributed.barrier()
    return 0


def stay_away(argv):
    if distributed.launched_world_size() == 3 and os.environ["RANK"] == "1":
        return 0
    with group():
        return 0


CASES = {
    "killed": (wait_in_a_collective, 3, (signal.SIGKILL, 2)),
    "killed outside of collectives": (sleep_outside_of_collectives, 2, (signal.SIGKILL, 1)),
    "rank 0 killed": (sleep_outside_of_collectives, 3, (signal.SIGKILL, 0)),
    "suspended": (wait_in_a_collective, 2, (signal.SIGSTOP, 1)),
    "failed alone": (fail_on_one_rank, 2, None),
    "told to stop": (be_told_to_stop, 3, None),
    "long": (compute_for_long, 2, None),
    "suspended together": (be_suspended_together, 2, None),
    "did not come": (stay_away, 3, None),
}


def test_strangers_are_neither_believed_nor_missed(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = torch.distributed.HashStore()
    beats = []
    for rank in range(2):
        launch = LaunchEnvironment(rank=rank, world_size=2, local_rank=rank, local_world_size=2, address="127.0.0.1")
        beats.append(Heartbeat(launch, store, timeout_s=0.4))
    port = json.loads(store.get("heartbeat"))["port"]
    for words in (b"", b"[]\n", b'{"failed": "a lie"}\n', b"x" * 100_000, b'{"token": "wrong"}\n{"lost": "a lie"}\n'):
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.sendall(words)
        if words:
            stranger.close()
    time.sleep(0.8)  # the first one stays, without a word, for longer than a rank may
    for beat in beats:
        beat.close()
    assert not ended


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_alone(run_cases, args={"folder": str(tmp_path_factory.mktemp("cases"))}, timeout_s=240)


END = "; all ranks end, start again to go on\n"


def errors_of(text):
    return [re.sub(r"process \d+ on [^)]+\)", "process P on H)", line) for line in text.splitlines(keepends=True)]


@pytest.mark.dist
def test_a_killed_rank_ends_the_others_with_one_sentence(found):
    codes, logs = found["killed"]
    assert codes == [1, 1, -9]
    sentence = f"error: rank 0: rank 2 (process P on H) has ended without a word, last seen at step 7{END}"
    assert errors_of(logs[0]) == ["ready\n", sentence]
    assert logs[1] == "ready\n"  # rank 0 has said it


@pytest.mark.dist
def test_a_rank_that_is_in_no_collective_ends_too(found):
    codes, logs = found["killed outside of collectives"]
    assert codes == [1, -9]
    assert errors_of(logs[0])[1:] == [f"error: rank 0: rank 1 (process P on H) has ended without a word{END}"]


@pytest.mark.dist
def test_all_tell_that_rank_0_has_ended(found):
    codes, logs = found["rank 0 killed"]
    assert codes == [-9, 1, 1]
    for rank in (1, 2):
        sentence = f"error: rank {rank}: rank 0 (process P on H) has ended without a word{END}"
        assert errors_of(logs[rank])[1:] == [sentence]


@pytest.mark.dist
def test_a_rank_that_gives_no_sign_of_life_is_given_up_after_the_time_out(found):
    codes, logs = found["suspended"]
    assert codes == [1, -9]
    assert errors_of(logs[0])[1:] == [
        f"error: rank 0: rank 1 (process P on H) has not answered for 2 s, last seen at step 7: the machine or the "
        f"network to it is gone, or the process is suspended{END}"
    ]


@pytest.mark.dist
def test_a_rank_that_fails_alone_is_named_with_its_error(found):
    codes, logs = found["failed alone"]
    assert codes == [1, 1]
    assert errors_of(logs[0]) == [
        f"error: rank 0: rank 1 (process P on H) has failed: KeyError: 'an error that nobody foresaw'{END}"
    ]
    assert "Traceback" in logs[1]


@pytest.mark.dist
def test_one_rank_that_is_told_to_stop_ends_all_without_a_failure(found):
    codes, logs = found["told to stop"]
    assert codes == [0, 0, 0]
    assert errors_of(logs[0]) == [f"rank 0: rank 2 (process P on H) was stopped by SIGTERM{END}", "False\n"]
    assert logs[1] == "False\n"


@pytest.mark.dist
def test_long_work_is_no_silence_and_leaving_is_no_end(found):
    assert found["long"] == [[0, 0], ["done\n", "done\n"]]


@pytest.mark.dist
def test_a_job_that_was_suspended_as_a_whole_goes_on(found):
    assert found["suspended together"] == [[0, 0], ["", ""]]


@pytest.mark.dist
def test_ranks_that_did_not_come_are_named(found):
    codes, logs = found["did not come"]
    assert codes == [1, 0, 1]
    for rank in (0, 2):
        assert re.fullmatch(
            rf"error: rank {rank}: rank 1 of 3 did not come to 127\.0\.0\.1:\d+ within 2 s \(the others are on "
            r"[^)]+\); look at their logs, or give a slow start more time with DINOV2_RENDEZVOUS_TIMEOUT_S\n",
            logs[rank],
        )
