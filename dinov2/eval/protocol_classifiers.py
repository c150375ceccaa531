"""Classifiers of protocol scores: a vote of the nearest comparable profiles, or logistic regression on all of them.

Shapes: p profiles, D features, E columns whose values must differ, C classes.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dinov2 import distributed
from dinov2.errors import ConfigError
from dinov2.eval.neighbours import vote
from dinov2.eval.protocol_forms import Protocol

_MAX_STEPS = 1000  # of logistic regression


def num_neighbours(protocol: Protocol, num_profiles: int) -> int:
    """Return how many neighbours are looked for.

    Raises:
        ConfigError: there are not so many profiles.
    """
    if protocol.classifier != "knn":
        return 1  # to name the nearest
    if protocol.k >= num_profiles:
        raise ConfigError(
            f"--protocol {protocol.name}: k={protocol.k} must be below the number of profiles, {num_profiles}"
        )
    return protocol.k


def votes_of_neighbours(
    similarities: Tensor, nearest: Tensor, targets: Tensor, *, temperature: float, num_classes: int
) -> np.ndarray:
    """Let the neighbours vote, [p, C]; equal votes for all labels where there is no neighbour."""
    is_alone = nearest[:, 0] < 0
    similarities = similarities.masked_fill(is_alone[:, None], 0)
    k = similarities.shape[1]
    ((_, votes),) = vote(
        similarities, targets[nearest.clamp(min=0)], ks=[k], temperature=temperature, num_classes=num_classes
    )
    return torch.where(is_alone[:, None], 1 / num_classes, votes).numpy()


def logistic_probabilities(values: Tensor, targets: Tensor, codes: Tensor, *, c: float, num_classes: int) -> np.ndarray:
    """Probabilities by logistic regression, [p, C]; a model for each group, fitted to all it may be compared with.

    The features of each fit are scaled to mean 0 and variance 1. Ranks take every W-th group.
    """
    data, labels = values.double().numpy(), targets.numpy()
    kinds, inverse = np.unique(codes.numpy(), axis=0, return_inverse=True)
    scores = np.zeros((len(data), num_classes))
    for number in range(distributed.get_rank(), len(kinds), distributed.get_world_size()):
        rows = np.flatnonzero(inverse.reshape(-1) == number)
        fitted = np.flatnonzero((codes.numpy() != kinds[number]).all(axis=1))
        known = np.unique(labels[fitted])
        if len(known) < 2:
            scores[np.ix_(rows, known)] = 1
            continue
        scaler = StandardScaler().fit(data[fitted])
        model = LogisticRegression(C=c, max_iter=_MAX_STEPS).fit(scaler.transform(data[fitted]), labels[fitted])
        scores[np.ix_(rows, known)] = model.predict_proba(scaler.transform(data[rows]))
    scores = distributed.all_reduce_sum(torch.from_numpy(scores)).numpy()
    return np.where(scores.sum(axis=1, keepdims=True) > 0, scores, 1 / num_classes)
