"""Evaluations of a run: the teacher's weights as one file, label-free measures and, if configured, k-NN accuracy."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dinov2.configs import Config
from dinov2.distributed import Environment, on_main_first
from dinov2.errors import CheckpointError
from dinov2.eval.build import NamedDataset, build_eval_transform
from dinov2.eval.health_online import OnlineHealth, Preprocessed, SampleFeatures
from dinov2.eval.knn_online import SCORE_NAME, OnlineKnn
from dinov2.eval.predictions import Measurements
from dinov2.eval.start_comparison import GainOverStart, gain_over_start, read_measurements, write_measurements
from dinov2.fsdp import full_state_dict
from dinov2.train.best_teacher import START, BestRule, BestTeacher
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

KNN_NAME = "results_eval_knn.json"
HEALTH_NAME = "results_eval_health.json"
FEATURES_NAME = "health_features.safetensors"  # of the start, which later ones are compared with
TEACHER_NAME = "teacher_checkpoint.pth"
MANUAL = "manual_"  # begins the names of evaluations that are asked for by --eval-only
RIGHT_NAME = "knn_right_images.safetensors"  # of the start, which later ones are compared with


class TeacherEvaluation:
    """Evaluate the teacher into `<output_dir>/eval/<name>/`.

    Label-free measures look at images of the k-NN training set; without k-NN, of the training set itself. k-NN is
    compared with that of the start image by image, and the best teacher so far is kept: see `best`.

    Args:
        cfg: its datasets are opened here, so that a wrong path fails before training starts.
        env: device of this rank.
        dataset: training images, as they are.
        output_dir: folder of the run.
    """

    def __init__(self, cfg: Config, env: Environment, *, dataset: Any, output_dir: Path) -> None:
        self.output_dir = output_dir
        configured = cfg.evaluation.knn.train_dataset_path is not None
        self.knn = OnlineKnn.from_config(cfg, device=env.device) if configured else None
        self.training_images = Preprocessed(dataset, build_eval_transform(cfg))
        images = NamedDataset(str(cfg.train.dataset_path), self.training_images)
        images = images if self.knn is None else self.knn.train
        self.health = OnlineHealth.from_config(cfg, images, device=env.device)
        self.best = BestTeacher(output_dir, BestRule.from_config(cfg))
        self.last_scores: dict[str, float] = {}

    def __call__(self, model: SSLMetaArch, name: str) -> dict[str, float]:
        """Save the teacher and score it; returns the scores, equal on all ranks, those called `_pct` in percent."""
        folder = self._folder(name)
        weights = full_state_dict(model.teacher)
        backbone = model.teacher["backbone"]
        files: dict[str, bytes] = {}
        scores: dict[str, float] = {}
        known, gain = None, None
        is_start = name == START
        if self.knn is not None:
            known, val = self.knn.extract(backbone)
            result, right = self.knn.score(known, val)
            accuracies = result.named_scores()
            scores |= {key: score for key, score in accuracies.items() if key.endswith("_top1_pct")}
            gain = None if is_start else on_main_first(self._gain_over_start, right)
            files[KNN_NAME] = _as_json(scores | ({} if gain is None else {"over_start": gain.as_plain()}))
            if is_start:
                files[RIGHT_NAME] = write_measurements(right)
        if self.health is not None:
            start = None if is_start else on_main_first(SampleFeatures.read, self._folder(START) / FEATURES_NAME)
            measures, features = self.health(backbone, known=known, start=start)
            scores |= measures
            files[HEALTH_NAME] = _as_json(measures)
            if is_start:
                files[FEATURES_NAME] = features.write()
        on_main_first(_write, folder, {"teacher": weights}, files)
        shown = "".join(f" {key}={value:.2f}" for key, value in scores.items())
        logger.info("evaluation=%s teacher=%s%s", name, folder / TEACHER_NAME, shown)
        if gain is not None:
            logger.info("evaluation=%s: %s", name, gain.sentence())
        on_main_first(self._note_best, name, scores, gain)
        self.last_scores = scores
        return scores

    def if_missing(self, model: SSLMetaArch, name: str) -> dict[str, float]:
        """Return the scores of an evaluation of this run, evaluating unless that was done before."""
        if not on_main_first(self._is_done, name):
            return self(model, name)
        self.last_scores = on_main_first(self.scores_of, name)
        if not on_main_first(self.best.is_of, name):  # it may have been killed in between
            on_main_first(self._note_best, name, self.last_scores, None)
        return self.last_scores

    def scores_of(self, name: str) -> dict[str, float]:
        """Read the scores of an earlier evaluation of this run; empty where there are none. For rank 0."""
        paths = [self._folder(name) / file for file in (KNN_NAME, HEALTH_NAME)]
        return {
            key: score
            for path in paths
            if _is_written(path)
            for key, score in json.loads(path.read_text()).items()
            if isinstance(score, float)
        }

    def distrust_the_latest(self) -> None:
        """Make given weights the best teacher again, if no labels tell since when a run went wrong; for rank 0."""
        if self.best.rule.mode == "latest" and self.best.rule.has_weights:
            self._note_best(START, self.scores_of(START), None)

    def _gain_over_start(self, right: Measurements) -> GainOverStart | None:
        """Compare k-NN with that of the start, image by image; for rank 0."""
        start = read_measurements(self._folder(START) / RIGHT_NAME)
        return gain_over_start(right, start, score=SCORE_NAME)

    def _note_best(self, name: str, scores: Mapping[str, float], gain: GainOverStart | None) -> None:
        """Let the teacher of an evaluation, but for one that was asked for by hand, be the best one; for rank 0."""
        if not name.startswith(MANUAL):
            weights = self._folder(name) / TEACHER_NAME
            self.best.note(name, scores, weights=weights, start=self.scores_of(START), gain=gain)

    def _is_done(self, name: str) -> bool:
        wanted = {TEACHER_NAME: True, KNN_NAME: self.knn is not None, HEALTH_NAME: self.health is not None}
        return all(_is_written(self._folder(name) / file) for file, is_wanted in wanted.items() if is_wanted)

    def _folder(self, name: str) -> Path:
        return self.output_dir / "eval" / name


def _is_written(path: Path) -> bool:
    """Say whether a file is there; after a power failure it may be empty."""
    return path.is_file() and path.stat().st_size > 0


def _as_json(scores: Mapping[str, float]) -> bytes:
    return f"{json.dumps(scores, indent=2)}\n".encode()


def _write(folder: Path, weights: dict, files: Mapping[str, bytes]) -> None:
    """Write all files so that each appears whole or not at all."""
    _replace(folder / TEACHER_NAME, lambda path: torch.save(weights, path))
    for name, content in files.items():
        _replace(folder / name, lambda path, content=content: path.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error in a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({str(error).splitlines()[0]}); free some space") from error
