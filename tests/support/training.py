"""A run of a few small steps through the training program, and what it leaves behind.

Runs in this process and on forked ranks draw no curves, which takes longer than the steps.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import data_adapters.digits  # noqa: F401, before ranks are forked: importing scikit-learn takes longer than the steps
from dinov2 import distributed
from dinov2.configs import load_config
from dinov2.train.train import do_train, main
from support.dist import launch, run_distributed

PROGRAM = Path(__file__).parents[2] / "dinov2" / "train" / "train.py"

TINY_RUN = (
    "student.arch=vit_tiny",
    "student.embed_dim=32",
    "student.depth=2",
    "student.num_heads=2",
    "student.patch_size=8",
    "student.in_chans=1",
    "student.drop_path_rate=0.2",
    "student.layerscale=0.1",
    "dino.head_n_prototypes=32",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "train.dataset_path=Digits:split=TRAIN",
    "train.batch_size_per_gpu=12",
    "train.OFFICIAL_EPOCH_LENGTH=6",
    "train.num_workers=0",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "evaluation.eval_period_iterations=null",
    "evaluation.at_start=false",
    "logging.period_steps=2",
    "compute_precision.device=cpu",
)

# Over TINY_RUN: the training of DINOv3, with the options of its released backbones.
DINOV3_RUN = (
    "defaults=dinov3",
    "student.num_register_tokens=2",
    "student.mask_k_bias=true",
    "student.untie_cls_and_patch_norms=true",
    "student.untie_global_and_local_cls_norm=true",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
)

# Over TINY_RUN: what gives the same losses on any number of processes that divides the global batch.
ELASTIC_RUN = (
    "train.global_batch_size=12",
    "train.centering=sinkhorn_knopp",
    "student.drop_path_rate=0",
    "student.layerscale=0.5",  # with less, images start so close together that KoLeo amplifies rounding
    "dino.koleo_loss_distributed=true",
    "logging.period_steps=1",
)


def train(output_dir: Path, *options: str) -> int:
    """Run the program in this process; returns its exit code."""
    with _without_curves():
        return main(["--output-dir", str(output_dir), *TINY_RUN, *options])


def start_training(output_dir: Path, *options: str) -> subprocess.Popen[str]:
    """Start the program in a process of its own."""
    command = [sys.executable, str(PROGRAM), "--output-dir", str(output_dir), *TINY_RUN, *options]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train_on_ranks(output_dir: Path, *options: str, num_processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the program under torchrun."""
    command = [str(PROGRAM), "--output-dir", str(output_dir), *TINY_RUN, *options]
    return launch(command, num_processes=num_processes)


def train_in_turns(runs: Sequence[tuple[Path, Sequence[str]]], *, num_processes: int = 2) -> None:
    """Train several runs, each a folder and its options, one after the other on the same forked ranks.

    This costs one start of Python instead of three for each run under torchrun; the program around `do_train` is left
    out.
    """
    args = {"runs": [(str(folder), list(options)) for folder, options in runs]}
    run_distributed("support/training.py:_turns_of_a_rank", num_processes=num_processes, args=args)


def _turns_of_a_rank(runs: Sequence[tuple[str, Sequence[str]]]) -> None:
    for folder, options in runs:
        Path(folder).mkdir(parents=True, exist_ok=True)
        cfg = load_config(None, [*TINY_RUN, *options, f"train.output_dir={folder}"])
        torch.manual_seed(123)  # what a process starts with must not matter
        with _without_curves():
            do_train(cfg, distributed.init("cpu"), output_dir=Path(folder))


def _without_curves() -> AbstractContextManager:
    return mock.patch("dinov2.train.run_log.plot_training_curves")


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """Read the recorded steps."""
    return [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]


def losses_of(output_dir: Path) -> torch.Tensor:
    """Read the total losses, [steps], float64."""
    return torch.tensor([row["total_loss"] for row in metrics_of(output_dir)], dtype=torch.float64)


def assert_same_state(first: Path, second: Path, *, name: str, num_ranks: int = 1, but_for: Sequence[str] = ()) -> None:
    """Compare all that two checkpoints hold but for folder names and times, bit for bit.

    Args:
        first: folder of a run.
        second: folder of another run.
        name: of both checkpoints.
        num_ranks: that saved them.
        but_for: what was given to `save` and may differ.
    """
    for rank in range(num_ranks):
        one, two = (torch.load(folder / f"{name}.rank_{rank}.pth", weights_only=True) for folder in (first, second))
        for part in ("model", "checkpointables", "extra"):
            left, right = ({k: v for k, v in saved[part].items() if k not in but_for} for saved in (one, two))
            assert_equal(left, right, where=part)


def assert_equal(one: Any, two: Any, *, where: str) -> None:
    """Compare nested data, tensors bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], where=f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_equal(left, right, where=f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def values_but_timing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what depends on the machine's speed and memory from recorded steps."""
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_s", "peak_gib")} for row in rows]
