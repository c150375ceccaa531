"""Train: self-supervised training of student and EMA teacher, as library module and as program.

torchrun --nproc_per_node=4 dinov2/train/train.py --config-file F --output-dir D [key=value ...]
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.configs import Config, batch_size_per_rank, load_config, require_train_dataset, require_trainable
from dinov2.configs.run_sections import TrainConfig
from dinov2.data import pass_size
from dinov2.distributed import Environment, on_every_rank, on_main_first
from dinov2.errors import ConfigError
from dinov2.logging import end_program, peak_memory_gib, plot_training_curves, run_program, setup_logging
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.train.batches import DeviceBatches
from dinov2.train.build import (
    RunPlan,
    build_batches,
    build_checkpointer,
    build_dataset,
    build_grad_scaler,
    build_metric_logger,
    build_model,
    build_optimizer,
    build_schedules,
    plan_run,
    require_equal_sizes,
    seed_global_generators,
)
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.host_memory import keep_freed_memory
from dinov2.train.param_groups import apply_schedules
from dinov2.train.resume import require_something_to_evaluate, resume
from dinov2.train.run_folder import CURVES_NAME, begin_run, prepare_output_dir
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stop_signal import StopSignal
from dinov2.train.update import CancelledSteps, agree, clip_gradients

logger = logging.getLogger("dinov2.train")


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train DINOv2 on your own images. Start it with python for one process, torchrun for several.",
        epilog="Without flags a run goes on from the newest complete checkpoint in its folder, if there is one. "
        "Ctrl-C and SIGTERM end the step, save and exit with 0; torchrun passes SIGTERM on, itself exits with 1, and "
        "kills what has not ended after 30 s (its --shutdown-timeout). "
        "All keys with defaults and units: configs/ssl_default_config.yaml.",
    )
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file over the defaults; default: none")
    parser.add_argument(
        "--output-dir",
        metavar="D",
        help=f"folder of the run; stands for train.output_dir (default {TrainConfig.output_dir}, this folder)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew; refused where the folder holds a run; default: resume"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --no-resume: remove the run that the folder holds, once the new one is ready to start; default: no",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the newest checkpoint into eval/manual_<iteration> and end; default: train",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. optim.epochs=10; default: none"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (0 done or stopped on request, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    if args.overwrite and not args.no_resume:
        raise ConfigError("--overwrite removes a run and is only for --no-resume")
    if args.eval_only and args.no_resume:
        raise ConfigError("--eval-only evaluates the run that --no-resume would leave aside; give one of them")
    overrides = list(args.opts)
    if args.output_dir is not None:
        overrides.append(f"train.output_dir={args.output_dir}")
    if args.no_resume:
        overrides.append("train.resume=false")
    cfg = load_config(args.config_file, overrides)
    require_train_dataset(cfg)
    require_trainable(cfg)
    batch_size_per_rank(cfg, world_size=distributed.launched_world_size())
    env = distributed.init(cfg.compute_precision.device)
    if env.device.type == "cpu":
        keep_freed_memory()
    try:
        output_dir = Path(cfg.train.output_dir)
        on_main_first(lambda: prepare_output_dir(cfg, overwrite=args.overwrite))
        setup_logging(output_dir, rank=env.rank)
        for note in cfg.notes:
            logger.info("%s", note)
        return do_train(cfg, env, output_dir=output_dir, eval_only=args.eval_only, overwrite=args.overwrite)
    finally:
        distributed.shutdown()


def do_train(
    cfg: Config, env: Environment, *, output_dir: Path, eval_only: bool = False, overwrite: bool = False
) -> int:
    """Build, resume, loop; returns the exit code.

    Args:
        cfg: config of the run.
        env: rank and device of this process.
        output_dir: folder of the run; exists.
        eval_only: evaluate the newest checkpoint instead of training.
        overwrite: remove the run that the folder holds, after everything that can fail at the start.

    Raises:
        Dinov2Error: settings, data, weights or the run itself do not allow to go on.
    """
    dataset = on_every_rank(lambda: build_dataset(cfg, output_dir=output_dir))
    require_equal_sizes(dataset)
    plan = plan_run(cfg, dataset_size=pass_size(dataset), world_size=env.world_size)
    evaluate = on_every_rank(lambda: TeacherEvaluation(cfg, env, dataset=dataset, output_dir=output_dir))
    seed_global_generators(cfg.train.seed + env.rank)
    model = build_model(cfg, device=env.device)
    optimizer = build_optimizer(cfg, model)
    scaler = build_grad_scaler(cfg, device=env.device)
    schedules = build_schedules(cfg, plan=plan)
    saver = build_checkpointer(cfg, model, optimizer=optimizer, scaler=scaler, output_dir=output_dir, plan=plan)
    start = resume(cfg, saver.checkpointer, model)
    _log_start(model, plan=plan, dataset_size=len(dataset), env=env)

    if eval_only:
        require_something_to_evaluate(cfg, start)
        evaluate(model, f"manual_{max(start.step - 1, 0)}")
        return 0
    on_main_first(lambda: begin_run(cfg, plan, output_dir, overwrite=overwrite))
    if start.step >= plan.last_step:
        logger.info("all %d steps are done; to go on, raise optim.epochs or train.max_steps", plan.last_step)
    elif start.step:
        logger.info("resuming at step %d of %d", start.step, plan.last_step)
    if start.step == 0 and cfg.evaluation.at_start:
        evaluate(model, "start")

    samples_seen = start.samples_seen
    cancelled = CancelledSteps()
    with (
        StopSignal() as stop,
        build_batches(cfg, dataset, plan=plan, env=env, samples_seen=samples_seen, output_dir=output_dir) as batches,
        build_metric_logger(cfg, plan=plan, start_step=start.step, output_dir=output_dir) as log,
    ):
        for step in range(start.step, plan.last_step):
            started = time.perf_counter()
            values = schedules[step]
            apply_schedules(optimizer, values)

            metrics = forward_backward(model, batches, plan=plan, values=values, scaler=scaler)
            samples_seen += plan.global_batch_size

            scaler.unscale_(optimizer)
            metrics |= clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
            verdict = agree(metrics["total_loss"], metrics["grad_norm"], stop=stop.received is not None)

            if verdict.is_finite:
                scaler.step(optimizer)
                model.apply_center_updates()
                model.update_teacher(values.momentum)
            else:
                model.discard_center_updates()
                model.discard_batch_statistics()
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            step_s = time.perf_counter() - started
            log.record(step, metrics | _schedule_metrics(values) | _speed_metrics(plan, env, step_s, batches.waited_s))
            cancelled.note(verdict, step=step, loss=metrics["total_loss"], scaler=scaler)

            # Before the evaluation, which may take longer than a scheduler waits after its SIGTERM.
            if verdict.stop or saver.is_due(step):
                log.flush()
                saver.save_now(step, samples_seen=samples_seen)
            if _is_due(step, period=cfg.evaluation.eval_period_iterations, last_step=plan.last_step):
                log.record_scores(step, evaluate(model, f"training_{step}"))
            if verdict.stop:
                logger.info("stopped by %s after iteration %d; start again to go on", stop.received or "a rank", step)
                break
    batches.report_skipped()
    on_main_first(_summarise, evaluate, output_dir)
    return 0


def forward_backward(
    model: SSLMetaArch,
    batches: DeviceBatches,
    *,
    plan: RunPlan,
    values: StepValues,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """Add up the gradients of one optimiser step; returns the metrics, means over its batches."""
    batches.reset_clock()
    share = 1 / plan.accumulation_steps
    totals: dict[str, Tensor] = {}
    for _ in range(plan.accumulation_steps):
        metrics = model.forward_backward(
            next(batches),
            teacher_temp=values.teacher_temp,
            dino_local_loss_weight=values.dino_local_loss_weight,
            backprop=lambda loss: scaler.scale(loss * share).backward(),
        )
        totals = {name: totals.get(name, 0) + value * share for name, value in metrics.items()}
    return totals


def _schedule_metrics(values: StepValues) -> dict[str, float]:
    return {
        "lr": values.lr,
        "last_layer_lr": values.last_layer_lr,
        "wd": values.wd,
        "mom": values.momentum,
        "teacher_temp": values.teacher_temp,
    }


def _speed_metrics(plan: RunPlan, env: Environment, step_s: float, data_s: float) -> dict[str, float]:
    return {
        "current_batch_size": plan.global_batch_size,
        "images_per_s": plan.global_batch_size / step_s,
        "data_s": data_s,
        "peak_gib": peak_memory_gib(env.device),
    }


def _is_due(step: int, *, period: int | None, last_step: int) -> bool:
    """Say whether to evaluate after this step: every `period` steps and after the last; never without a period."""
    return bool(period) and ((step + 1) % period == 0 or step + 1 == last_step)


def _log_start(model: SSLMetaArch, *, plan: RunPlan, dataset_size: int, env: Environment) -> None:
    num_parameters = sum(param.numel() for param in model.student["backbone"].parameters())
    logger.info(
        "dataset_images=%d epoch_steps=%d total_steps=%d global_batch=%d lr=%.3g backbone_parameters=%d "
        "device=%s ranks=%d dtype=%s",
        dataset_size,
        plan.epoch_length,
        plan.total_steps,
        plan.global_batch_size,
        plan.lr,
        num_parameters,
        env.device,
        env.world_size,
        str(model.autocast_dtype).removeprefix("torch."),
    )


def _summarise(evaluate: TeacherEvaluation, output_dir: Path) -> None:
    """Draw the curves and say how the scores changed; for rank 0."""
    before, after = evaluate.scores_of("start"), evaluate.last_scores
    if (output_dir / METRICS_NAME).exists():
        plot_training_curves(output_dir / METRICS_NAME, output_dir / CURVES_NAME, start_scores=before)
    for name in after:
        if name in before:
            gain = after[name] - before[name]
            logger.info("%s start=%.2f end=%.2f gain=%+.2f", name, before[name], after[name], gain)


if __name__ == "__main__":
    sys.path[0] = ""  # not the modules beside this file, but the user's dataset classes in the current folder
    end_program(main())
