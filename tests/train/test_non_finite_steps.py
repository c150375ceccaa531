"""A step whose loss or gradients are not finite is cancelled as a whole, on all ranks; three in a row end the run."""

from pathlib import Path

import pytest
import torch
from support.dist import run_distributed
from support.training import assert_equal, metrics_of, train

from dinov2.data import DataAugmentationDINO
from dinov2.distributed import get_rank

EVERY_STEP = ("checkpointing.period=1", "checkpointing.max_to_keep=null")


def poison(monkeypatch, *, calls, rank=0):
    """Make one pixel of the given batches (counted from 0) NaN on one rank."""
    finish, count = DataAugmentationDINO.finish, iter(range(1000))

    def poisoned(self, crops, seeds):
        batch = finish(self, crops, seeds)
        if next(count) in calls and get_rank() == rank:
            batch["collated_global_crops"][0, 0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(DataAugmentationDINO, "finish", poisoned)


def state_of(folder, step, rank=0):
    return torch.load(folder / f"model_{step:07d}.rank_{rank}.pth", weights_only=True)


def assert_nothing_learned(folder, step, rank=0):
    """Compare networks, centres and optimiser with the step before; learning rate and random numbers go on."""
    before, after = state_of(folder, step - 1, rank), state_of(folder, step, rank)
    assert_equal(before["model"], after["model"], where="model")
    one, two = (saved["checkpointables"]["optimizer"]["state"] for saved in (before, after))
    assert_equal(one, two, where="optimizer")


@pytest.mark.parametrize(
    "options",
    [
        ["train.centering=centering"],
        ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"],
        ["optim.optimizer=sgd"],
    ],
    ids=["centering", "sinkhorn", "sgd"],
)
def test_a_cancelled_step_leaves_no_trace(tmp_path, monkeypatch, capsys, options):
    poison(monkeypatch, calls=[2])
    assert train(tmp_path, *EVERY_STEP, *options) == 0
    assert_nothing_learned(tmp_path, 2)
    for before, after in ((0, 1), (2, 3)):
        changed = state_of(tmp_path, before)["model"], state_of(tmp_path, after)["model"]
        assert not torch.equal(changed[0]["teacher.backbone.cls_token"], changed[1]["teacher.backbone.cls_token"])
    rows = metrics_of(tmp_path)
    assert len(rows) == 6 and [row["iteration"] for row in rows if row["total_loss"] is None] == [2]
    assert "WARNING dinov2.train.update step=2 cancelled: the loss on rank 0 became NaN" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path, 5)["model"].values())


def test_three_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, calls=[0, 1, 3, 4, 5])
    assert train(tmp_path, *EVERY_STEP) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: iteration 5: the loss on rank 0 became NaN or infinite 3 times in a row; nothing of these steps was "
        "kept. Lower optim.base_lr, lengthen optim.warmup_epochs, or look for broken images; the last checkpoint is "
        "intact"
    )
    assert len(metrics_of(tmp_path)) == 6


def test_a_learning_rate_that_is_too_large(tmp_path, capsys):
    assert train(tmp_path, *EVERY_STEP, "optim.base_lr=1e30", "optim.scaling_rule=none") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: iteration 3: the loss on rank 0 became NaN or infinite 3 times in a row; ")
    for step in range(3):
        assert all(tensor.isfinite().all() for tensor in state_of(tmp_path, step)["model"].values())


def train_poisoned_on_rank_1(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, calls=[1], rank=1)
        return train(Path(folder), *EVERY_STEP, "train.batch_size_per_gpu=6", "train.max_steps=3")


@pytest.mark.dist
def test_nan_on_one_rank_cancels_the_step_on_all(tmp_path):
    assert run_distributed(train_poisoned_on_rank_1, args={"folder": str(tmp_path)}) == [0, 0]
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert "WARNING dinov2.train.update step=1 cancelled: the loss on rank 1 became NaN or infinite" in log
    for rank in range(2):
        assert_nothing_learned(tmp_path, 1, rank)
    assert [row["iteration"] for row in metrics_of(tmp_path) if row["total_loss"] is None] == [1]
