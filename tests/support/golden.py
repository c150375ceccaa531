"""Stored numbers of the official code, under the names that this project uses."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "golden"


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Read all arrays of `tests/golden/<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def golden_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors of one released model."""
    with gzip.open(FOLDER / "state_dict_shapes.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file)[name].items()}


def state_dict_of(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors under a prefix, which is cut off; "blocks.<chunk>.<i>.x" becomes "blocks.<i>.x"."""
    return {
        re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", key.removeprefix(prefix)): torch.from_numpy(array)
        for key, array in golden.items()
        if key.startswith(prefix)
    }
