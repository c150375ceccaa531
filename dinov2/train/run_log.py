"""What a run says of itself at its start and at its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2.distributed import Environment, is_main_process
from dinov2.errors import GuardRailError
from dinov2.logging import plot_training_curves
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.train.evaluation import START, TeacherEvaluation
from dinov2.train.parts import num_trained
from dinov2.train.resume import Start
from dinov2.train.run_folder import CURVES_NAME
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages import Stages

logger = logging.getLogger("dinov2.train")


def log_start(model: SSLMetaArch, start: Start, *, stages: Stages, dataset_size: int, env: Environment) -> None:
    """Log the numbers of the run, and where it starts; those of its stages follow as they begin."""
    plan = stages.at(start.step).plan
    num_parameters = sum(param.numel() for param in model.teacher["backbone"].parameters())
    logger.info(
        "dataset_images=%d epoch_steps=%d total_steps=%d global_batch=%d lr=%.3g backbone_parameters=%d "
        "trained=%d device=%s ranks=%d dtype=%s",
        dataset_size,
        plan.epoch_length,
        stages.total_steps,
        plan.global_batch_size,
        plan.lr,
        num_parameters,
        num_trained(model.student["backbone"]),
        env.device,
        env.world_size,
        str(model.autocast_dtype).removeprefix("torch."),
    )
    if start.step >= stages.last_step:
        logger.info("all %d steps are done; to go on, raise optim.epochs or train.max_steps", stages.last_step)
    elif start.step:
        logger.info("resuming at step %d of %d", start.step, stages.last_step)


@contextmanager
def naming_the_best(evaluate: TeacherEvaluation) -> Iterator[None]:
    """Say at the end which teacher of the run is the best one, however the steps inside end."""
    try:
        yield
    except GuardRailError:
        if is_main_process():
            evaluate.distrust_the_latest()
        raise
    finally:
        if is_main_process():
            logger.info("%s", evaluate.best.sentence())


def summarise(evaluate: TeacherEvaluation, output_dir: Path) -> None:
    """Draw the curves and say how the scores changed; for rank 0."""
    before, after = evaluate.scores_of(START), evaluate.last_scores
    if (output_dir / METRICS_NAME).exists():
        plot_training_curves(output_dir / METRICS_NAME, output_dir / CURVES_NAME, start_scores=before)
    for name in after:
        if name in before:
            difference = after[name] - before[name]
            word = "gain" if name.endswith("_pct") else "change"  # some measures are better when they are lower
            logger.info("%s start=%.2f end=%.2f %s=%+.2f", name, before[name], after[name], word, difference)
