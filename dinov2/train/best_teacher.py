"""The best teacher of a run so far, in `best_teacher.pth`, and in `best.json` why it is that one.

Both are brought up to date after each evaluation, so that they are there however a run ends: done, stopped, out of
memory or killed. The evaluation of the start takes part: where nothing was better, the best teacher is the start.

By which score:
    `checkpointing.save_best`     if it is set
    `knn_top1_pct`                if `evaluation.knn` is configured
    `nn_overlap_with_start_pct`   else: the latest teacher that is sound, whatever the value

Without labels nobody can tell which of two teachers is better for a task, only which one has lost what the start knew.
In a run that starts from weights a teacher is sound while it keeps the neighbours and the directions (RankMe,
arXiv:2210.02885) that the guard rails ask for; more of either is no sign of better features, as noise uses many
directions and the start itself has all its neighbours. Where a guard rail ends such a run, none is trusted: it is the
start. In a run that starts from random numbers it is the latest teacher, however the run ends.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinov2.checkpoint_format import write_text
from dinov2.configs import Config, to_dict
from dinov2.configs.adaptation_sections import GuardRailsConfig
from dinov2.errors import CheckpointError
from dinov2.eval.knn_online import SCORE_NAME
from dinov2.eval.start_comparison import GainOverStart

logger = logging.getLogger(__name__)

TEACHER_NAME = "best_teacher.pth"
BEST_NAME = "best.json"
START = "start"
OVERLAP, RANK = "nn_overlap_with_start_pct", "rankme"


@dataclass(frozen=True, kw_only=True)
class BestRule:
    """By which score of the evaluations one teacher is better than another."""

    score: str
    mode: Literal["max", "min", "latest"] = "max"  # latest: each one within the limits, whatever its score
    measured_on: str = ""  # digest of the settings of evaluations: only scores of the same ones can be compared
    limits: GuardRailsConfig = GuardRailsConfig()
    has_weights: bool = False  # the run starts from given weights, which are worth keeping

    @classmethod
    def from_config(cls, cfg: Config) -> "BestRule":
        """Choose the score; see the top of this file."""
        sections = {name: to_dict(cfg)["evaluation"][name] for name in ("knn", "health")}
        digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]
        if cfg.checkpointing.save_best is not None:
            return cls(score=cfg.checkpointing.save_best, mode=cfg.checkpointing.save_best_mode, measured_on=digest)
        if cfg.evaluation.knn.train_dataset_path is not None:
            return cls(score=SCORE_NAME, measured_on=digest)
        return cls(
            score=OVERLAP,
            mode="latest",
            measured_on=digest,
            limits=cfg.guard_rails,
            has_weights=starts_from_weights(cfg),
        )

    def value_of(self, name: str, scores: Mapping[str, float]) -> float:
        """Return the score of an evaluation; NaN if it has none."""
        if self.mode == "latest" and name == START and RANK in scores:
            return 100.0
        return scores.get(self.score, math.nan)

    def is_better(self, value: float, other: float) -> bool:
        """Tell whether a score is better than another; equal ones are not, but for the latest."""
        if self.mode == "latest":
            return True
        return value > other if self.mode == "max" else value < other

    def is_sound(self, scores: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Tell whether an evaluation is within the limits; those of a run from random numbers always are."""
        has_lost = lost_directions(scores, start, self.limits) or lost_neighbours(scores, self.limits)
        return not (self.has_weights and has_lost)


def starts_from_weights(cfg: Config) -> bool:
    """Say whether a run has something to lose."""
    return bool(cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS)


def lost_directions(scores: Mapping[str, float], start: Mapping[str, float], limits: GuardRailsConfig) -> bool:
    """Say whether features use far fewer directions than those of the start."""
    return scores.get(RANK, math.inf) < limits.min_rank_share * start.get(RANK, 0.0)


def lost_neighbours(scores: Mapping[str, float], limits: GuardRailsConfig) -> bool:
    """Say whether images have other neighbours than at the start."""
    return scores.get(OVERLAP, 100.0) < limits.min_overlap_pct


class BestTeacher:
    """Keeps the two files of a run; used by rank 0 alone.

    Args:
        folder: of the run.
        rule: by which teachers are compared.
    """

    def __init__(self, folder: Path, rule: BestRule) -> None:
        self.folder = folder
        self.rule = rule

    def note(
        self,
        name: str,
        scores: Mapping[str, float],
        *,
        weights: Path,
        start: Mapping[str, float] | None = None,
        gain: GainOverStart | None = None,
    ) -> None:
        """Take the teacher of an evaluation as the best one if it is.

        Args:
            name: of the evaluation, `start` or `training_<iteration>`; the start of a run is always taken.
            scores: of it.
            weights: file of the teacher.
            start: scores of the start, if it was evaluated.
            gain: its difference to the start, if that is known with an interval.

        Raises:
            CheckpointError: the files cannot be written.
        """
        rule = self.rule
        value = rule.value_of(name, scores)
        if math.isnan(value) or (rule.mode == "latest" and not rule.is_sound(scores, start or {})):
            return
        best = None if name == START else self.read()
        if best is not None and not rule.is_better(value, best["value"]):
            return
        start_value = value if name == START else None if best is None else best["start_value"]
        content = {
            "evaluation": name,
            "iteration": None if name == START else int(name.rpartition("_")[2]),
            "score": rule.score,
            "mode": rule.mode,
            "value": value,
            "start_value": start_value,
            "over_start": None if gain is None else gain.as_plain(),
            "sentence": None if gain is None else gain.sentence(),
            "measured_on": rule.measured_on,
        }
        try:
            _link_or_copy(weights, self.folder / TEACHER_NAME)
            write_text(self.folder / BEST_NAME, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / TEACHER_NAME} could not be written ({error.strerror}); free some space"
            ) from error

    def read(self) -> dict[str, Any] | None:
        """Read `best.json`; None where there is none, or it was chosen by other scores than this run's."""
        rule = self.rule
        try:
            best = json.loads((self.folder / BEST_NAME).read_text(encoding="utf-8"))
            is_ours = (best["score"], best["mode"], best["measured_on"]) == (rule.score, rule.mode, rule.measured_on)
            best["value"] = float(best["value"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return best if is_ours and (self.folder / TEACHER_NAME).is_file() else None

    def is_of(self, name: str) -> bool:
        """Tell whether the best teacher is that of this evaluation."""
        best = self.read()
        return best is not None and best["evaluation"] == name

    def sentence(self) -> str:
        """Say which teacher is the best one, and how much better than the start."""
        path, best = self.folder / TEACHER_NAME, self.read()
        if best is None:
            return (
                f"there is no {TEACHER_NAME}: no evaluation gave {self.rule.score}; see evaluation.at_start and "
                f"evaluation.eval_period_iterations"
            )
        is_latest = best["mode"] == "latest"
        if best["evaluation"] == START:
            known = "is known to be sound" if is_latest else f"was better than {_shown(best)} of the start"
            return f"{path} holds the weights that the run started from: no evaluation {known}"
        gain = best["sentence"] or f"{_shown(best)}, {_of_start(best)}"
        if is_latest:
            kept = " that kept enough of the start" if self.rule.has_weights else ""
            gain = f"the latest{kept}: {gain}; without labels nobody can tell if it is better"
        return f"{path} holds the teacher of iteration {best['iteration']}: {gain}"


def _shown(best: Mapping[str, Any]) -> str:
    return f"{best['score']}={best['value']:.2f}"


def _of_start(best: Mapping[str, Any]) -> str:
    start = best["start_value"]
    return "the start was not evaluated" if start is None else f"{start:.2f} at the start"


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file, which is only ever replaced as a whole, a second name; where the disk cannot, copy it."""
    unfinished = target.with_name(f"{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, unfinished)
    if not unfinished.exists():
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
