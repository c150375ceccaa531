"""Train: self-supervised training of student and EMA teacher, as library module and as program.

torchrun --nproc_per_node=4 dinov2/train/train.py --config-file F --output-dir D [key=value ...]
"""

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.configs import (
    Config,
    batch_size_per_rank,
    load_config,
    require_train_dataset,
    require_trainable,
    stage_configs,
)
from dinov2.data import pass_size
from dinov2.distributed import Environment, on_every_rank, on_main_first
from dinov2.fsdp import PeriodicCheckpointer
from dinov2.logging import MetricLogger, end_program, peak_memory_gib, run_program, setup_logging
from dinov2.train.arguments import Arguments, parse_arguments
from dinov2.train.batches import DeviceBatches, report_skipped
from dinov2.train.build import (
    RunPlan,
    build_batches,
    build_checkpointer,
    build_dataset,
    build_grad_scaler,
    build_metric_logger,
    build_model,
    build_optimizer,
    compile_blocks,
    require_equal_sizes,
    seed_global_generators,
    start_drawn_heads,
)
from dinov2.train.evaluation import MANUAL, START, TeacherEvaluation
from dinov2.train.guard_rails import GuardRails, open_guard_rails
from dinov2.train.host_memory import keep_freed_memory
from dinov2.train.param_groups import apply_schedules
from dinov2.train.resume import require_something_to_evaluate, resume
from dinov2.train.run_folder import begin_run, make_output_dir, require_no_other_run
from dinov2.train.run_lock import RunLock
from dinov2.train.run_log import log_start, naming_the_best, summarise
from dinov2.train.run_state import RunState
from dinov2.train.saved_run import has_same_evaluations, report_changes, saved_batch
from dinov2.train.saving import finishing, require_known_score
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages import CurrentStage, follow_stages, plan_stages
from dinov2.train.stop_signal import StopSignal
from dinov2.train.update import CancelledSteps, Verdict, agree, clip_gradients

logger = logging.getLogger("dinov2.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (0 done or stopped on request, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    args = parse_arguments(argv)
    with StopSignal() as stop:
        return _run_or_stop(args, stop)


def _run_or_stop(args: Arguments, stop: StopSignal) -> int:
    cfg = load_config(args.config_file, args.overrides)
    require_train_dataset(cfg)
    require_trainable(cfg)
    for _, settings in stage_configs(cfg):
        batch_size_per_rank(settings, world_size=distributed.launched_world_size())
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
            if args.eval_only:
                return do_train(cfg, env, output_dir=output_dir, eval_only=True)
            with RunState(cfg, retry=args.retry, anew=args.overwrite) as state:
                return do_train(cfg, env, output_dir=output_dir, overwrite=args.overwrite, state=state, stop=stop)
    finally:
        distributed.shutdown()


def do_train(
    cfg: Config,
    env: Environment,
    *,
    output_dir: Path,
    eval_only: bool = False,
    overwrite: bool = False,
    state: RunState | None = None,
    stop: StopSignal | None = None,
) -> int:
    """Build, resume, loop; returns the exit code.

    Args:
        cfg: config of the run.
        env: rank and device of this process.
        output_dir: folder of the run; exists.
        eval_only: evaluate the newest checkpoint instead of training.
        overwrite: remove the run that the folder holds, after everything that can fail at the start.
        state: is told of the steps; None: nobody is.
        stop: says when to stop; None: nothing does.

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
    saved = None if eval_only else saved_batch(cfg, saver.checkpointer)
    stages = plan_stages(cfg, dataset_size=pass_size(dataset), world_size=env.world_size, saved=saved)
    follow_stages(saver, stages, saved=saved)
    start = resume(cfg, saver, model)
    evaluate.last_scores = dict(start.scores)
    log_start(model, start, stages=stages, dataset_size=len(dataset), env=env)

    if eval_only:
        require_something_to_evaluate(cfg, start)
        evaluate(model, f"{MANUAL}{max(start.step - 1, 0)}")
        return 0
    report_changes(cfg, stages.at(start.step - 1).plan, start.saved, world_size=env.world_size)
    compile_blocks(stages.at(start.step).cfg, model, plan=stages.at(start.step).plan, device=env.device)
    start_drawn_heads(stages.at(0).cfg, model, start.drawn_heads, dataset=dataset, env=env)
    on_main_first(lambda: begin_run(cfg, stages, output_dir, overwrite=overwrite))
    saver.checkpointer.clean_up()
    state, stop = state or RunState(cfg), stop or StopSignal()  # that were not entered write and receive nothing
    state.begin(start.step, stages.last_step)
    if start.step == 0 and cfg.evaluation.at_start:
        require_known_score(saver.save_best, evaluate(model, START))
    elif start.scores and has_same_evaluations(cfg, start.saved):
        require_known_score(saver.save_best, start.scores)

    samples_seen = start.samples_seen
    cancelled = CancelledSteps()
    open_batches = partial(build_batches, dataset=dataset, env=env, output_dir=output_dir)
    build_log = partial(build_metric_logger, last_step=stages.last_step, output_dir=output_dir)
    with (
        naming_the_best(evaluate),
        finishing(saver),
        CurrentStage(stages, model=model, optimizer=optimizer, saver=saver, open_batches=open_batches) as current,
        on_every_rank(lambda: build_log(cfg, start_step=start.step)) as log,
    ):
        rails = on_main_first(lambda: open_guard_rails(cfg, evaluate, output_dir=output_dir, start_step=start.step))
        if start.step and stages.at(start.step - 1).is_evaluated_after(start.step - 1):
            # It may have been killed since its last checkpoint, before it was evaluated.
            scores = evaluate.if_missing(model, f"training_{start.step - 1}")
            _note_scores(start.step - 1, scores, log=log, saver=saver, rails=rails, samples_seen=samples_seen)
        stop.begin_steps()
        for step in range(start.step, stages.last_step):
            stage = current.enter(step, samples_seen=samples_seen)
            started = time.perf_counter()
            values = stage.values(step)
            apply_schedules(optimizer, values)
            model.begin_step(step)

            metrics = forward_backward(model, current.batches, plan=stage.plan, values=values, scaler=scaler)
            samples_seen += stage.plan.global_batch_size

            scaler.unscale_(optimizer)
            metrics |= clip_gradients(model.student, max_norm=stage.cfg.optim.clip_grad)
            verdict = _agree(metrics, stop=stop, saver=saver, env=env)

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
            metrics |= stage.metrics() | _schedule_metrics(values)
            log.record(step, metrics | _speed_metrics(stage.plan, env, step_s, current.batches.waited_s))
            cancelled.note(verdict, step=step, loss=metrics["total_loss"], scaler=scaler)
            state.note(step)
            rails.note_steps(log.take_rows())

            # Before the evaluation, which may take longer than a scheduler waits after its SIGTERM.
            if verdict.stop or stage.ends_after(step) or saver.is_due(step, minutes_due=verdict.save_due):
                log.flush()
                saver.save_now(step, samples_seen=samples_seen, metrics=evaluate.last_scores)
            if verdict.stop:
                logger.info("stopped by %s after iteration %d; start again to go on", stop.received or "a rank", step)
                break
            if stage.is_evaluated_after(step):
                scores = evaluate(model, f"training_{step}")
                _note_scores(step, scores, log=log, saver=saver, rails=rails, samples_seen=samples_seen)
    report_skipped(output_dir, rank=env.rank)
    on_main_first(lambda: summarise(evaluate, output_dir) if stop.leaves_time else None)
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
            gram_loss_weight=values.gram_loss_weight,
            freeze_backbone=values.backbone_lr_factor == 0,
            backprop=lambda loss: scaler.scale(loss * share).backward(),
        )
        totals = {name: totals.get(name, 0) + value * share for name, value in metrics.items()}
    return totals


def _agree(metrics: dict[str, Tensor], *, stop: StopSignal, saver: PeriodicCheckpointer, env: Environment) -> Verdict:
    """Find out what all ranks say about a step; a checkpoint that one of them could not write ends them together."""
    verdict = agree(
        metrics["total_loss"],
        metrics["grad_norm"],
        stop=stop.received is not None,
        save_due=env.rank == 0 and saver.minutes_are_over(),
        failed=saver.checkpointer.failed,
    )
    if verdict.failed:
        saver.checkpointer.raise_failure()
    return verdict


def _note_scores(
    step: int,
    scores: dict[str, float],
    *,
    log: MetricLogger,
    saver: PeriodicCheckpointer,
    rails: GuardRails,
    samples_seen: int,
) -> None:
    """Record the scores of an evaluation, keep the checkpoint of this step if they are the best so far, judge them."""
    log.record_scores(step, scores)
    saver.note_scores(step, scores, samples_seen=samples_seen)
    rails.note_steps(log.take_rows())
    rails.note_scores(step, scores)


def _schedule_metrics(values: StepValues) -> dict[str, float]:
    return {
        "lr": values.lr,
        "last_layer_lr": values.last_layer_lr,
        "backbone_lr_factor": values.backbone_lr_factor,
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


if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # not what lies beside this file, but the user's dataset classes in this folder
    end_program(main())
