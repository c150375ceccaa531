"""Time a few real training steps of one process on this device, without weights and without writing a run."""

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import Environment
from dinov2.logging import peak_memory_gib
from dinov2.run.dry_step import make_batch
from dinov2.train.batches import DeviceBatches
from dinov2.train.build import build_batches, build_grad_scaler, build_model, build_optimizer, compile_blocks
from dinov2.train.host_memory import keep_freed_memory
from dinov2.train.param_groups import apply_schedules
from dinov2.train.schedules import StepValues
from dinov2.train.stages import Stage
from dinov2.train.train import forward_backward
from dinov2.train.update import clip_gradients

_VALUES = StepValues(lr=1e-6, last_layer_lr=1e-6, wd=0.04, momentum=0.99, teacher_temp=0.07)


@dataclass(frozen=True)
class MeasuredStep:
    """Means over some steps."""

    step_s: float
    data_s: float  # of it, waiting for the loader
    peak_gib: float  # the most memory of the process, or of the device's tensors


class RandomBatches:
    """One finished batch of random crops, again and again, in place of those of a dataset."""

    waited_s = 0.0

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self._batch = batch

    def __next__(self) -> dict[str, Tensor]:
        return dict(self._batch)

    def reset_clock(self) -> None:
        """Nothing is waited for."""

    def close(self) -> None:
        """Nothing is open."""


def measure_step(
    stage: Stage, device: torch.device, dataset: Any, num_steps: int, *, freeze_backbone: bool = False
) -> MeasuredStep:
    """Take one step to warm up, and then some whose mean counts.

    Args:
        stage: of the run; one process takes its share of a step.
        device: of this machine.
        dataset: images; None: random crops.
        num_steps: steps that count, >= 1.
        freeze_backbone: the backbone rests.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model = build_model(stage.cfg, device=device)
    model.init_weights(stage.cfg.train.seed)
    compile_blocks(stage.cfg, model, plan=stage.plan, device=device)
    optimizer = build_optimizer(stage.cfg, model)
    scaler = build_grad_scaler(stage.cfg, device=device)
    values = replace(_VALUES, backbone_lr_factor=0.0 if freeze_backbone else 1.0)
    apply_schedules(optimizer, values)
    with tempfile.TemporaryDirectory() as folder, closing(_batches(stage, device, dataset, Path(folder))) as batches:
        step_s, data_s = [], []
        for _ in range(1 + num_steps):
            started = time.perf_counter()
            metrics = forward_backward(model, batches, plan=stage.plan, values=values, scaler=scaler)
            scaler.unscale_(optimizer)
            clip_gradients(model.student, max_norm=stage.cfg.optim.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            model.apply_center_updates()
            model.update_teacher(values.momentum)
            optimizer.zero_grad(set_to_none=True)
            metrics["total_loss"].item()  # waits for the device
            step_s.append(time.perf_counter() - started)
            data_s.append(batches.waited_s)
    return MeasuredStep(step_s=mean(step_s[1:]), data_s=mean(data_s[1:]), peak_gib=peak_memory_gib(device))


def _batches(stage: Stage, device: torch.device, dataset: Any, folder: Path) -> DeviceBatches | RandomBatches:
    if dataset is None:
        batch = make_batch(stage.cfg, stage.plan.batch_size_per_rank)
        return RandomBatches({n: t if n == "seeds" else t.to(device) for n, t in batch.items()})
    env = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, device=device)
    (folder / "logs").mkdir()
    return build_batches(stage.cfg, dataset, plan=stage.plan, env=env, samples_seen=0, output_dir=folder)
