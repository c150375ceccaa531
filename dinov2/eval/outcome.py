"""What goes into the fit-and-score step of an evaluation program, and what comes out."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.configs import Config
from dinov2.distributed.environment import Environment
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.predictions import Measurements, Predictions


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a program fits and scores; called with the same on every rank."""

    cfg: Config
    args: argparse.Namespace
    env: Environment
    train: FeatureSet
    val: FeatureSet  # the same object as `train` where both options name one set
    test: FeatureSet | None  # None without --test-dataset
    weights: str  # those of these features: of --pretrained-weights or --compare-to
    checkpoint_key: str
    output_dir: Path
    is_reference: bool = False  # the weights are those of --compare-to


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a program found; rank 0's is reported."""

    predictions: Predictions | None  # for the reported set; metrics, intervals and the comparison come from them
    further: Mapping[str, Predictions] = field(default_factory=dict)  # the same under a prefix: `nscb_top1_pct`
    measurements: Measurements | None = None  # numbers of images whose means are scores, as of queries
    named_scores: Mapping[str, float] = field(default_factory=dict)  # the program's own, percent
    table: str = ""  # the program's own lines for the screen
    details: Mapping[str, Any] = field(default_factory=dict)  # settings and findings for the results file, as JSON
