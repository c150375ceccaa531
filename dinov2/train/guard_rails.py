"""Guard rails: notice a run that destroys its features, warn, then end it with the reason.

Before the first step some of the training images are looked at. Signs of each step (`dinov2.train.collapse_signs`) are
averaged over some steps, and the mean must stay within bounds; scores of evaluations are compared with those of the
start. What is out of bounds warns once; if it stays so for as many steps or evaluations in a row as
`guard_rails.patience_*` says, the run ends.

| cause | sign | out of bounds |
| --- | --- | --- |
| blank | `blank_pct`, images | nearly all are of a single colour |
| copies | `copies_pct`, images | nearly all are there twice |
| momentum | `mom` | the teacher is little but the student |
| collapse | `feature_std`, `student_feature_std` | far below the highest so far: all images look alike |
| targets | `target_information` | far below the most so far: targets do not depend on the image (*) |
| rank | `rankme` | far below the start |
| overlap | `nn_overlap_with_start_pct` | few neighbours kept, and nothing is better for it |
| drop | `knn_top1_pct` | far below the start |
| below start | the score that chooses the best teacher | worse than the start, `evaluation.stop_below_start` |

(*) In a run that is evaluated, empty targets alone only warn: on images whose crops say little of each other (fabric)
the class targets lose what they say while patches and KoLeo make the features better. They end the run together with an
evaluation that is out of bounds, and then at once.

The logic is pure: it takes numbers and gives alarms. All ranks see the same numbers, so they end together. A run that
goes on is brought to the same state from its metrics file.
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dinov2.configs import Config
from dinov2.configs.adaptation_sections import GuardRailsConfig
from dinov2.distributed import is_main_process
from dinov2.errors import Dinov2Error, GuardRailError
from dinov2.eval.health_views import choose_images
from dinov2.eval.knn_online import SCORE_NAME
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.logging.metrics_file import read_metrics
from dinov2.train.best_teacher import OVERLAP, START, BestRule, lost_directions, lost_neighbours, starts_from_weights
from dinov2.train.collapse_signs import blank_images, copied_images
from dinov2.train.evaluation import TeacherEvaluation

logger = logging.getLogger("dinov2.train")

Verdict = tuple[str, str]  # cause, what is wrong and what to do
_HIGHEST_COUNT = ("feature_std", "student_feature_std", "target_information")
_NUM_IMAGES = 64  # looked at before the first step


@dataclass(frozen=True)
class Alarm:
    """Something is out of bounds."""

    cause: str
    sentence: str
    is_first: bool  # the first of its cause
    is_last: bool  # it has been so for long enough to end the run


@dataclass(frozen=True, kw_only=True)
class BelowStart:
    """When a run ends whose evaluations stay worse than that of the start."""

    rule: BestRule
    patience: int  # evaluations in a row
    margin: float  # points of a score in percent, else percent of the start's score


class Streaks:
    """Count for each cause how often in a row it was there."""

    def __init__(self, *, patience: int) -> None:
        self.patience = patience
        self._counts: dict[str, int] = {}
        self._warned: set[str] = set()

    def note(self, found: Iterable[Verdict]) -> list[Alarm]:
        """Take what is out of bounds now, the surest cause first, and make alarms of it."""
        sentences = dict(found)
        self._counts = {cause: self._counts.get(cause, 0) + 1 for cause in sentences}
        alarms = [
            Alarm(cause, sentence, cause not in self._warned, self._counts[cause] >= self.patience)
            for cause, sentence in sentences.items()
        ]
        self._warned.update(sentences)
        return alarms


class GuardRails:
    """Watch a run.

    Args:
        limits: settings of the bounds.
        stops: end the run, not only warn.
        has_weights: the run starts from given weights, which are worth keeping.
        start_scores: of the evaluation before the first step; empty without one.
        is_evaluated: evaluations follow, which can be compared with them.
        below_start: None: a run may stay worse than its start, as far as the other bounds let it.
    """

    def __init__(
        self,
        limits: GuardRailsConfig,
        *,
        stops: bool,
        has_weights: bool,
        start_scores: Mapping[str, float],
        is_evaluated: bool,
        below_start: BelowStart | None,
    ) -> None:
        self.limits = limits
        self.stops = stops
        self.has_weights = has_weights
        self.start_scores = dict(start_scores)
        self.below_start = below_start
        self._evaluations_decide = is_evaluated and bool(start_scores)
        self._has_empty_targets = False
        self._window: deque[Mapping[str, float]] = deque(maxlen=limits.window_steps)
        self._highest: dict[str, float] = {}
        self._stage: float | None = None
        self._lr = math.nan
        self._replayed_until = -1  # step whose scores were taken in before the run was interrupted
        self._of_steps = Streaks(patience=limits.patience_steps)
        self._of_evaluations = Streaks(patience=limits.patience_evaluations)
        self._of_below_start = Streaks(patience=1 if below_start is None else below_start.patience)

    @classmethod
    def from_config(cls, cfg: Config, *, start_scores: Mapping[str, float]) -> Self:
        """Take the settings of a run."""
        limits, evaluation = cfg.guard_rails, cfg.evaluation
        has_weights = starts_from_weights(cfg)
        rule = BestRule.from_config(cfg)
        is_scored = rule.mode != "latest"  # without labels the other limits tell what is worse
        below_start = BelowStart(rule=rule, patience=evaluation.stop_patience, margin=evaluation.stop_margin)
        return cls(
            limits,
            stops=limits.action == "stop" or (limits.action == "auto" and has_weights),
            has_weights=has_weights,
            start_scores=start_scores,
            is_evaluated=bool(evaluation.eval_period_iterations),
            below_start=below_start if evaluation.stop_below_start and is_scored else None,
        )

    def replay(self, metrics_file: Path, *, before_step: int) -> Self:
        """Take in, without a word, what the run has seen before it was interrupted."""
        if metrics_file.is_file():
            for values in read_metrics(metrics_file):
                if values["iteration"] < before_step:
                    known = {name: value for name, value in values.items() if value is not None}
                    self.see_step(known)
                    if "rankme" in known or SCORE_NAME in known:
                        self.see_scores(known)
                        self._replayed_until = int(values["iteration"])
        return self

    def note_images(self, images: Tensor) -> None:
        """Judge some of the training images [n, C, H, W], normalised, before the first step.

        Raises:
            GuardRailError: nearly all are blank, or copies.
        """
        if len(images) < 2:
            return
        blank, copied = (100 * found.float().mean().item() for found in (blank_images(images), copied_images(images)))
        of_all = f"of {len(images)} images of train.dataset_path that were looked at"
        if blank >= self.limits.max_blank_pct:
            sentence = f"{blank:.0f} % {of_all} are of a single colour: there is nothing to learn from"
        elif copied >= self.limits.max_copies_pct:
            sentence = f"{copied:.0f} % {of_all} are copies of each other: there is nothing to tell apart"
        else:
            return
        sentence = (
            f"before the first step: {sentence}; look at them (run/preview.py, run/check_data.py); if they are as they "
            f"should be, guard_rails.action=warn trains on them"
        )
        if self.stops:
            raise GuardRailError(sentence)
        logger.warning("%s", sentence)

    def note_steps(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Take the metrics of steps in their order, means over ranks; called by all ranks.

        Raises:
            GuardRailError: something has been out of bounds for too long.
        """
        for step, values in rows:
            self._act(step, self.see_step(values))

    def note_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Take the scores of the evaluation after this step; called by all ranks.

        Those that were judged before the run was interrupted are not counted again.

        Raises:
            GuardRailError: something has been out of bounds for too long.
        """
        if step > self._replayed_until:
            self._act(step, self.see_scores(scores))

    def see_step(self, values: Mapping[str, float]) -> list[Alarm]:
        """Take the metrics of one step and return what is out of bounds."""
        if self.limits.action == "off" or not math.isfinite(values.get("total_loss", 0.0)):
            return []  # a step that is not finite is cancelled, and counted elsewhere
        if values.get("stage") != self._stage:  # other crops, other features
            self._window.clear()
            self._highest.clear()
            self._has_empty_targets = False
            self._stage = values.get("stage")
        self._window.append(values)
        self._lr = values.get("lr", math.nan)
        if len(self._window) < self.limits.window_steps:
            return []
        means = {name: sum(row.get(name, math.nan) for row in self._window) / len(self._window) for name in values}
        for name in _HIGHEST_COUNT:
            if name in means and not math.isnan(means[name]):
                self._highest[name] = max(means[name], self._highest.get(name, -math.inf))
        alarms = {alarm.cause: alarm for alarm in self._of_steps.note(self._judge_steps(means))}
        self._has_empty_targets = "targets" in alarms and alarms["targets"].is_last
        if self._has_empty_targets and self._evaluations_decide:
            alarms["targets"] = replace(alarms["targets"], is_last=False)
        return list(alarms.values())

    def see_scores(self, scores: Mapping[str, float]) -> list[Alarm]:
        """Take the scores of one evaluation and return what is out of bounds."""
        alarms = self._of_below_start.note(self._judge_below_start(scores))
        if self.limits.action == "off":
            return alarms
        found = self._of_evaluations.note(self._judge_scores(scores))
        if self._has_empty_targets:
            found = [replace(alarm, is_last=True) for alarm in found]
        return alarms + found

    def _act(self, step: int, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            ends = alarm.is_last and (self.stops or alarm.cause == "below start")
            if ends:
                raise GuardRailError(f"iteration {step}: {alarm.sentence}")
            if alarm.is_first and is_main_process():
                logger.warning("iteration %d: %s", step, alarm.sentence)

    def _judge_steps(self, means: Mapping[str, float]) -> Iterator[Verdict]:
        """Compare means of steps with their bounds; the surest cause comes first."""
        limits, steps = self.limits, f"in the last {self.limits.window_steps} steps"
        if means.get("blank_pct", 0.0) >= limits.max_blank_pct:
            yield (
                "blank",
                f"{means['blank_pct']:.0f} % of the crops {steps} were of a single colour: there is nothing to learn "
                f"from; look at the images of train.dataset_path (run/preview.py, run/check_data.py)",
            )
        if means.get("copies_pct", 0.0) >= limits.max_copies_pct:
            yield (
                "copies",
                f"{means['copies_pct']:.0f} % of the crops {steps} were those of another image of the same batch, too: "
                f"the batches are made of copies; look for duplicates in train.dataset_path (run/check_data.py)",
            )
        if means.get("mom", 1.0) < limits.min_teacher_momentum:
            yield (
                "momentum",
                f"the teacher's momentum was {means['mom']:.3g} {steps}, so that the teacher is little but the student "
                f"and nothing keeps both from collapsing; raise teacher.momentum_teacher (schedules.momentum), "
                f"to 0.99 or more",
            )
        for name in ("student_feature_std", "feature_std"):
            if means.get(name, math.inf) < limits.min_feature_std_share * self._highest.get(name, 0.0):
                whose = "the student's" if name.startswith("student") else "the teacher's"
                yield (
                    "collapse",
                    f"{whose} features collapse, all images begin to look alike ({name}={means[name]:.3g} {steps}, "
                    f"{self._highest[name]:.3g} before); {self._advice}",
                )
        most = self._highest.get("target_information", 0.0)
        if means.get("target_information", math.inf) < limits.min_target_information_share * most:
            what_follows = (
                "nothing is learned from them; evaluations decide whether features suffer. Images whose crops say "
                "little of each other (fabric) have no better ones; elsewhere"
                if self._evaluations_decide
                else "features or heads collapse;"
            )
            yield (
                "targets",
                f"the teacher's targets hardly depend on the image any more "
                f"(target_information={means['target_information']:.2g} nats {steps}, {most:.2g} before): "
                f"{what_follows} {self._advice}",
            )

    def _judge_scores(self, scores: Mapping[str, float]) -> Iterator[Verdict]:
        """Compare scores with those of the start."""
        start, limits = self.start_scores, self.limits
        if lost_directions(scores, start, limits):
            yield (
                "rank",
                f"the features lost most of their directions: rankme={scores['rankme']:.1f}, {start['rankme']:.1f} at "
                f"the start; {self._advice}",
            )
        fall = start.get(SCORE_NAME, -math.inf) - scores.get(SCORE_NAME, -math.inf)
        if math.isfinite(fall) and fall > limits.max_drop_points:
            yield (
                "drop",
                f"{SCORE_NAME}={scores[SCORE_NAME]:.1f} is {fall:.1f} points below the start; {self._advice}",
            )
        is_better = math.isfinite(fall) and fall < 0
        if self.has_weights and lost_neighbours(scores, limits) and not is_better:
            yield (
                "overlap",
                f"the features are others than those of the start, and no score is better for it: "
                f"{scores[OVERLAP]:.0f} % of the nearest neighbours are kept ({OVERLAP}); {self._advice}",
            )

    def _judge_below_start(self, scores: Mapping[str, float]) -> Iterator[Verdict]:
        """Compare the score that chooses the best teacher with that of the start."""
        if self.below_start is None:
            return
        rule, margin = self.below_start.rule, self.below_start.margin
        start, value = (found.get(rule.score, math.nan) for found in (self.start_scores, scores))
        if math.isnan(start) or math.isnan(value):
            return
        is_percent = rule.score.endswith("_pct")
        room = margin if is_percent else abs(start) * margin / 100
        if rule.is_better(start, value + room if rule.mode == "max" else value - room):
            yield (
                "below start",
                f"{rule.score}={value:.2f} is worse than {start:.2f} of the start, by more than "
                f"evaluation.stop_margin={margin:g} {'points' if is_percent else 'percent'}; the weights were better "
                f"before: {self._advice}",
            )

    @property
    def _advice(self) -> str:
        now = "" if math.isnan(self._lr) else f" (lr={self._lr:.2g} now)"
        return f"the learning rate is the usual cause{now}: lower optim.base_lr, or lengthen optim.warmup_epochs"


def open_guard_rails(cfg: Config, evaluate: TeacherEvaluation, *, output_dir: Path, start_step: int) -> GuardRails:
    """Build the guard rails of a run and let them see its images, or what it did before it was interrupted; for rank 0.

    Raises:
        GuardRailError: nearly all images are blank, or copies.
    """
    rails = GuardRails.from_config(cfg, start_scores=evaluate.scores_of(START))
    if start_step:
        return rails.replay(output_dir / METRICS_NAME, before_step=start_step)
    if cfg.evaluation.stop_below_start and rails.below_start is None:
        logger.info(
            "evaluation.stop_below_start has no score to act on: give labelled images (evaluation.knn) or choose one "
            "(checkpointing.save_best); the other guard rails act"
        )
    if rails.limits.action != "off":
        rails.note_images(_some_images(evaluate.training_images))
    return rails


def _some_images(dataset: Any) -> Tensor:
    """Read a few images from all over a dataset, [n, C, H, W]; those that cannot be read are left out."""
    images = []
    for place in choose_images(len(dataset), at_most=_NUM_IMAGES).tolist():
        with contextlib.suppress(Dinov2Error):  # training will meet it, and say so
            images.append(dataset[place][0])
    return torch.stack(images) if images else torch.empty(0)
