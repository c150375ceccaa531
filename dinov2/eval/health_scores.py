"""All measures of one set of features, under their names."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import on_main_first
from dinov2.eval.health_measures import (
    effective_rank,
    feature_std,
    mean_cosine,
    participation_ratio,
    rankme,
    singular_values,
)
from dinov2.eval.health_pairs import PairMeasures, compare_pairs


@dataclass(frozen=True, kw_only=True)
class Health:
    """What the features of a sample say."""

    scores: Mapping[str, float]  # by name of the measure, see `dinov2.eval.health_measures`
    spectrum: np.ndarray  # singular values of the centred features, largest first
    pairs: PairMeasures


def measure(values: Tensor, *, device: torch.device, duplicate_cosine: float = 2.0, max_pairs: int = 0) -> Health:
    """Measure features [n, D], n >= 2; called by all ranks with the same, equal results on all.

    The other arguments are those of `compare_pairs`.
    """
    pairs = compare_pairs(values, device=device, duplicate_cosine=duplicate_cosine, max_pairs=max_pairs)
    spectra = on_main_first(lambda: [singular_values(values, is_centred=is_centred) for is_centred in (False, True)])
    scores = {
        "rankme": rankme(spectra[0]),
        "effective_rank": effective_rank(spectra[1]),
        "participation_ratio": participation_ratio(spectra[1]),
        "feature_std": feature_std(values),
        "mean_cosine": mean_cosine(values),
        "uniformity": pairs.uniformity,
    }
    return Health(scores=scores, spectrum=spectra[1].numpy(), pairs=pairs)
