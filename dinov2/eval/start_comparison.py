"""How an evaluation of a run compares with that of its start, image by image: on the same images, with an interval.

The start keeps which validation images it had right. Each later evaluation is paired with it: see
`dinov2.eval.comparison`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save

from dinov2.eval.comparison import Difference, compare
from dinov2.eval.predictions import Measurements

logger = logging.getLogger(__name__)

_NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class GainOverStart:
    """The difference of one score to that of the start, in points of a percentage."""

    difference: Difference
    num_images: int  # that both evaluations have
    num_units: int  # groups of them, or images without groups

    def sentence(self) -> str:
        """Say it in a line: `+2.1 points over start, 95 % interval +0.6 to +3.6 (knn_top1_pct 83.1, ...)`."""
        found = self.difference
        span = "no interval with one group"
        if found.low_pct is not None:
            span = f"95 % interval {found.low_pct:+.1f} to {found.high_pct:+.1f}"
        where = f"{self.num_images} images"
        if self.num_units < self.num_images:
            where += f" in {self.num_units} groups"
        return (
            f"{found.difference_pct:+.1f} points over start, {span} ({found.name} {found.value_pct:.1f}, "
            f"{found.reference_pct:.1f} at the start; {where})"
        )

    def as_plain(self) -> dict[str, Any]:
        """Return what a result file says of it."""
        found = self.difference
        return {
            "score": found.name,
            "start_pct": found.reference_pct,
            "difference_points": found.difference_pct,
            "low_points": found.low_pct,
            "high_points": found.high_pct,
            "p_value": found.p_value,
            "n_images": self.num_images,
            "n_groups": self.num_units,
        }


def write_measurements(found: Measurements) -> bytes:
    """Return the content of a safetensors file; groups are left out, the dataset knows them."""
    arrays = {"places": found.places} | {f"values.{name}": values for name, values in found.values.items()}
    return save({name: torch.from_numpy(array) for name, array in arrays.items()}, {"dataset": found.name})


def read_measurements(path: Path) -> Measurements | None:
    """Read the file; None if there is none, or it cannot be read."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, it is no mapping
            name = file.metadata()["dataset"]
        values = {key.removeprefix("values."): array for key, array in arrays.items() if key.startswith("values.")}
        return Measurements(name=name, values=values, places=arrays["places"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        logger.warning("%s cannot be read (%s); the comparison with the start is left out", path, error)
        return None


def gain_over_start(found: Measurements, start: Measurements | None, *, score: str) -> GainOverStart | None:
    """Compare one score with that of the start, on the images that both have; for rank 0.

    Returns:
        None where there is no start, or it was of another set.
    """
    if start is None or start.name != found.name or score not in start.values:
        return None
    if not len(np.intersect1d(found.places, start.places)):
        return None
    comparison = compare(found, start, num_resamples=_NUM_RESAMPLES)
    difference = comparison.differences.get(score)
    if difference is None:
        return None
    return GainOverStart(difference=difference, num_images=comparison.num_images, num_units=comparison.num_units)
