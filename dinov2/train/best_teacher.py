"""The best teacher of a run so far, in `best_teacher.pth`, and in `best.json` why it is that one.

Both are brought up to date after each evaluation, so that they are there however a run ends: done, stopped, out of
memory or killed. The evaluation of the start takes part: where nothing was better, the best teacher is the start.

By which score:
    `checkpointing.save_best`   if it is set
    `knn_top1_pct`              if `evaluation.knn` is configured
    `rankme`                    else: the evaluation with most directions in use (arXiv:2210.02885)

RankMe needs no label, and tells features that have collapsed or lost directions from those that have not. It cannot
tell whether features that use more directions are better for a task; noise uses many.
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
from dinov2.errors import CheckpointError
from dinov2.eval.knn_online import SCORE_NAME
from dinov2.eval.start_comparison import GainOverStart

logger = logging.getLogger(__name__)

TEACHER_NAME = "best_teacher.pth"
BEST_NAME = "best.json"
START = "start"
LABEL_FREE_SCORE = "rankme"


@dataclass(frozen=True, kw_only=True)
class BestRule:
    """By which score of the evaluations one teacher is better than another."""

    score: str
    mode: Literal["max", "min"] = "max"
    measured_on: str = ""  # digest of the settings of evaluations: only scores of the same ones can be compared

    @classmethod
    def from_config(cls, cfg: Config) -> "BestRule":
        """Choose the score; see the top of this file."""
        sections = {name: to_dict(cfg)["evaluation"][name] for name in ("knn", "health")}
        digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]
        if cfg.checkpointing.save_best is not None:
            return cls(score=cfg.checkpointing.save_best, mode=cfg.checkpointing.save_best_mode, measured_on=digest)
        has_labels = cfg.evaluation.knn.train_dataset_path is not None
        return cls(score=SCORE_NAME if has_labels else LABEL_FREE_SCORE, measured_on=digest)

    def is_better(self, value: float, other: float) -> bool:
        """Tell whether a score is better than another; equal ones are not."""
        return value > other if self.mode == "max" else value < other


class BestTeacher:
    """Keeps the two files of a run; used by rank 0 alone.

    Args:
        folder: of the run.
        rule: by which teachers are compared.
    """

    def __init__(self, folder: Path, rule: BestRule) -> None:
        self.folder = folder
        self.rule = rule

    def note(self, name: str, scores: Mapping[str, float], *, weights: Path, gain: GainOverStart | None = None) -> None:
        """Take the teacher of an evaluation as the best one if it is.

        Args:
            name: of the evaluation, `start` or `training_<iteration>`; the start of a run is always taken.
            scores: of it.
            weights: file of the teacher.
            gain: its difference to the start, if that is known with an interval.

        Raises:
            CheckpointError: the files cannot be written.
        """
        value = scores.get(self.rule.score, math.nan)
        if math.isnan(value):
            return
        best = None if name == START else self.read()
        if best is not None and not self.rule.is_better(value, best["value"]):
            return
        start = scores if name == START else {} if best is None else {self.rule.score: best["start_value"]}
        content = {
            "evaluation": name,
            "iteration": None if name == START else int(name.rpartition("_")[2]),
            "score": self.rule.score,
            "mode": self.rule.mode,
            "value": value,
            "start_value": start.get(self.rule.score),
            "over_start": None if gain is None else gain.as_plain(),
            "sentence": None if gain is None else gain.sentence(),
            "measured_on": self.rule.measured_on,
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
        try:
            best = json.loads((self.folder / BEST_NAME).read_text(encoding="utf-8"))
            is_ours = (best["score"], best["mode"], best["measured_on"]) == tuple(vars(self.rule).values())
            best["value"] = float(best["value"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return best if is_ours and (self.folder / TEACHER_NAME).is_file() else None

    def sentence(self) -> str:
        """Say which teacher is the best one, and how much better than the start."""
        path, best = self.folder / TEACHER_NAME, self.read()
        if best is None:
            return (
                f"there is no {TEACHER_NAME}: no evaluation gave {self.rule.score}; see evaluation.at_start and "
                f"evaluation.eval_period_iterations"
            )
        if best["evaluation"] == START:
            return (
                f"{path} holds the weights that the run started from: no evaluation was better than "
                f"{best['score']}={best['value']:.2f} of the start"
            )
        if best["sentence"]:
            gain = best["sentence"]
        elif best["start_value"] is None:
            gain = f"{best['score']}={best['value']:.2f}, the start was not evaluated"
        else:
            gain = f"{best['score']}={best['value']:.2f}, {best['start_value']:.2f} at the start"
        caution = (
            "; without labels nobody can tell whether it is better for a task"
            if best["score"] == LABEL_FREE_SCORE
            else ""
        )
        return f"{path} holds the teacher of iteration {best['iteration']}: {gain}{caution}"


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file, which is only ever replaced as a whole, a second name; where the disk cannot, copy it."""
    unfinished = target.with_name(f"{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, unfinished)
    if not unfinished.exists():
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
