"""Train: self-supervised training of student and EMA teacher, as library module and as program.

torchrun --nproc_per_node=4 dinov2/train/train.py --config-file F --output-dir D [key=value ...]
"""

import argparse
import contextlib
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
from dinov2.fsdp import PeriodicCheckpointer
from dinov2.logging import MetricLogger, end_program, peak_memory_gib, plot_training_curves, run_program, setup_logging
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
    follow_plan,
    plan_run,
    require_equal_sizes,
    seed_global_generators,
)
from dinov2.train.evaluation import START, TeacherEvaluation
from dinov2.train.host_memory import keep_freed_memory
from dinov2.train.param_groups import apply_schedules
from dinov2.train.resume import Start, require_something_to_evaluate, resume
from dinov2.train.run_folder import CURVES_NAME, begin_run, make_output_dir, require_no_other_run
from dinov2.train.run_lock import RunLock
from dinov2.train.saved_run import has_same_evaluations, report_changes, saved_global_batch
from dinov2.train.saving import finishing, require_known_score
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
        "Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 end the step, save and exit with 0. torchrun passes Ctrl-C and SIGTERM "
        "on (the others with its --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2), itself exits with 1, and kills "
        "what has not ended after 30 s: give large models more with its --shutdown-timeout, in seconds. "
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
        on_main_first(make_output_dir, output_dir)
        lock = RunLock(output_dir, setting=f"train.output_dir={output_dir}")
        with contextlib.nullcontext() if args.eval_only else lock:
            on_main_first(lambda: require_no_other_run(cfg, overwrite=args.overwrite))
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
    evaluate = on_every_rank(lambda: TeacherEvaluation(cfg, env, dataset=dataset, output_dir=output_dir))
    seed_global_generators(cfg.train.seed + env.rank)
    model = build_model(cfg, device=env.device)
    optimizer = build_optimizer(cfg, model)
    scaler = build_grad_scaler(cfg, device=env.device)
    saver = build_checkpointer(
        cfg, model, optimizer=optimizer, scaler=scaler, output_dir=output_dir, read_only=eval_only
    )
    batch = None if eval_only else saved_global_batch(cfg, saver.checkpointer)
    plan = plan_run(cfg, dataset_size=pass_size(dataset), world_size=env.world_size, saved_global_batch=batch)
    follow_plan(saver, plan)
    schedules = build_schedules(cfg, plan=plan)
    start = resume(cfg, saver, model)
    evaluate.last_scores = dict(start.scores)
    _log_start(model, start, plan=plan, dataset_size=len(dataset), env=env)

    if eval_only:
        require_something_to_evaluate(cfg, start)
        evaluate(model, f"manual_{max(start.step - 1, 0)}")
        return 0
    report_changes(cfg, plan, start.saved, world_size=env.world_size)
    on_main_first(lambda: begin_run(cfg, plan, output_dir, overwrite=overwrite))
    saver.checkpointer.clean_up()
    if start.step == 0 and cfg.evaluation.at_start:
        require_known_score(saver.save_best, evaluate(model, START))
    elif start.scores and has_same_evaluations(cfg, start.saved):
        require_known_score(saver.save_best, start.scores)

    samples_seen = start.samples_seen
    evaluation_period = cfg.evaluation.eval_period_iterations
    cancelled = CancelledSteps()
    with (
        StopSignal() as stop,
        finishing(saver),
        build_batches(cfg, dataset, plan=plan, env=env, samples_seen=samples_seen, output_dir=output_dir) as batches,
        on_every_rank(lambda: build_metric_logger(cfg, plan=plan, start_step=start.step, output_dir=output_dir)) as log,
    ):
        if start.step and _is_due(start.step - 1, period=evaluation_period, last_step=plan.last_step):
            # It may have been killed since its last checkpoint, before it was evaluated.
            scores = evaluate.if_missing(model, f"training_{start.step - 1}")
            _note_scores(start.step - 1, scores, log=log, saver=saver, samples_seen=samples_seen)
        for step in range(start.step, plan.last_step):
            started = time.perf_counter()
            values = schedules[step]
            apply_schedules(optimizer, values)

            metrics = forward_backward(model, batches, plan=plan, values=values, scaler=scaler)
            samples_seen += plan.global_batch_size

            scaler.unscale_(optimizer)
            metrics |= clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
            verdict = agree(
                metrics["total_loss"],
                metrics["grad_norm"],
                stop=stop.received is not None,
                save_due=env.rank == 0 and saver.minutes_are_over(),
                failed=saver.checkpointer.failed,
            )
            if verdict.failed:
                saver.checkpointer.raise_failure()

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
            if verdict.stop or saver.is_due(step, minutes_due=verdict.save_due):
                log.flush()
                saver.save_now(step, samples_seen=samples_seen, metrics=evaluate.last_scores)
            if verdict.stop:
                logger.info("stopped by %s after iteration %d; start again to go on", stop.received or "a rank", step)
                break
            if _is_due(step, period=evaluation_period, last_step=plan.last_step):
                scores = evaluate(model, f"training_{step}")
                _note_scores(step, scores, log=log, saver=saver, samples_seen=samples_seen)
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


def _note_scores(
    step: int, scores: dict[str, float], *, log: MetricLogger, saver: PeriodicCheckpointer, samples_seen: int
) -> None:
    """Record the scores of an evaluation and keep the checkpoint of this step if they are the best so far."""
    log.record_scores(step, scores)
    saver.note_scores(step, scores, samples_seen=samples_seen)


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


def _log_start(model: SSLMetaArch, start: Start, *, plan: RunPlan, dataset_size: int, env: Environment) -> None:
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
    if start.step >= plan.last_step:
        logger.info("all %d steps are done; to go on, raise optim.epochs or train.max_steps", plan.last_step)
    elif start.step:
        logger.info("resuming at step %d of %d", start.step, plan.last_step)


def _summarise(evaluate: TeacherEvaluation, output_dir: Path) -> None:
    """Draw the curves and say how the scores changed; for rank 0."""
    before, after = evaluate.scores_of(START), evaluate.last_scores
    if (output_dir / METRICS_NAME).exists():
        plot_training_curves(output_dir / METRICS_NAME, output_dir / CURVES_NAME, start_scores=before)
    for name in after:
        if name in before:
            difference = after[name] - before[name]
            word = "gain" if name.endswith("_pct") else "change"  # some measures are better when they are lower
            logger.info("%s start=%.2f end=%.2f %s=%+.2f", name, before[name], after[name], word, difference)


if __name__ == "__main__":
    sys.path[0] = ""  # not the modules beside this file, but the user's dataset classes in the current folder
    end_program(main())
