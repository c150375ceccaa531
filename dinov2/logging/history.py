"""History of a run, or of any loop of one's own: metrics of each iteration and of each epoch.

    history = History.load("runs/first/training_metrics.json")
    history.get_metric("total_loss", per="epoch")
    history.plot("curves.png")

Saved, it is `training_metrics.json`: a JSON object a line; those of epochs, which a training run does not write, have
`epoch` in the place of `iteration`.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dinov2.errors import ConfigError, DatasetError
from dinov2.logging.curves import draw_curves

METRICS_NAME = "training_metrics.json"
Per = Literal["iteration", "epoch"]


class History:
    """Values of metrics by iteration (counted from 0) and by epoch (counted from 0).

    Args:
        epoch_length: iterations of an epoch, from which the means of an epoch are computed; None: epochs have only the
            values that were recorded for them.
    """

    def __init__(self, *, epoch_length: int | None = None) -> None:
        if epoch_length is not None and epoch_length < 1:
            raise ConfigError(f"epoch_length={epoch_length}: must be at least 1 iteration")
        self.epoch_length = epoch_length
        self._rows: dict[Per, dict[int, dict[str, float]]] = {"iteration": {}, "epoch": {}}

    def record(self, *, iteration: int | None = None, epoch: int | None = None, **values: float) -> None:
        """Note values of one iteration, or of one epoch; later ones of the same name replace earlier ones.

        Raises:
            ValueError: neither or both of iteration and epoch are given.
        """
        if (iteration is None) == (epoch is None):
            raise ValueError("record() takes iteration=... or epoch=...")
        per, number = ("iteration", iteration) if epoch is None else ("epoch", epoch)
        numbers = {name: math.nan if value is None else float(value) for name, value in values.items()}
        self._rows[per].setdefault(int(number), {}).update(numbers)

    def __len__(self) -> int:
        """Number of iterations that have values."""
        return len(self._rows["iteration"])

    def names(self, *, per: Per = "iteration") -> list[str]:
        """Names of the metrics, in the order in which they came up."""
        return list(dict.fromkeys(name for _, values in self._table(per) for name in values))

    def get_metric(self, name: str, *, per: Per = "iteration") -> tuple[np.ndarray, np.ndarray]:
        """Return (iterations or epochs int64, values float64) where the metric has a value, in rising order.

        Raises:
            KeyError: no such metric was recorded.
        """
        found = [(number, values[name]) for number, values in self._table(per) if name in values]
        if not found:
            known = ", ".join(self.names(per=per)) or "none"
            raise KeyError(f"no metric {name!r} per {per}; there are: {known}")
        numbers, values = zip(*found, strict=True)
        return np.array(numbers, dtype=np.int64), np.array(values, dtype=np.float64)

    def to_dataframe(self, *, per: Per = "iteration") -> pd.DataFrame:
        """Return a table with a row for each iteration or epoch, its number as index; NaN where there is no value."""
        table = list(self._table(per))
        index = pd.Index([number for number, _ in table], name=per)
        return pd.DataFrame([values for _, values in table], index=index, columns=self.names(per=per))

    def save(self, path: str | Path) -> None:
        """Write the history; the file appears whole or not at all. NaN and infinity are written as null.

        Raises:
            ConfigError: it cannot be written.
        """
        path = Path(path).expanduser()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for per, rows in self._rows.items():
                    for number, values in sorted(rows.items()):
                        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
                        file.write(json.dumps({per: number, **shown}, allow_nan=False) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ConfigError(f"{path}: the history cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: str | Path, *, epoch_length: int | None = None) -> "History":
        """Read the metrics of a run, also of one that goes on; a line that was not completely written is left out.

        Args:
            path: `training_metrics.json`, or the folder of a run.
            epoch_length: iterations of an epoch (`train.OFFICIAL_EPOCH_LENGTH`); see the class.

        Raises:
            DatasetError: the file is missing or holds no metrics.
        """
        path = Path(path).expanduser()
        path = path / METRICS_NAME if path.is_dir() else path
        history = cls(epoch_length=epoch_length)
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise DatasetError(f"{path}: no metrics can be read there ({error.strerror})") from error
        for line in lines:
            history._add_line(line)
        if not any(history._rows.values()):
            raise DatasetError(f"{path}: holds no metrics")
        return history

    def plot(self, png_path: str | Path, *, names: Sequence[str] | None = None, per: Per = "iteration") -> None:
        """Draw the curves into one picture.

        Args:
            png_path: picture to write.
            names: metrics to draw; None: all.
            per: iteration, drawn at the number of steps done, or epoch, drawn at the number of epochs done.

        Raises:
            KeyError: there is no such metric.
            DatasetError: there is nothing to draw.
        """
        curves = {name: self.get_metric(name, per=per) for name in (self.names(per=per) if names is None else names)}
        if not curves:
            raise DatasetError(f"this history has no metrics per {per} to draw")
        unit = "steps" if per == "iteration" else "epochs"
        draw_curves({name: (numbers + 1, values) for name, (numbers, values) in curves.items()}, png_path, unit=unit)

    def _add_line(self, line: str) -> None:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            return
        for per in ("iteration", "epoch"):
            if isinstance(values, dict) and isinstance(values.get(per), int):
                number = values.pop(per)
                values.pop("epoch", None)  # a line of an iteration may also say which epoch that was in
                numbers = {name: value for name, value in values.items() if isinstance(value, int | float | None)}
                self.record(**{per: number}, **numbers)
                return

    def _table(self, per: Per) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Rows in rising order; of epochs, the means of their iterations under what was recorded for them."""
        if per not in self._rows:
            raise ValueError(f"per={per!r}: must be iteration or epoch")
        rows = self._rows[per]
        means = self._means() if per == "epoch" and self.epoch_length is not None else {}
        for number in sorted(rows.keys() | means.keys()):
            yield number, means.get(number, {}) | rows.get(number, {})

    def _means(self) -> dict[int, dict[str, float]]:
        """Means over the iterations of each epoch that have a value; NaN counts as a value."""
        collected: dict[int, dict[str, list[float]]] = {}
        for iteration, values in sorted(self._rows["iteration"].items()):
            of_epoch = collected.setdefault(iteration // (self.epoch_length or 1), {})
            for name, value in values.items():
                of_epoch.setdefault(name, []).append(value)
        return {
            epoch: {name: math.fsum(values) / len(values) for name, values in of_epoch.items()}
            for epoch, of_epoch in collected.items()
        }


def plot_loss_history(history: History | str | Path, png_path: str | Path, *, per: Per = "iteration") -> None:
    """Draw the total loss and its terms into one picture.

    Args:
        history: or the path of `training_metrics.json`, or the folder of a run.
        png_path: picture to write.
        per: iteration or epoch.

    Raises:
        DatasetError: there are no metrics, or no losses among them.
    """
    history = history if isinstance(history, History) else History.load(history)
    names = [name for name in history.names(per=per) if name == "loss" or name.endswith("_loss")]
    if not names:
        shown: Any = ", ".join(history.names(per=per)) or "none"
        raise DatasetError(f"this history has no losses per {per}; its metrics are: {shown}")
    history.plot(png_path, names=names, per=per)
