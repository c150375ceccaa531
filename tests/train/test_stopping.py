"""Stopping a run from outside, or by an error, loses no finished step and leaves no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.training import PROGRAM, TINY_RUN, assert_same_state, metrics_of, train

from dinov2.train import train as train_module
from dinov2.train.run_state import read_run_state

TIME_LIMIT_S = 180  # for a loaded machine; what is waited for takes a few seconds

SLOW_DATASET = """
    import os, time
    from pathlib import Path
    import numpy as np
    from PIL import Image

    FOLDER = Path(__file__).parent


    class Slow:
        '''Grey squares; makes a file `reading`, takes its time, and fails at `broken`.'''

        def __init__(self, *, delay_s: float = 0.0, broken: int = -1, channels: int = 1, transform=None):
            self.delay_s, self.broken, self.transform = delay_s, broken, transform

        def __len__(self):
            return 60

        def __getitem__(self, index):
            time.sleep(self.delay_s)
            (FOLDER / f"reader_{os.getpid()}").touch()
            if index == self.broken:
                raise KeyError("an error that nobody foresaw")
            image = Image.fromarray(np.full((40, 40), 4 * index, dtype=np.uint8))
            return (image if self.transform is None else self.transform(image)), index % 2

        def get_targets(self):
            return np.arange(60) % 2
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Make the class slow_images.Slow known to the processes that a test starts."""
    (tmp_path / "slow_images.py").write_text(textwrap.dedent(SLOW_DATASET))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def start(folder, *options, launcher=()):
    command = [sys.executable, *launcher, str(PROGRAM), "--output-dir", str(folder), *TINY_RUN, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, preexec_fn=heed_sigint, start_new_session=True, **pipes)


def heed_sigint():
    """Undo what a shell does to its background jobs, and so to tests started from one: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_of(process):
    """Wait for a process; returns its exit code and what it wrote to standard error."""
    try:
        _, errors = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running\n{process.communicate()[1]}") from None
    return process.returncode, errors


def wait_until(condition, process):
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def has_steps(folder, count):
    path = folder / "training_metrics.json"
    return lambda: path.exists() and len(path.read_text().splitlines()) >= count


def newest_step(folder):
    return max(int(path.name[6:13]) for path in folder.glob("model_*.manifest.json"))


STOPS = {
    "term": (signal.SIGTERM, 3, ["train.num_workers=2"]),
    "int": (signal.SIGINT, 5, ["train.num_workers=0", "optim.gradient_accumulation_steps=3"]),
    "usr1": (signal.SIGUSR1, 2, ["train.num_workers=1", "train.centering=sinkhorn_knopp", "ibot.separate_head=true"]),
    "usr2": (signal.SIGUSR2, 1, ["train.num_workers=2", "checkpointing.background=false"]),
}


@pytest.mark.parametrize(
    "case", [case if case == "term" else pytest.param(case, marks=pytest.mark.integration) for case in STOPS]
)
def test_a_signal_to_all_processes_ends_the_step_saves_and_resuming_gives_the_whole_run(tmp_path, case):
    number, steps, options = STOPS[case]
    options = ["train.OFFICIAL_EPOCH_LENGTH=4000", "logging.period_steps=1", *options]
    process = start(tmp_path / "parts", *options)
    wait_until(has_steps(tmp_path / "parts", steps), process)
    os.killpg(process.pid, number)  # as Ctrl-C and schedulers do: loader workers get it too
    code, errors = end_of(process)
    assert code == 0 and "Traceback" not in errors, errors
    step = newest_step(tmp_path / "parts")
    assert f"stopped by {number.name} after iteration {step}; start again to go on" in errors
    assert len(metrics_of(tmp_path / "parts")) == step + 1

    last = f"train.max_steps={step + 3}"
    assert train(tmp_path / "parts", *options, last, "train.num_workers=0") == 0
    assert train(tmp_path / "whole", *options, last, "train.num_workers=0") == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name=f"model_{step + 2:07d}")


@pytest.mark.integration
@pytest.mark.dist
def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint_of_all_ranks(tmp_path):
    options = ["train.OFFICIAL_EPOCH_LENGTH=4000", "logging.period_steps=1", "train.batch_size_per_gpu=6"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(tmp_path, *options, launcher=torchrun)
    wait_until(has_steps(tmp_path, 2), process)
    process.terminate()
    code, errors = end_of(process)
    assert code != 0  # torchrun's own, which it ends with whenever it is signalled
    step = newest_step(tmp_path)
    assert f"stopped by SIGTERM after iteration {step}; start again to go on" in errors
    assert {path.name for path in tmp_path.glob(f"model_{step:07d}.rank_*")} == {
        f"model_{step:07d}.rank_{rank}.pth" for rank in range(2)
    }
    code, errors = end_of(start(tmp_path, *options, f"train.max_steps={step + 2}", launcher=torchrun))
    assert code == 0, errors
    assert [row["iteration"] for row in metrics_of(tmp_path)] == list(range(step + 2))


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGTERM, 0, "stopped by SIGTERM before the first step; start again to go on"),
        (signal.SIGUSR2, 0, "stopped by SIGUSR2 before the first step; start again to go on"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_during_the_first_evaluation_ends_at_once(tmp_path, slow, number, code, sentence):
    dataset = "slow_images.Slow:delay_s=0.1"
    options = [f"evaluation.knn.{part}_dataset_path={dataset}" for part in ("train", "val")]
    process = start(tmp_path / "run", *options, "evaluation.at_start=true", "train.num_workers=2")
    wait_until(lambda: list(tmp_path.glob("reader_*")), process)
    process.send_signal(number)
    ended, errors = end_of(process)
    assert ended == code and "Traceback" not in errors, errors
    assert errors.splitlines()[-1] == sentence
    assert not list((tmp_path / "run").glob("model_*"))
    found = read_run_state(tmp_path / "run")
    assert (found.state, found.began_at, found.failures) == ("stopped", 0, ())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_lets_the_run_finish(tmp_path, monkeypatch, number):
    """A scheduler's leaves no time for plots."""
    monkeypatch.setattr(train_module, "report_skipped", lambda *args, **options: os.kill(os.getpid(), number))
    drawn = []
    monkeypatch.setattr(train_module, "summarise", lambda *args: drawn.append(os.kill(os.getpid(), signal.SIGTERM)))
    assert train(tmp_path, "train.max_steps=2") == 0
    assert read_run_state(tmp_path).state == "finished"
    assert len(drawn) == (number == signal.SIGINT)


def test_an_unforeseen_error_in_a_worker_ends_the_process(tmp_path, slow):
    process = start(tmp_path / "run", "train.dataset_path=slow_images.Slow:broken=7", "train.num_workers=2")
    code, errors = end_of(process)
    assert code == 1 and "an error that nobody foresaw" in errors


def test_an_unforeseen_error_in_an_evaluation_ends_the_process(tmp_path, slow):
    dataset = "slow_images.Slow:broken=7"
    options = [f"evaluation.knn.{part}_dataset_path={dataset}" for part in ("train", "val")]
    process = start(tmp_path / "run", *options, "evaluation.at_start=true", "train.num_workers=2")
    code, errors = end_of(process)
    assert code == 1 and "an error that nobody foresaw" in errors


def test_a_killed_run_leaves_no_workers(tmp_path, slow):
    process = start(tmp_path / "run", "train.dataset_path=slow_images.Slow", "train.num_workers=2", "optim.epochs=1000")

    def workers():
        return {int(path.name.removeprefix("reader_")) for path in tmp_path.glob("reader_*")} - {process.pid}

    wait_until(lambda: len(workers()) == 2, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + TIME_LIMIT_S
    while any(is_running(pid) for pid in workers()):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
