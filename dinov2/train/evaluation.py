"""Evaluations of a run: the teacher's weights as one file and, if configured, its k-NN accuracy."""

import json
import logging
import os
from pathlib import Path

import torch

from dinov2.checkpoint_format import write_text
from dinov2.configs import Config
from dinov2.distributed import Environment, on_main_first
from dinov2.errors import CheckpointError
from dinov2.eval.knn import OnlineKnn
from dinov2.fsdp import full_state_dict
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

RESULTS_NAME = "results_eval_knn.json"
TEACHER_NAME = "teacher_checkpoint.pth"


class TeacherEvaluation:
    """Evaluate the teacher into `<output_dir>/eval/<name>/`.

    Args:
        cfg: its datasets are opened here, so that a wrong path fails before training starts.
        env: device of this rank.
        output_dir: folder of the run.
    """

    def __init__(self, cfg: Config, env: Environment, *, output_dir: Path) -> None:
        self.output_dir = output_dir
        configured = cfg.evaluation.knn.train_dataset_path is not None
        self.knn = OnlineKnn(cfg, device=env.device) if configured else None
        self.last_scores: dict[str, float] = {}

    def __call__(self, model: SSLMetaArch, name: str) -> dict[str, float]:
        """Save the teacher and score it; returns scores in percent, equal on all ranks."""
        folder = self.output_dir / "eval" / name
        weights = full_state_dict(model.teacher)
        scores = self.knn(model.teacher["backbone"]) if self.knn is not None else {}
        on_main_first(_write, folder, {"teacher": weights}, scores)
        shown = "".join(f" {key}={value:.2f}" for key, value in scores.items())
        logger.info("evaluation=%s teacher=%s%s", name, folder / TEACHER_NAME, shown)
        self.last_scores = scores
        return scores

    def scores_of(self, name: str) -> dict[str, float]:
        """Read the scores of an earlier evaluation of this run; empty where there are none. For rank 0."""
        path = self.output_dir / "eval" / name / RESULTS_NAME
        return json.loads(path.read_text()) if path.is_file() else {}


def _write(folder: Path, weights: dict, scores: dict[str, float]) -> None:
    """Write both files so that each appears whole or not at all."""
    path = folder / TEACHER_NAME
    temporary = path.with_name(f"{TEACHER_NAME}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, temporary)
        os.replace(temporary, path)
        if scores:
            write_text(folder / RESULTS_NAME, json.dumps(scores, indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error in a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({str(error).splitlines()[0]}); free some space") from error
