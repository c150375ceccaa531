"""Result files of evaluations: `results_eval_<name>.json`, `predictions_<name>.csv`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.checkpoint_format import write_text


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all; numbers that are not finite become null.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(_as_json(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _as_json(value: Any) -> Any:
    """Turn arrays and NumPy's numbers into what JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
