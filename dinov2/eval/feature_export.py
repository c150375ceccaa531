"""Write features for use elsewhere: NumPy, safetensors or a table."""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinov2.errors import ConfigError
from dinov2.eval.feature_set import NO_LABEL, FeatureSet

SUFFIXES = (".npz", ".safetensors", ".csv")


def check_export_path(path: str | Path, *, pool: str) -> None:
    """Check what a file is called before hours are spent on what shall stand in it.

    Raises:
        ConfigError: it has another suffix, or cannot hold these features.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: features are written as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if suffix == ".csv" and pool == "patches":
        raise ConfigError(f"{path}: a table has one row for an image, and patches are many; use .npz or .safetensors")


def save_features(
    path: str | Path,
    features: FeatureSet | Tensor | np.ndarray,
    targets: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write features to a file that other programs read; it appears whole or not at all.

    `.npz` and `.safetensors` hold `features` [n, D] and `targets` [n] (-1 without a label), and the columns: in a
    `.npz` as arrays `column_<name>`, in a `.safetensors` as JSON in its metadata. `.csv` has a row for an image:
    columns, target, class if known, then `f0`, `f1`, ... NumPy has no bfloat16, which becomes float32 there.

    Args:
        path: ends in .npz, .safetensors or .csv; its folder is made.
        features: a `FeatureSet`, or values [n, D] or [n, N, D].
        targets: of values, [n]; None: no labels. Not with a `FeatureSet`, which has its own.
        columns: of values, [n] each.

    Raises:
        ConfigError: the file cannot be written, or cannot hold these features.
    """
    if not isinstance(features, FeatureSet):
        values = torch.as_tensor(features).detach().cpu()
        labels = np.full(len(values), NO_LABEL) if targets is None else np.asarray(targets)
        features = FeatureSet(
            name="",
            values=values,
            targets=labels.astype(np.int64),
            places=np.arange(len(values)),
            columns=dict(columns or {}),
            pool="patches" if values.ndim == 3 else "cls",
        )
    path = Path(path).expanduser()
    check_export_path(path, pool=features.pool)
    write = {".npz": _write_npz, ".safetensors": _write_safetensors, ".csv": _write_csv}[path.suffix.lower()]
    _write_aside(path, lambda temporary: write(temporary, features))


def _write_aside(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be written ({reason}); choose another file") from error


def _as_numpy(values: Tensor) -> np.ndarray:
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _write_npz(path: Path, features: FeatureSet) -> None:
    columns = {f"column_{name}": np.asarray(column) for name, column in features.columns.items()}
    names = np.array(features.class_names, dtype=str)
    np.savez(path, features=_as_numpy(features.values), targets=features.targets, class_names=names, **columns)


def _write_safetensors(path: Path, features: FeatureSet) -> None:
    columns = {name: np.asarray(column).tolist() for name, column in features.columns.items()}
    metadata = {
        "columns": json.dumps(columns),
        "class_names": json.dumps(list(features.class_names)),
        "pool": features.pool,
        "dataset": features.name.encode("utf-8", "backslashreplace").decode(),
    }
    tensors = {"features": features.values.contiguous(), "targets": torch.from_numpy(features.targets.copy())}
    save_file(tensors, path, metadata=metadata)


def _write_csv(path: Path, features: FeatureSet) -> None:
    own = {name: column for name, column in features.columns.items() if name != "target"}
    names = features.class_names
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        class_column = ["class"] if names else []
        writer.writerow([*own, "target", *class_column, *(f"f{i}" for i in range(features.values.shape[1]))])
        for row, target in enumerate(features.targets.tolist()):
            name = [names[target] if 0 <= target < len(names) else ""] * len(class_column)
            values = _as_numpy(features.values[row])
            writer.writerow([*(column[row] for column in own.values()), target, *name, *map(str, values)])
