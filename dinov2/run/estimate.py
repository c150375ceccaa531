"""What a run will cost before it starts: memory of a device, arithmetic, steps, time, disk; and what to change.

    python run/estimate.py --config-file F [--ranks N] [--memory-gib G] [--num-images N] [--measure-steps N] [key=value]

Memory and arithmetic come from a dry step of each stage (dinov2/run/dry_step.py), time from a few real steps of one
process on this device. Neither reads weights; images are read only to time them, and to count them.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2.configs import Config, load_config, require_trainable, stage_configs
from dinov2.data import pass_size
from dinov2.errors import ConfigError
from dinov2.eval.build import DTYPES, compute_dtype
from dinov2.logging import run_program, setup_logging
from dinov2.run.device_memory import GPU_ALLOWANCE_BYTES, Target, cost_of, memory_of
from dinov2.run.dry_step import StepCost
from dinov2.run.estimate_report import format_report
from dinov2.run.measured_step import measure_step
from dinov2.run.named_dataset import open_dataset
from dinov2.train.stages import Stage, Stages, plan_stages

_GIB = 2**30
_UNKNOWN_IMAGES = 2**40  # where train.OFFICIAL_EPOCH_LENGTH says how long an epoch is


@dataclass(frozen=True)
class Phase:
    """Steps of a run that cost the same."""

    name: str
    stage: Stage
    freeze_backbone: bool
    num_steps: int
    cost: StepCost


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate as the command line says; returns the exit code (0 it fits, 1 it does not, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="estimate.py",
        description="Memory, arithmetic, steps, time and disk of a run, before it starts; where it does not fit, which "
        "keys to change. Exits with 1 if it does not fit.",
    )
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file of the run; default: none")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, one a device; default: 1")
    parser.add_argument("--memory-gib", type=float, metavar="G", help="memory of a device, GiB; default: this one's")
    parser.add_argument("--num-images", type=int, metavar="N", help="images of the dataset; default: they are counted")
    parser.add_argument(
        "--measure-steps",
        type=int,
        default=3,
        metavar="N",
        help="real steps on this device, after one to warm up, whose mean gives the time; 0: none; default: 3",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. train.checkpointing=true"
    )
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    for option, value, least in (("--ranks", args.ranks, 1), ("--measure-steps", args.measure_steps, 0)):
        if value < least:
            raise ConfigError(f"{option} {value}: must be at least {least}")
    cfg = load_config(args.config_file, args.opts)
    require_trainable(cfg)
    setup_logging(None, rank=0)
    dataset = open_dataset(cfg.train.dataset_path, cfg) if cfg.train.dataset_path else None
    stages = plan_stages(cfg, dataset_size=_num_images(args.num_images, dataset, cfg), world_size=args.ranks)
    target = choose_target(cfg, num_ranks=args.ranks)
    available = int(args.memory_gib * _GIB) if args.memory_gib is not None else memory_of_device(target)
    phases = plan_phases(stages, target)
    report = describe(cfg, stages, phases, target) | {"available_gib": None if available is None else available / _GIB}
    report["fits"] = available is None or report["peak_gib"] * _GIB <= available
    if not report["fits"]:
        report["changes"] = find_changes(args.config_file, args.opts, target, available=available)
    if args.measure_steps and report["fits"]:
        report |= _time(phases, target, dataset, num_steps=args.measure_steps)
    print(json.dumps(report) if args.json else format_report(report))
    return 0 if report["fits"] else 1


def _num_images(given: int | None, dataset: Any, cfg: Config) -> int:
    """Images of one pass over the data."""
    if given is not None:
        return given
    if dataset is not None:
        return pass_size(dataset)
    if any(stage.train.OFFICIAL_EPOCH_LENGTH is None for _, stage in stage_configs(cfg)):
        raise ConfigError(
            "train.dataset_path is empty, and train.OFFICIAL_EPOCH_LENGTH=null counts the images; name the images, or "
            "give --num-images"
        )
    return _UNKNOWN_IMAGES


def choose_target(cfg: Config, *, num_ranks: int) -> Target:
    """Find out what the run is to run on; a GPU that this machine lacks is taken to have bfloat16."""
    name = cfg.compute_precision.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return Target("cpu", compute_dtype(cfg, device=device), num_ranks, overhead=resident_bytes())
    precision = cfg.compute_precision.param_dtype
    if precision == "auto" and not torch.cuda.is_available():
        return Target("cuda", torch.bfloat16, num_ranks, overhead=GPU_ALLOWANCE_BYTES)
    dtype = compute_dtype(cfg, device=device) if precision == "auto" else DTYPES[precision]
    return Target("cuda", dtype, num_ranks, overhead=GPU_ALLOWANCE_BYTES)


def resident_bytes() -> int:
    """Return what this process, which has loaded what a training process loads, holds in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not a Linux
        return _GIB // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_of_device(target: Target) -> int | None:
    """Return the bytes of this machine's device for one process; None: it has none of the kind."""
    if target.device_type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // target.num_ranks
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def plan_phases(stages: Stages, target: Target) -> list[Phase]:
    """Take a dry step of each stage, and of the time in which its backbone rests."""
    phases = []
    for stage in stages:
        num_steps = max(stage.plan.last_step - stage.plan.first_step, 0)
        resting = stage.schedules.frozen_backbone_steps if stage.schedules.backbone_lr_multiplier else num_steps
        resting = min(resting, num_steps)
        for is_frozen, number in ((True, resting), (False, num_steps - resting)):
            if number:
                batch = stage.plan.batch_size_per_rank
                cost = cost_of(stage.cfg, target, batch_size=batch, freeze_backbone=is_frozen)
                name = " ".join(filter(None, [stage.name, "with a frozen backbone" if is_frozen else ""]))
                phases.append(Phase(name or "all steps", stage, is_frozen, number, cost))
    return phases


def describe(cfg: Config, stages: Stages, phases: Sequence[Phase], target: Target) -> dict[str, Any]:
    """Return the numbers of a run that need no measurement."""
    heaviest = max(phases, key=lambda phase: _peak(phase.cost, cfg, target))
    saved, teacher = heaviest.cost.saved, heaviest.cost.teacher
    num_steps = stages.last_step
    saving = cfg.checkpointing
    kept = min(saving.max_to_keep or math.inf, max(-(-num_steps // saving.period), 1))
    kept += num_steps // saving.keep_every if saving.keep_every else 0
    kept += saving.save_best is not None
    period = cfg.evaluation.eval_period_iterations
    num_evaluations = (num_steps // period if period else 0) + cfg.evaluation.at_start
    return {
        "device": target.device_type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "ranks": target.num_ranks,
        "sharding": cfg.compute_precision.sharding_strategy,
        "recomputation": cfg.train.recomputation,
        "memory_gib": {name: size / _GIB for name, size in memory_of(heaviest.cost, cfg, target).items()},
        "peak_gib": _peak(heaviest.cost, cfg, target) / _GIB,
        "peak_in": heaviest.name,
        "steps": num_steps,
        "phases": [
            {
                "name": phase.name,
                "steps": phase.num_steps,
                "epochs": phase.num_steps / phase.stage.plan.epoch_length,
                "images_per_step": phase.stage.plan.global_batch_size,
                "tflop_per_step_and_rank": phase.cost.flops / 1e12,
                "peak_gib": _peak(phase.cost, cfg, target) / _GIB,
            }
            for phase in phases
        ],
        "checkpoint_gib": saved / _GIB,
        "disk_gib": (saved * kept + teacher * num_evaluations) / _GIB,
        "checkpoints_kept": kept,
        "evaluations": num_evaluations,
    }


def _peak(cost: StepCost, cfg: Config, target: Target) -> int:
    return sum(memory_of(cost, cfg, target).values())


def find_changes(
    config_file: str | None, opts: Sequence[str], target: Target, *, available: int
) -> list[dict[str, Any]]:
    """Try settings that need less memory, in the order of what they cost, until one fits.

    Returns:
        Keys and peak of each that was tried; the last one fits, or nothing that was tried does.
    """
    tried = []
    for keys in _cheaper(load_config(config_file, opts), target):
        cfg = load_config(config_file, [*opts, *keys])
        peak = 0
        for stage in plan_stages(cfg, dataset_size=_UNKNOWN_IMAGES, world_size=target.num_ranks):
            cost = cost_of(stage.cfg, target, batch_size=stage.plan.batch_size_per_rank)
            peak = max(peak, _peak(cost, cfg, target))
        tried.append({"keys": list(keys), "peak_gib": peak / _GIB, "fits": peak <= available})
        if peak <= available:
            break
    return tried


def _cheaper(cfg: Config, target: Target) -> list[list[str]]:
    """List settings that need less memory, each with those before it that do not hurt."""
    found: list[list[str]] = []
    keys: list[str] = []
    if target.num_ranks > 1 and cfg.compute_precision.sharding_strategy != "FULL_SHARD":
        keys = ["compute_precision.sharding_strategy=FULL_SHARD"]
        found.append(keys)
    if not cfg.student.is_resnet:
        if cfg.train.recomputation == "none":
            found.append([*keys, "train.checkpointing=true"])
        if cfg.train.recomputation != "full":
            keys = [*keys, "train.checkpointing_full=true"]
            found.append(keys)
    batch, passes = cfg.train.batch_size_per_gpu, cfg.optim.gradient_accumulation_steps
    if cfg.train.global_batch_size is not None:
        batch = cfg.train.global_batch_size // (target.num_ranks * passes)
    while batch % 2 == 0:
        batch, passes = batch // 2, passes * 2
        smaller = [] if cfg.train.global_batch_size is not None else [f"train.batch_size_per_gpu={batch}"]
        found.append([*keys, *smaller, f"optim.gradient_accumulation_steps={passes}"])
    if cfg.student.pretrained_weights and not cfg.lora.rank and not cfg.student.is_resnet:
        found.append([*(found[-1] if found else []), "lora.rank=16"])
    return found


def _time(phases: Sequence[Phase], target: Target, dataset: Any, *, num_steps: int) -> dict[str, Any]:
    """Measure the steps of one phase and carry them over to the others by their arithmetic."""
    if target.device_type == "cuda" and not torch.cuda.is_available():
        return {"not_measured": "this machine has no GPU"}
    phase = max(phases, key=lambda phase: phase.num_steps)
    measured = measure_step(
        phase.stage, torch.device(target.device_type), dataset, num_steps, freeze_backbone=phase.freeze_backbone
    )
    seconds = sum(other.num_steps * measured.step_s * other.cost.flops / phase.cost.flops for other in phases)
    return {
        "step_s": measured.step_s,
        "data_s": measured.data_s,
        "measured_peak_gib": measured.peak_gib,
        "measured_with": "images of the dataset" if dataset is not None else "random images",
        "measured_in": phase.name,
        "total_hours": seconds / 3600,
    }
