"""`MetricLogger`: every step's raw values reach the file once, whatever the period, interruptions and ranks."""

import json
import logging
import resource
import sys
import types
from pathlib import Path

import pytest
import torch
from support.dist import run_distributed

from dinov2.errors import ConfigError, TrainingError
from dinov2.logging import MetricLogger


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "training_metrics.json").read_text().splitlines()]


def write_steps(folder, steps, *, start_step=0, period_steps=3, total_steps=10):
    with MetricLogger(folder, period_steps=period_steps, total_steps=total_steps, start_step=start_step) as recorder:
        for step in steps:
            recorder.record(step, {"total_loss": torch.tensor(step / 3), "lr": 0.1 * step})


@pytest.mark.parametrize("period_steps", [1, 3, 100])
def test_every_step_is_written_once_with_raw_values(tmp_path, period_steps):
    write_steps(tmp_path, range(7), period_steps=period_steps)
    written = lines(tmp_path)
    assert [line["iteration"] for line in written] == list(range(7))
    for step, line in enumerate(written):
        assert list(line) == ["iteration", "total_loss", "lr"]
        assert torch.equal(torch.tensor(line["total_loss"]), torch.tensor(step / 3))  # to the last bit of float32


def test_nothing_is_written_before_the_period_is_full(tmp_path):
    recorder = MetricLogger(tmp_path, period_steps=4, total_steps=8)
    for step, expected in ((0, 0), (1, 0), (2, 0), (3, 4), (4, 4)):
        recorder.record(step, {"total_loss": 1.0})
        assert len(lines(tmp_path)) == expected
    recorder.flush()
    assert len(lines(tmp_path)) == 5
    recorder.close()


def test_resumed_run_cuts_the_file_back(tmp_path):
    write_steps(tmp_path, range(8))
    write_steps(tmp_path, range(5, 10), start_step=5)
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["training_metrics.json"]


def test_cut_back_keeps_nulls_and_drops_a_half_written_line(tmp_path):
    file = tmp_path / "training_metrics.json"
    file.write_text('{"iteration": 0, "total_loss": null}\n{"iteration": 1, "total_loss": 2.5}\n{"iteration": 2, "tot')
    write_steps(tmp_path, [2], start_step=2)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2]
    assert lines(tmp_path)[:2] == [{"iteration": 0, "total_loss": None}, {"iteration": 1, "total_loss": 2.5}]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    write_steps(tmp_path, range(8))
    write_steps(tmp_path, range(2))
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1]


def test_non_finite_values_are_null(tmp_path):
    with MetricLogger(tmp_path, period_steps=1, total_steps=1) as recorder:
        recorder.record(0, {"total_loss": torch.tensor(float("nan")), "a": float("inf"), "b": -float("inf"), "c": 1})
    text = (tmp_path / "training_metrics.json").read_text()
    assert text == '{"iteration": 0, "total_loss": null, "a": null, "b": null, "c": 1.0}\n'


@pytest.mark.parametrize("period_steps", [1, 3])
def test_scores_join_the_line_of_their_step(tmp_path, period_steps):
    with MetricLogger(tmp_path, period_steps=period_steps, total_steps=4) as recorder:
        for step in range(4):
            recorder.record(step, {"total_loss": float(step)})
            if step == 1:
                recorder.record_scores(step, {"knn_top1_pct": 71.25})
    assert [list(line) for line in lines(tmp_path)] == [
        ["iteration", "total_loss"],
        ["iteration", "total_loss", "knn_top1_pct"],
        ["iteration", "total_loss"],
        ["iteration", "total_loss"],
    ]
    assert lines(tmp_path)[1] == {"iteration": 1, "total_loss": 1.0, "knn_top1_pct": 71.25}


def test_scores_join_the_line_of_their_step_after_an_interruption(tmp_path):
    write_steps(tmp_path, range(6))
    for score in (55.123, 50.0, 50.0):
        with MetricLogger(tmp_path, period_steps=3, total_steps=10, start_step=5) as recorder:
            recorder.record_scores(4, {"knn_top1_pct": score})
    written = lines(tmp_path)
    assert [line["iteration"] for line in written] == list(range(5))
    assert list(written[4]) == ["iteration", "total_loss", "lr", "knn_top1_pct"]
    assert written[4]["knn_top1_pct"] == 50.0


def test_a_full_disk_ends_with_a_sentence(tmp_path):
    recorder = MetricLogger(tmp_path, period_steps=1, total_steps=10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(TrainingError) as caught:
            recorder.record(0, {"total_loss": 1.0})
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{tmp_path}/training_metrics.json cannot be written (File too large); the last checkpoint is intact, start "
        f"again once there is room"
    )


def test_gradients_are_not_kept(tmp_path):
    weight = torch.ones(3, requires_grad=True)
    with MetricLogger(tmp_path, period_steps=2, total_steps=2) as recorder:
        recorder.record(0, {"total_loss": weight.sum(), "n": torch.tensor(4)})
        recorder.record(1, {"total_loss": weight.mean().bfloat16(), "n": torch.tensor(True)})
    assert [line["total_loss"] for line in lines(tmp_path)] == [3.0, 1.0]


def test_what_was_recorded_before_an_error_is_written(tmp_path):
    with pytest.raises(RuntimeError), MetricLogger(tmp_path, period_steps=10, total_steps=10) as recorder:
        recorder.record(0, {"total_loss": 5.0})
        raise RuntimeError
    assert [line["iteration"] for line in lines(tmp_path)] == [0]


def test_plain_line_elsewhere_than_on_a_terminal(tmp_path, caplog):
    values = {"total_loss": 9.4132, "lr": 2e-4, "images_per_s": 1843.0, "data_s": 0.004, "peak_gib": 31.2}
    with caplog.at_level(logging.INFO, logger="dinov2.train"):
        with MetricLogger(tmp_path, period_steps=2, total_steps=4) as recorder:
            recorder.record(0, values)
            recorder.record(1, values | {"total_loss": 9.4134})
            recorder.record(2, {"total_loss": 1.0})
    shown = [record.getMessage() for record in caplog.records if record.name == "dinov2.train"]
    assert shown == [
        "step=2 loss=9.4133 lr=2.0e-04 images_per_s=1843 data_s=0.004 peak_gib=31.2",
        "step=3 loss=1.0000",
    ]


def test_bar_on_a_terminal(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, logger="dinov2.train"):
        with MetricLogger(tmp_path, period_steps=2, total_steps=4, start_step=2) as recorder:
            recorder.record(2, {"total_loss": 2.0, "lr": 1e-3, "images_per_s": 10.0})
            recorder.record(3, {"total_loss": 3.0, "lr": 1e-3, "images_per_s": 10.0})
    assert not [record for record in caplog.records if record.name == "dinov2.train"]
    last = capsys.readouterr().err.split("\r")[-1]
    assert "4/4" in last and "loss=2.5000, lr=1.0e-03, images_per_s=10" in last


def test_tensorboard_holds_the_same_values(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLogger(tmp_path, period_steps=2, total_steps=3, tensorboard=True) as recorder:
        for step in range(3):
            recorder.record(step, {"total_loss": float(step)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(0, 0.0), (1, 1.0), (2, 2.0)]


class FakeWandb(types.ModuleType):
    """Keeps what it is told; no network."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.asked = [], []

    def init(self, **settings):
        self.asked.append(settings)
        return types.SimpleNamespace(
            id="run7", define_metric=lambda *_, **__: None, log=self.logged.append, finish=lambda: None
        )


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 1):
        with MetricLogger(tmp_path, period_steps=1, total_steps=2, start_step=start, wandb=True, config={"a": 1}) as m:
            m.record(start, {"total_loss": 1.0})
    assert wandb.logged == [{"iteration": 0, "total_loss": 1.0}, {"iteration": 1, "total_loss": 1.0}]
    assert [settings["id"] for settings in wandb.asked] == [None, "run7"]
    assert wandb.asked[0]["config"] == {"a": 1}


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        MetricLogger(tmp_path, period_steps=1, total_steps=1, wandb=True)
    assert str(caught.value) == (
        "logging.wandb=true needs the package wandb; install it with: pip install 'dinov2-adapt[wandb]'"
    )
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        MetricLogger(tmp_path, period_steps=1, total_steps=1, tensorboard=True)
    assert str(caught.value) == (
        "logging.tensorboard=true needs the package tensorboard; "
        "install it with: pip install 'dinov2-adapt[tensorboard]'"
    )


def test_an_unwritable_file_is_named(tmp_path):
    (tmp_path / "training_metrics.json").mkdir()
    with pytest.raises(ConfigError, match=r"training_metrics\.json: cannot be written \("):
        MetricLogger(tmp_path, period_steps=1, total_steps=1)


def record_on_rank(folder):
    from dinov2 import distributed

    rank = distributed.get_rank()
    with MetricLogger(folder, period_steps=2, total_steps=5) as recorder:
        for step in range(5):
            recorder.record(step, {"total_loss": torch.tensor(float(step + rank)), "rank": rank})
            if step == 2:
                recorder.record_scores(step, {"knn_top1_pct": 50.0})
    return rank


@pytest.mark.dist
def test_values_are_means_over_ranks_and_one_rank_writes(tmp_path):
    run_distributed(record_on_rank, args={"folder": str(tmp_path)})
    written = lines(tmp_path)
    assert [line["total_loss"] for line in written] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert written[2] == {"iteration": 2, "total_loss": 2.5, "rank": 0.5, "knn_top1_pct": 50.0}
