"""The stages of a run: each has settings, numbers and schedules of its own; networks, optimiser and folder are one.

Steps are counted through all stages. A run whose config lists no stages has one, without a name.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch

from dinov2.configs import Config, stage_configs
from dinov2.errors import ConfigError
from dinov2.fsdp import PeriodicCheckpointer
from dinov2.train.batches import DeviceBatches
from dinov2.train.build import RunPlan, build_param_groups, build_schedules, plan_run
from dinov2.train.param_groups import set_multipliers
from dinov2.train.schedules import Schedules, StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2.train")


@dataclass(frozen=True)
class SavedBatch:
    """What is known of a checkpoint before it is read."""

    iteration: int  # after which it was saved
    global_batch_size: int | None  # images of that step; None: saved by a version that did not note it


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    number: int  # from 1
    name: str  # empty: the only stage of a run whose config lists none
    cfg: Config
    plan: RunPlan
    schedules: Schedules

    def values(self, step: int) -> StepValues:
        """Return what the schedules say for a step of the run; those of a stage begin with its first step."""
        return self.schedules[step - self.plan.first_step]

    def ends_after(self, step: int) -> bool:
        """Say whether this is the last step of the stage, or that with which the run is to end."""
        return step + 1 == self.plan.last_step

    def is_evaluated_after(self, step: int) -> bool:
        """Say whether to evaluate after this step: every so many of the run, and after the stage; or never."""
        period = self.cfg.evaluation.eval_period_iterations
        return bool(period) and ((step + 1) % period == 0 or self.ends_after(step))

    def metrics(self) -> dict[str, float]:
        """Return the stage's number, to be recorded with each step, if the config lists stages."""
        return {"stage": self.number} if self.name else {}


class Stages:
    """The stages of a run in order, at least one."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def last_step(self) -> int:
        """Step after which the run ends."""
        return self._stages[-1].plan.last_step

    @property
    def total_steps(self) -> int:
        """Steps of the run if nothing ended it earlier."""
        return sum(stage.plan.total_steps for stage in self)

    def as_plain(self) -> dict[str, Any]:
        """Return the plans by the names of their stages; of a run whose config lists no stages, its plan."""
        plans = {stage.name: asdict(stage.plan) for stage in self}
        return plans[""] if "" in plans else plans

    def at(self, step: int) -> Stage:
        """Return the stage of a step; for steps after the run, the stage in which it ends."""
        last = min(step, self.last_step - 1)
        return next(stage for stage in self if last < stage.plan.last_step)


def plan_stages(cfg: Config, *, dataset_size: int, world_size: int, saved: SavedBatch | None = None) -> Stages:
    """Work out the numbers and the schedules of all stages.

    Args:
        cfg: config of the run.
        dataset_size: images of one pass over the data.
        world_size: ranks.
        saved: the checkpoint that is continued; None: a new run. Its global batch holds on in its stage, so that it
            goes on alike on another number of ranks, and in the same proportion in the others.

    Raises:
        ConfigError: the numbers of a stage do not fit each other.
    """
    settings = stage_configs(cfg)
    if saved is None or saved.global_batch_size is None:
        return _planned(settings, [None] * len(settings), dataset_size=dataset_size, world_size=world_size)
    for number, (_, of_saved) in enumerate(settings):  # which stage it is of may depend on the batches
        batches = [_carried_over(saved.global_batch_size, of_saved, other) for _, other in settings]
        stages = _planned(settings, batches, dataset_size=dataset_size, world_size=world_size)
        if stages.at(saved.iteration).number == number + 1:
            break
    return stages


def follow_stages(saver: PeriodicCheckpointer, stages: Stages, *, saved: SavedBatch | None) -> None:
    """Tell what saves the run its last step, and the global batch of the step where it stands."""
    saver.max_iter = stages.last_step
    plan = stages.at(0 if saved is None else saved.iteration).plan
    saver.checkpointer.global_batch_size = plan.global_batch_size


class CurrentStage:
    """The stage that a run is in; a context, because the loader of a stage must end before that of the next begins.

    Args:
        stages: of the run.
        model: takes over the losses' weights of a stage.
        optimizer: takes over the multipliers of its parameter groups. Its averages of gradients go on: without them
            the first steps of a stage would be taken at full length after one gradient each.
        saver: is told of the global batch.
        open_batches: `build_batches`, but for what a stage decides.
    """

    def __init__(
        self,
        stages: Stages,
        *,
        model: SSLMetaArch,
        optimizer: torch.optim.Optimizer,
        saver: PeriodicCheckpointer,
        open_batches: Callable[..., DeviceBatches],
    ) -> None:
        self.stages = stages
        self.batches: DeviceBatches | None = None
        self._stage: Stage | None = None
        self._model = model
        self._optimizer = optimizer
        self._saver = saver
        self._open_batches = open_batches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.batches is not None:
            self.batches.close()

    def enter(self, step: int, *, samples_seen: int) -> Stage:
        """Go over to the stage of this step, unless the run is in it; all ranks call it before each step."""
        stage = self.stages.at(step)
        if stage is self._stage:
            return stage
        if self.batches is not None:
            self.batches.close()
        self._model.follow(stage.cfg)
        set_multipliers(self._optimizer, build_param_groups(stage.cfg, self._model))
        self._saver.checkpointer.global_batch_size = stage.plan.global_batch_size
        self.batches = self._open_batches(stage.cfg, plan=stage.plan, samples_seen=samples_seen)
        self._stage = stage
        if stage.name:
            _log_stage(stage, num_stages=len(self.stages))
        return stage


def _planned(
    settings: Sequence[tuple[str, Config]], batches: Sequence[int | None], *, dataset_size: int, world_size: int
) -> Stages:
    """Plan the stages one after the other, each with the global batch that a checkpoint gives it, or None."""
    stages: list[Stage] = []
    first_step = 0
    for (name, cfg), batch in zip(settings, batches, strict=True):
        try:
            plan = plan_run(
                cfg, dataset_size=dataset_size, world_size=world_size, saved_global_batch=batch, first_step=first_step
            )
        except ConfigError as error:
            if not name:
                raise
            raise ConfigError(f"stage {name}: {error}") from error
        stages.append(Stage(len(stages) + 1, name, cfg, plan, build_schedules(cfg, plan=plan)))
        first_step += plan.total_steps
    return Stages(stages)


def _carried_over(saved: int, of_saved: Config, cfg: Config) -> int | None:
    """Return the global batch of a stage, given that of the stage in which a checkpoint was saved."""
    if cfg is of_saved:
        return saved
    if of_saved.train.global_batch_size is not None:  # says nothing about stages that count by process
        return None
    own, other = (each.train.batch_size_per_gpu * each.optim.gradient_accumulation_steps for each in (cfg, of_saved))
    return round(saved * own / other)


def _log_stage(stage: Stage, *, num_stages: int) -> None:
    plan = stage.plan
    logger.info(
        "stage=%s number=%d of=%d steps=%d..%d epoch_steps=%d global_batch=%d lr=%.3g global_crops_px=%d",
        stage.name,
        stage.number,
        num_stages,
        plan.first_step,
        plan.first_step + plan.total_steps - 1,
        plan.epoch_length,
        plan.global_batch_size,
        plan.lr,
        stage.cfg.crops.global_crops_size,
    )
