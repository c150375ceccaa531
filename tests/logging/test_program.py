"""Exit codes and what a user sees of an error."""

import argparse
import logging
import subprocess
import sys

import pytest

from dinov2.errors import CheckpointError, ConfigError, DatasetError, StoppedEarly
from dinov2.logging import run_program


def raising(error):
    def body(argv):
        raise error

    return body


@pytest.fixture
def as_rank(monkeypatch):
    def set_variables(rank, world_size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost"}
        for name, value in (names | {"MASTER_PORT": 1}).items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def test_arguments_and_exit_code_pass_through():
    assert run_program(lambda argv: len(argv), ["a", "b", "c"]) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("bad key"), 2), (DatasetError("bad key"), 1), (CheckpointError("bad key"), 1)],
)
def test_errors_of_users_are_one_line(capsys, error, code):
    assert run_program(raising(error), []) == code
    assert capsys.readouterr() == ("", "error: bad key\n")


def test_an_error_of_several_lines_becomes_one(capsys):
    run_program(raising(DatasetError("a\n  b\nc")), [])
    assert capsys.readouterr().err == "error: a b c\n"


def test_errors_reach_the_log(capsys, caplog):
    with caplog.at_level(logging.ERROR):
        run_program(raising(DatasetError("photos: no such folder")), [])
    assert [record.getMessage() for record in caplog.records] == ["photos: no such folder"]


def test_ranks_say_who_they_are_but_only_rank_0_repeats_a_config_error(capsys, as_rank):
    as_rank(1, 2)
    assert run_program(raising(ConfigError("x")), []) == 2
    assert capsys.readouterr().err == ""
    assert run_program(raising(DatasetError("x")), []) == 1
    assert capsys.readouterr().err == "error: rank 1: x\n"
    as_rank(0, 2)
    run_program(raising(ConfigError("x")), [])
    assert capsys.readouterr().err == "error: x\n"


def test_bad_variables_of_a_launcher_do_not_hide_the_error(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert run_program(raising(ConfigError("RANK=0 is set but LOCAL_RANK not")), []) == 2
    assert capsys.readouterr().err == "error: RANK=0 is set but LOCAL_RANK not\n"


def test_usage_errors_and_help_give_exit_codes(capsys):
    parser = argparse.ArgumentParser(prog="knn.py")
    parser.add_argument("--k", type=int)

    def body(argv):
        parser.parse_args(argv)
        return 0

    assert run_program(body, ["--k", "x"]) == 2
    assert run_program(body, ["--help"]) == 0
    assert run_program(raising(SystemExit("stop")), []) == 1
    assert run_program(raising(SystemExit()), []) == 0


def test_ctrl_c(capsys):
    assert run_program(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_being_told_to_stop_before_the_first_step_is_no_failure(capsys):
    assert run_program(raising(StoppedEarly("SIGTERM")), []) == 0
    assert capsys.readouterr().err == "stopped by SIGTERM before the first step; start again to go on\n"


def test_a_signal_while_a_program_ends_does_not_change_its_exit_code():
    script = (
        "import atexit, os, signal\nfrom dinov2.logging import end_program\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\nend_program(0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_mistakes_of_ours_keep_their_traceback(caplog):
    with pytest.raises(ZeroDivisionError), caplog.at_level(logging.CRITICAL):
        run_program(lambda argv: 1 // 0, [])
    assert caplog.records[0].exc_info[0] is ZeroDivisionError


def test_a_closed_pipe_is_quiet():
    script = (
        "import sys\nfrom dinov2.logging.program import run_program\n"
        "def body(argv):\n    for _ in range(100000): print('line')\n    return 0\n"
        "sys.exit(run_program(body, []))\n"
    )
    program = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.readline()
    program.stdout.close()
    assert (program.stderr.read(), program.wait()) == (b"", 1)
    program.stderr.close()


def test_another_broken_pipe_is_no_matter_of_standard_output():
    with pytest.raises(BrokenPipeError):
        run_program(raising(BrokenPipeError()), [])
