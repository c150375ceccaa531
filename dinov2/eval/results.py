"""Result files of evaluations: scores as JSON, predictions and counts of confusion as tables. Each appears whole or
not at all.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.checkpoint_format import write_text
from dinov2.eval.predictions import Predictions

UNKNOWN = "(unknown to training)"  # row of classes that the training set lacks
_OWN_COLUMNS = ("place", "path", "predicted", "is_right", "share")  # of the table of predictions


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON; numbers that are not finite become null.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(_as_json(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_predictions(path: Path, predictions: Predictions, *, with_shares: bool = False) -> None:
    """Write one line a row: place, path, group, the right class, the predicted one and its share of the scores.

    Args:
        path: of the CSV file.
        predictions: in the order of the lines.
        with_shares: the shares of all classes, too, one column each.

    Raises:
        OSError: the file cannot be written.
    """
    shares, predicted = predictions.shares(), predictions.predicted()
    names = np.array([*predictions.class_names, UNKNOWN], dtype=object)
    targets = predictions.columns.get("target", names[predictions.targets])
    columns: dict[str, Iterable[Any]] = {"place": predictions.places.tolist()}
    if predictions.paths is not None:
        columns["path"] = predictions.paths
    if predictions.groups is not None:
        columns["group"] = predictions.columns.get("group", predictions.groups)
    others = {
        f"metadata_{name}" if name in _OWN_COLUMNS else name: values
        for name, values in predictions.columns.items()
        if name not in ("group", "target")
    }
    columns |= {
        "target": targets,
        "predicted": names[predicted],
        "is_right": (predicted == predictions.targets).astype(int),
        "share": [f"{share:.6f}" for share in shares.max(axis=1)],
        **others,
    }
    if with_shares:
        columns |= {
            f"share_{name}": [f"{share:.6f}" for share in shares[:, number]]
            for number, name in enumerate(predictions.class_names)
        }
    write_text(path, table_text(list(columns), zip(*columns.values(), strict=True)))


def write_confusion(path: Path, confusion: np.ndarray, *, class_names: Sequence[str]) -> None:
    """Write how many images of each class (a line each) were predicted as each class (a column each), as CSV.

    Args:
        path: of the file.
        confusion: [C + 1, C]; the last row, of classes that the training set lacks, is left out if it is empty.
        class_names: [C].

    Raises:
        OSError: the file cannot be written.
    """
    names = [*class_names, UNKNOWN]
    lines = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
    write_text(path, table_text(["target", *class_names], lines if confusion[-1].any() else lines[:-1]))


def table_text(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Lay a table out as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_as_text(cell) for cell in header])
    writer.writerows([_as_text(cell) for cell in line] for line in lines)
    return text.getvalue()


def _as_text(cell: Any) -> str:
    """Bytes of file names that are no UTF-8 become escapes."""
    return str(cell).encode("utf-8", "backslashreplace").decode()


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
    if isinstance(value, bool | int | float | None):
        return value
    return _as_text(value)
