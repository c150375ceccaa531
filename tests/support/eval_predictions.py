"""Predictions of a made-up classifier."""

import numpy as np

from dinov2.eval.predictions import Predictions


def predictions(targets, scores, **more):
    scores, targets = np.asarray(scores, dtype=float), np.asarray(targets)
    names = tuple("abcdefghijkl"[: scores.shape[1]])
    return Predictions(
        name="val", targets=targets, scores=scores, class_names=names, places=np.arange(len(targets)), **more
    )


def random_predictions(num_images, num_classes, *, seed=0, unknown=0, ties=True, **more):
    generator = np.random.default_rng(seed)
    targets = generator.integers(num_classes, size=num_images)
    scores = generator.random((num_images, num_classes))
    scores[np.arange(num_images), targets] += 0.3
    scores = np.maximum(np.round(scores, 1), 0.1) if ties else scores
    targets[:unknown] = -1
    return predictions(targets, scores, **more)
