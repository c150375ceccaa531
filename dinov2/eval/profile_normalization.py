"""Normalisation of features by what varies without cause: controls (DMSO wells) are alike, so how they differ is noise.

A list of steps, applied in order, each written `NAME` or `NAME:SETTING` with commas between them:

    center[:COLUMN]       subtract the mean of the controls, of all or of each value of a column (plate)
    standardize[:COLUMN]  the same, then divide by the standard deviation of the controls, feature by feature
    whiten[:EPSILON]      typical-variation normalisation: principal components of the controls, each divided by its
                          standard deviation, so that what varies much between controls counts little; EPSILON
                          (default 0.01) of the mean variance is added to each variance
    coral:COLUMN          align the covariance of the controls of each value of a column (batch) with that of all
    pca:N                 first N principal components of all images, controls included; N below 1: as many as hold
                          that share of the variance

Variances are those of the population (divided by the number of controls). Directions in which controls do not vary at
all, as always where there are fewer controls than features, are left out by whitening: nothing is known of them.

Source: Ando et al. 2017, doi:10.1101/161422 (whitening, then CORAL by batch); CORAL: Sun et al. 2016, arXiv:1511.05547.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.data.names import nearest
from dinov2.errors import ConfigError, DatasetError

EPSILON = 0.01  # share of the mean variance added to each
_FLAT = 1e-10  # of the largest variance: what rounding leaves of none


@dataclass(frozen=True)
class Step:
    """One step as it was written."""

    name: str
    setting: str = ""  # column or number

    def __str__(self) -> str:
        return f"{self.name}:{self.setting}" if self.setting else self.name

    @property
    def column(self) -> str | None:
        """Column whose values are normalised one by one; None for all images together."""
        return self.setting if self.name in _BY_COLUMN and self.setting else None


def parse_steps(text: str) -> tuple[Step, ...]:
    """Read steps as they stand on the command line; `none` is no step.

    Raises:
        ConfigError: a step is unknown or its setting is wrong.
    """
    if text == "none":
        return ()
    return tuple(_parse_step(part.strip(), text) for part in text.split(","))


def _parse_step(part: str, text: str) -> Step:
    name, colon, setting = part.partition(":")
    if name not in _STEPS:
        raise ConfigError(f"--normalize {text}: unknown step {name!r}{nearest(name, list(_STEPS))}")
    if colon and not setting:
        raise ConfigError(f"--normalize {text}: {part!r} ends in a colon; name what stands behind it, or leave it out")
    if name == "coral" and not setting:
        raise ConfigError(f"--normalize {text}: coral needs a column whose values are aligned, e.g. coral:batch")
    if name == "whiten":
        _require_number(setting or str(EPSILON), lambda number: number >= 0, text, "whiten:EPSILON", "at least 0")
    if name == "pca":
        rule = "a whole number of components, or a share of the variance between 0 and 1, e.g. pca:64"
        _require_number(
            setting, lambda number: 0 < number < 1 or (number >= 1 and number % 1 == 0), text, "pca:N", rule
        )
    return Step(name, setting)


def _require_number(value: str, holds: Callable[[float], bool], text: str, what: str, rule: str) -> None:
    try:
        is_good = holds(float(value)) and np.isfinite(float(value))
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(f"--normalize {text}: {what} must be {rule}")


def normalize(
    values: np.ndarray,
    steps: Sequence[Step],
    *,
    is_control: np.ndarray,
    columns: Mapping[str, np.ndarray],
    name: str,
) -> np.ndarray:
    """Apply the steps, each fitted to what the one before it left.

    Args:
        values: features, [n, D] float64; left unchanged.
        steps: in this order.
        is_control: [n] bool.
        columns: texts of the images, [n] each, those that the steps name.
        name: of the dataset, for sentences.

    Returns:
        [n, D'] float64; D' < D after pca, and after whiten if controls vary in fewer directions.

    Raises:
        DatasetError: there are fewer than two controls, or fewer than two for a value of a column.
        ConfigError: pca asks for more components than there are.
    """
    for step in steps:
        if step.name != "pca":
            _require_controls(is_control, step=step, columns=columns, name=name)
        values = _STEPS[step.name](values, step, is_control, columns)
    return values


def _require_controls(is_control: np.ndarray, *, step: Step, columns: Mapping[str, np.ndarray], name: str) -> None:
    groups = np.zeros(len(is_control), dtype=int) if step.column is None else columns[step.column]
    for group in np.unique(groups):
        count = int((is_control & (groups == group)).sum())
        if count < 2:
            where = name if step.column is None else f"{name}: {step.column} {group}"
            raise DatasetError(
                f"{where} has {count or 'no'} image{'s' * (count != 1)} of controls, but --normalize {step} is fitted "
                "on them and needs two; keep the controls in the dataset (BBBC021: controls=keep, split=all), or leave "
                "this step out"
            )


def _groups_of(step: Step, columns: Mapping[str, np.ndarray], count: int) -> list[np.ndarray]:
    """Return the rows of each value of the step's column; all rows without one."""
    if step.column is None:
        return [np.arange(count)]
    values = columns[step.column]
    return [np.flatnonzero(values == value) for value in np.unique(values)]


def _center(values: np.ndarray, step: Step, is_control: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    found = values.copy()
    for rows in _groups_of(step, columns, len(values)):
        controls = values[rows[is_control[rows]]]
        found[rows] -= controls.mean(axis=0)
        if step.name == "standardize":
            spread = controls.std(axis=0)
            found[rows] /= np.where(spread > 0, spread, 1)
    return found


def _whiten(values: np.ndarray, step: Step, is_control: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    center = values[is_control].mean(axis=0)
    variances, directions = np.linalg.eigh(_covariance(values[is_control]))
    varies = variances > _FLAT * variances[-1]
    if not varies.any():
        raise DatasetError("all controls have the same features; --normalize whiten has nothing to learn from them")
    epsilon = float(step.setting or EPSILON) * variances[varies].mean()
    # the directions are those with the largest variance first, each with its largest part above 0
    chosen = directions[:, varies][:, ::-1]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])])
    return (values - center) @ (chosen / np.sqrt(variances[varies][::-1] + epsilon))


def _coral(values: np.ndarray, step: Step, is_control: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each group is centred on its controls, brought to their unit covariance, then to that of all controls."""
    groups = _groups_of(step, columns, len(values))
    centered = _center(values, Step("center", step.setting), is_control, columns)
    of_all = _covariance(centered[is_control])
    regular = np.eye(len(of_all)) * np.trace(of_all) / len(of_all)  # few controls a batch: shrunk to a sphere by half
    target = _power(of_all + regular, 0.5)
    found = np.empty_like(centered)
    for rows in groups:
        source = _power(_covariance(centered[rows[is_control[rows]]]) + regular, -0.5)
        found[rows] = centered[rows] @ source @ target
    return found


def _pca(values: np.ndarray, step: Step, is_control: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    wanted = float(step.setting)
    variances, directions = np.linalg.eigh(_covariance(values))
    variances, directions = variances[::-1].clip(min=0), directions[:, ::-1]
    if wanted < 1:
        count = int(np.searchsorted(np.cumsum(variances) / variances.sum(), wanted) + 1)
    else:
        count = int(wanted)
    largest = min(values.shape[1], len(values) - 1)
    if count > largest:
        raise ConfigError(
            f"--normalize {step}: {len(values)} images of {values.shape[1]} features have at most {largest} components"
        )
    return (values - values.mean(axis=0)) @ directions[:, :count]


def _covariance(values: np.ndarray) -> np.ndarray:
    """Covariance of the features, [D, D], divided by the number of rows."""
    centered = values - values.mean(axis=0)
    return centered.T @ centered / len(values)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Power of a symmetric positive matrix."""
    variances, directions = np.linalg.eigh(matrix)
    return (directions * variances.clip(min=np.finfo(float).tiny) ** exponent) @ directions.T


_BY_COLUMN = ("center", "standardize", "coral")
_STEPS: dict[str, Callable[[np.ndarray, Step, np.ndarray, Mapping[str, np.ndarray]], np.ndarray]] = {
    "center": _center,
    "standardize": _center,
    "whiten": _whiten,
    "coral": _coral,
    "pca": _pca,
}
