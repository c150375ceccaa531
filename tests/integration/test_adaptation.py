"""Adaptation of real weights: DINOv2's ViT-S/14 with the recipe for small data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "train" / "adapt_small_data.yaml"

pytestmark = pytest.mark.integration


def test_a_learning_rate_100_times_too_high_ends_the_run_and_keeps_its_start(weights, tmp_path):
    options = (
        f"student.pretrained_weights={weights}",
        "train.dataset_path=Digits",
        "train.batch_size_per_gpu=16",
        "train.num_workers=0",
        "train.prototype_init_crops=512",
        "train.OFFICIAL_EPOCH_LENGTH=10",
        "dino.head_n_prototypes=128",
        "ibot.head_n_prototypes=128",
        "crops.global_crops_size=56",
        "crops.local_crops_size=28",
        "crops.local_crops_number=2",
        "evaluation.eval_period_iterations=20",
        "evaluation.health.num_images=128",
        "optim.base_lr=1e-2",  # 100 times that of the recipe
    )
    command = [sys.executable, "dinov2/train/train.py", "--config-file", str(RECIPE), "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    reason = done.stderr.strip().splitlines()[-1]
    assert reason.startswith("error: iteration ") and "the learning rate is the usual cause" in reason
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["evaluation"] == "start"
    start, kept = (
        torch.load(tmp_path / name, weights_only=True)["teacher"]
        for name in ("eval/start/teacher_checkpoint.pth", "best_teacher.pth")
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in start.items())
