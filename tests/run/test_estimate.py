"""`run/estimate.py`: its numbers against those of real steps and real files, its sentences and exit codes."""

import json

import pytest
import torch
from support.meta_arch import TINY, random_batch, tiny_arch
from support.training import TINY_RUN, train
from torch.utils.flop_counter import FlopCounterMode

from dinov2.configs import load_config
from dinov2.run.device_memory import Target, memory_of, split_over
from dinov2.run.dry_step import dry_step
from dinov2.run.estimate import main

QUICK = ("--measure-steps", "0", "--json")


def estimate(capsys, *argv):
    """Return exit code, report and the last line of the errors."""
    code = main([*argv, *QUICK])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err.strip()


def dry(*overrides, **kwargs):
    return dry_step(load_config(None, [*TINY, *overrides]), batch_size=4, dtype=torch.float32, **kwargs)


def test_operations_and_sizes_are_those_of_a_real_step():
    model, cost = tiny_arch(), dry("ibot.mask_sample_probability=1", "ibot.mask_ratio_min_max=[0.25, 0.25]")
    batch = random_batch()
    batch["collated_masks"] = torch.zeros_like(batch["collated_masks"])
    batch["mask_indices_list"], batch["masks_weight"] = torch.arange(32), torch.ones(32)
    with FlopCounterMode(display=False) as counter:
        model.forward_backward(batch, teacher_temp=0.07)
    assert cost.flops == counter.get_total_flops()
    num_params = sum(param.numel() for param in model.student.parameters())
    assert cost.student == cost.teacher == 4 * num_params
    assert cost.gradients == 4 * num_params and cost.frozen == 0
    assert cost.averages == pytest.approx(8 * num_params, rel=0.01)  # and the number of steps, for each parameter


def test_recomputation_and_rest_need_less_memory():
    keeps_all, selective, full = dry(), dry("train.checkpointing=true"), dry("train.checkpointing_full=true")
    assert keeps_all.working > selective.working > full.working
    assert full.flops > keeps_all.flops == selective.flops
    frozen = dry(freeze_backbone=True)
    assert frozen.flops < keeps_all.flops and frozen.working < keeps_all.working
    low_rank = dry("student.pretrained_weights=x.pth", "lora.rank=2")
    assert low_rank.averages < keeps_all.averages and low_rank.gradients < keeps_all.gradients
    anchored = dry("student.pretrained_weights=x.pth", "anchor.patch_weight=1", "anchor.max_tokens=4")
    assert anchored.frozen > 0 and anchored.flops > keeps_all.flops


@pytest.mark.parametrize(
    ("strategy", "split"), [("NO_SHARD", 1), ("SHARD_GRAD_OP", 16), ("FULL_SHARD", 16), ("HYBRID_SHARD", 4)]
)
def test_networks_are_split_over_the_ranks(strategy, split):
    keys = [*TINY, f"compute_precision.sharding_strategy={strategy}", "compute_precision.hybrid_shard_size=4"]
    cfg = load_config(None, keys)
    assert split_over(cfg, num_ranks=16) == split
    cost = dry(is_sharded=True)
    parts = memory_of(cost, cfg, Target("cuda", torch.float32, 16, overhead=0))
    assert parts["student"] == -(-cost.student // split)
    assert parts["optimiser's averages"] == -(-cost.averages // split)
    gathers_all = strategy in ("NO_SHARD", "SHARD_GRAD_OP")
    whole = 4 * (cost.num_student + cost.num_teacher)
    assert (parts["gathered weights"] == whole) == gathers_all and parts["gathered weights"] <= whole


def test_checkpoints_are_copied_in_the_memory_of_the_host():
    cost, cfg = dry(), load_config(None, TINY)
    parts = memory_of(cost, cfg, Target("cpu", torch.float32, 2, overhead=0))
    assert 2 * parts["copy for checkpoints"] == pytest.approx(cost.saved, abs=1)
    assert "copy for checkpoints" not in memory_of(cost, cfg, Target("cuda", torch.float32, 2, overhead=0))


def test_a_checkpoint_is_as_large_as_the_file(tmp_path, capsys):
    train(tmp_path, "train.max_steps=1")
    size = sum(file.stat().st_size for file in tmp_path.glob("model_*.rank_0.pth"))
    code, report, _ = estimate(capsys, *TINY_RUN)
    assert code == 0
    assert report["checkpoint_gib"] * 2**30 == pytest.approx(size, rel=0.3)  # names and places weigh in small networks
    assert size > report["checkpoint_gib"] * 2**30


def test_steps_of_stages_and_of_a_resting_backbone(capsys):
    stages = "stages=[{name: heads, epochs: 2, optim: {freeze_backbone_epochs: 2}}, {name: adapt, epochs: 3}]"
    code, report, _ = estimate(capsys, *TINY_RUN, stages, "optim.epochs=5")
    assert code == 0 and report["steps"] == 30
    found = [(phase["name"], phase["steps"], phase["epochs"]) for phase in report["phases"]]
    assert found == [("heads with a frozen backbone", 12, 2), ("adapt", 18, 3)]


def test_what_does_not_fit_comes_with_keys_that_make_it_fit(capsys):
    keys = (*TINY, "train.batch_size_per_gpu=8", "compute_precision.device=cuda", "compute_precision.param_dtype=fp32")
    _, roomy, _ = estimate(capsys, *keys, "--memory-gib", "24")
    code, report, _ = estimate(capsys, *keys, "--memory-gib", str(roomy["peak_gib"] * 0.9999))
    assert code == 1 and not report["fits"]
    assert report["changes"][0]["keys"] == ["train.checkpointing=true"] and report["changes"][0]["fits"]
    keys = (*keys, "train.checkpointing_full=true", "train.batch_size_per_gpu=2")
    code, report, _ = estimate(capsys, *keys, "--memory-gib", "1")
    assert code == 1 and not any(change["fits"] for change in report["changes"])
    smaller = ["train.batch_size_per_gpu=1", "optim.gradient_accumulation_steps=2"]
    assert [change["keys"] for change in report["changes"]] == [smaller]


def test_real_steps_are_timed(capsys):
    assert main([*TINY_RUN, "--measure-steps", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured_with"] == "images of the dataset"
    assert report["total_hours"] == pytest.approx(report["step_s"] * report["steps"] / 3600)
    assert main([*TINY, "--measure-steps", "1"]) == 0
    assert "measured with random images" in capsys.readouterr().out


def test_bad_usage_is_one_sentence(capsys):
    code, _, error = estimate(capsys, *TINY, "--ranks", "0")
    assert (code, error) == (2, "error: --ranks 0: must be at least 1")
    code, _, error = estimate(capsys, *TINY, "train.OFFICIAL_EPOCH_LENGTH=null")
    assert (code, error) == (
        2,
        "error: train.dataset_path is empty, and train.OFFICIAL_EPOCH_LENGTH=null counts the images; name the images, "
        "or give --num-images",
    )
    code, report, _ = estimate(capsys, *TINY, "train.OFFICIAL_EPOCH_LENGTH=null", "--num-images", "6400")
    assert code == 0 and report["steps"] == 10000
