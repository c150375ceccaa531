"""Stopping and resuming changes nothing in the result."""

import os
import time

import pytest
import torch
from support.training import DINOV3_RUN, assert_same_state, metrics_of, train, train_in_turns, values_but_timing

from dinov2.checkpoint_format import StoredCheckpoint

LAST = "model_0000005"


@pytest.mark.parametrize(
    "options",
    [
        ["train.num_workers=0", "checkpointing.period=2"],
        ["train.num_workers=2", "train.centering=sinkhorn_knopp", "ibot.separate_head=true"],
        ["optim.gradient_accumulation_steps=2", "optim.optimizer=sgd", "train.sampler=epoch"],
        ["compute_precision.param_dtype=fp16", "train.sampler=infinite"],
        [*DINOV3_RUN, "student.pos_embed_rope_jitter_coords=1.5", "dino.reweight_dino_local_loss=true"],
        ["optim.freeze_backbone_epochs=0.5", "optim.unfreeze_ramp_epochs=0.5", "optim.freeze=[embeddings]"],
    ],
    ids=["plain", "workers", "accumulation", "fp16", "dinov3", "frozen"],
)
def test_six_steps_equal_three_a_stop_and_three_more(tmp_path, options):
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "train.max_steps=3") == 0
    torch.manual_seed(123)  # what a new process starts with must not matter
    assert train(tmp_path / "parts", *options) == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name=LAST)
    whole, parts = (values_but_timing(metrics_of(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts and [row["iteration"] for row in whole] == list(range(6))


def test_the_number_of_workers_changes_nothing(tmp_path):
    for workers in (0, 2):
        assert train(tmp_path / str(workers), f"train.num_workers={workers}", "train.max_steps=3") == 0
    assert_same_state(tmp_path / "0", tmp_path / "2", name="model_0000002")


def test_evaluating_changes_nothing(tmp_path):
    knn = "evaluation.knn.train_dataset_path=Digits:split=VAL", "evaluation.knn.val_dataset_path=Digits:split=VAL"
    assert train(tmp_path / "plain") == 0
    assert train(tmp_path / "scored", *knn, "evaluation.eval_period_iterations=2", "evaluation.at_start=true") == 0
    assert_same_state(tmp_path / "plain", tmp_path / "scored", name=LAST, but_for=("metrics",))
    evaluated = sorted(path.name for path in (tmp_path / "scored" / "eval").iterdir())
    assert evaluated == ["start", "training_1", "training_3", "training_5"]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_any_stop_point_gives_the_same_run(tmp_path, whole_run, stop):
    assert train(tmp_path, f"train.max_steps={stop}", f"checkpointing.background={str(stop == 2).lower()}") == 0
    torch.manual_seed(123)
    assert train(tmp_path) == 0
    assert_same_state(whole_run, tmp_path, name=LAST)
    assert values_but_timing(metrics_of(whole_run)) == values_but_timing(metrics_of(tmp_path))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


def test_settings_that_cannot_alter_results_do_not(tmp_path, whole_run, caplog):
    assert train(tmp_path, "train.max_steps=2") == 0
    caplog.clear()
    others = ["train.num_workers=1", "checkpointing.period=1", "logging.period_steps=1", "train.batch_size_per_gpu=3"]
    assert train(tmp_path, *others, "evaluation.eval_period_iterations=3", "evaluation.health.num_images=8") == 0
    assert_same_state(whole_run, tmp_path, name=LAST, but_for=("metrics",))
    assert not [message for message in caplog.messages if message.startswith("changed since")]


def test_settings_that_alter_results_are_reported_one_by_one(tmp_path, caplog):
    assert train(tmp_path, "train.max_steps=1") == 0
    caplog.clear()
    assert train(tmp_path, "train.max_steps=2", "optim.base_lr=0.002", "train.global_batch_size=6") == 0
    assert [message for message in caplog.messages if message.startswith("changed since")] == [
        "changed since model_0000000 was saved: optim.base_lr 0.004 -> 0.002",
        "changed since model_0000000 was saved: train.global_batch_size 12 -> 6",
    ]
    assert [row["current_batch_size"] for row in metrics_of(tmp_path)] == [12, 6]


def test_the_samples_of_a_new_batch_size_follow_those_already_seen(tmp_path):
    assert train(tmp_path, "train.max_steps=2") == 0
    assert train(tmp_path, "train.global_batch_size=6", "train.max_steps=4") == 0
    saved = torch.load(tmp_path / "model_0000003.rank_0.pth", weights_only=True)
    assert saved["extra"]["samples_seen"] == 2 * 12 + 2 * 6


def test_the_global_batch_of_the_checkpoint_is_kept(tmp_path, caplog):
    assert train(tmp_path, "train.max_steps=2") == 0
    caplog.set_level("INFO", logger="dinov2")
    assert train(tmp_path, "train.batch_size_per_gpu=6", "train.max_steps=4") == 0
    assert [row["current_batch_size"] for row in metrics_of(tmp_path)] == [12] * 4
    assert (
        "global_batch=12 is kept from the checkpoint: 12 images per process and pass instead of "
        "train.batch_size_per_gpu=6; train.global_batch_size changes it" in caplog.messages
    )


def test_checkpoints_are_ordered_by_iteration_not_by_the_clock(tmp_path, monkeypatch):
    """A clock that jumps, and copies with other times, change nothing."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert train(tmp_path, "train.max_steps=3", "checkpointing.period=1") == 0
    for number, path in enumerate(sorted(tmp_path.glob("model_*"), reverse=True)):
        os.utime(path, (number * 1000, number * 1000))
    assert train(tmp_path, "train.max_steps=4") == 0
    assert [row["iteration"] for row in metrics_of(tmp_path)] == list(range(4))


ON_TWO_RANKS = {
    "dinov3": [
        *DINOV3_RUN,
        "student.pos_embed_rope_jitter_coords=1.5",
        "student.pos_embed_rope_rescale_coords=2",
        "compute_precision.sharding_strategy=FULL_SHARD",
        "compute_precision.param_dtype=bf16",
    ],
    "workers": ["train.num_workers=2", "compute_precision.sharding_strategy=SHARD_GRAD_OP"],
}


@pytest.fixture(scope="module")
def resumed_on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    train_in_turns(
        [
            (folder / case / part, [*options, "train.batch_size_per_gpu=6", f"train.max_steps={steps}"])
            for case, options in ON_TWO_RANKS.items()
            for part, steps in (("whole", 6), ("parts", 3), ("parts", 6))
        ]
    )
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_two_processes_resume_bit_for_bit(resumed_on_two_ranks, case):
    whole, parts = (resumed_on_two_ranks / case / part for part in ("whole", "parts"))
    assert_same_state(whole, parts, name=LAST, num_ranks=2)


@pytest.mark.dist
def test_with_every_option_of_dinov3_each_parameter_learns_and_buffers_stay(resumed_on_two_ranks):
    folder = resumed_on_two_ranks / "dinov3" / "parts"
    now, then = (StoredCheckpoint.open(folder, name).model for name in (LAST, "model_0000002"))
    constant = {name for name in now if name.endswith(("periods", "bias_mask", "center"))}
    assert len(constant) == 2 * 3 + 2
    for name in now:
        assert torch.equal(now[name].read_all(), then[name].read_all()) == (name in constant), name
