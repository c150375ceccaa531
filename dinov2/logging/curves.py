"""Draw the curves of a run from its `training_metrics.json`: losses, k-NN, schedules, signs of collapse, speed."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinov2.errors import DatasetError
from dinov2.logging.metrics_file import read_metrics

Curve = tuple[np.ndarray, np.ndarray]  # steps done, values

_NUM_COLUMNS = 4
_PANEL_INCHES = (4.2, 2.9)  # width and height, margins included
_MAX_POINTS = 1000  # of a curve; longer ones are drawn as means of equal stretches
_OWN_PANEL = {  # metric: title
    "wd": "weight decay",
    "mom": "teacher momentum",
    "teacher_temp": "teacher temperature",
    "feature_std": "feature std (0 = collapsed)",
    "student_feature_std": "student's feature std (0 = collapsed)",
    "target_information": "what targets say of an image, nats",
    "image_separation": "image separation (1 = not told apart)",
    "prototype_usage": "prototypes in use, share",
    "blank_pct": "crops of one colour, %",
    "copies_pct": "crops that are there twice, %",
    "uniformity": "uniformity (0 = collapsed)",
    "alignment": "alignment of two views (lower = stabler)",
    "nn_overlap_with_start_pct": "neighbours kept since the start, %",
    "teacher_entropy": "teacher entropy, nats",
    "cls_norm": "class token norm",
    "patch_norm": "patch token norm",
    "images_per_s": "images/s",
    "data_s": "waiting for data, s",
    "current_batch_size": "images per step",
    "peak_gib": "peak memory, GiB",
}


def plot_training_curves(
    json_path: str | Path, png_path: str | Path, *, start_scores: Mapping[str, float] | None = None
) -> None:
    """Draw all curves of a run into one picture.

    Args:
        json_path: `training_metrics.json` of the run.
        png_path: picture to write.
        start_scores: scores of the evaluation before the first step, which the file does not hold.

    Raises:
        DatasetError: the file is missing or holds no metrics.
    """
    curves = _read_curves(Path(json_path))
    for name, score in (start_scores or {}).items():
        steps, values = curves.get(name, (np.empty(0), np.empty(0)))
        curves[name] = (np.concatenate([[0], steps]), np.concatenate([[score], values]))
    draw_curves(curves, png_path)


def draw_curves(curves: Mapping[str, Curve], png_path: str | Path, *, unit: str = "steps") -> None:
    """Draw curves into one picture, those that belong together in one panel.

    Args:
        curves: by name of the metric; at least one.
        png_path: picture to write.
        unit: of the horizontal axis.
    """
    panels = {title: {name: curves[name] for name in names} for title, names in _panels(curves).items()}
    draw_panels(panels, png_path, unit=unit)


def draw_panels(panels: Mapping[str, Mapping[str, Curve]], png_path: str | Path, *, unit: str = "steps") -> None:
    """Draw curves into one picture, in panels of one's own.

    Args:
        panels: title to curves by name; at least one, none empty.
        png_path: picture to write.
        unit: of the horizontal axis.
    """
    num_columns = min(_NUM_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = _figure(num_rows, num_columns)
    last_step = max(steps[-1] for curves in panels.values() for steps, _ in curves.values())
    for index, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        _draw(axes, curves, title=title, last_step=last_step, unit=unit)
    figure.savefig(png_path, dpi=110)


def _figure(num_rows: int, num_columns: int) -> Figure:
    """Make a figure with fixed margins: finding the smallest ones would take as long as drawing."""
    width, height = _PANEL_INCHES[0] * num_columns, _PANEL_INCHES[1] * num_rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - 0.35 / height)
    figure.subplots_adjust(wspace=0.22, hspace=0.38)  # shares of a panel: its numbers, title and label
    return figure


def _read_curves(path: Path) -> dict[str, Curve]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such metrics file")
    points: dict[str, tuple[list[int], list[float]]] = {}
    for values in read_metrics(path):
        step = values.pop("iteration") + 1
        for name, value in values.items():
            steps, numbers = points.setdefault(name, ([], []))
            steps.append(step)
            numbers.append(math.nan if value is None else value)
    if not points:
        raise DatasetError(f"{path}: holds no metrics to draw")
    return {name: (np.asarray(steps), np.asarray(numbers, dtype=float)) for name, (steps, numbers) in points.items()}


def _panels(curves: Mapping[str, Curve]) -> dict[str, list[str]]:
    """Sort the curves into panels: title to names."""
    groups = {
        "total loss": ["total_loss"],
        "loss terms": [name for name in curves if name.endswith("_loss") and name != "total_loss"],
        "k-NN accuracy, %": [name for name in curves if name.startswith("knn")],
        "directions in use": ["rankme", "effective_rank"],
        "norm of the centres": [name for name in curves if name.endswith("center_norm")],
        "gradient norm": [name for name in curves if name.startswith("grad_norm")],
        "learning rate": ["lr", "last_layer_lr"],
    }
    panels = {title: present for title, names in groups.items() if (present := [n for n in names if n in curves])}
    for name, title in _OWN_PANEL.items():
        if name in curves:
            panels.setdefault(title, []).append(name)
    drawn = {name for names in panels.values() for name in names}
    return panels | {name: [name] for name in curves if name not in drawn}


def title_of(name: str) -> str:
    """Return the title of a panel that shows one metric alone."""
    return _OWN_PANEL.get(name, name)


def _draw(axes: Axes, curves: Mapping[str, Curve], *, title: str, last_step: int, unit: str) -> None:
    axes.set_title(title, fontsize=10)
    for name, curve in curves.items():
        steps, values = _thin(curve)
        marker = "o" if len(steps) <= 20 else None
        axes.plot(steps, values, linewidth=1.2, marker=marker, markersize=3, label=name)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlim(0, max(last_step, 1))
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _thin(curve: Curve) -> Curve:
    steps, values = curve
    if len(steps) <= _MAX_POINTS:
        return curve
    stretch = math.ceil(len(steps) / _MAX_POINTS)
    starts = np.arange(0, len(steps), stretch)
    counts = np.diff(np.append(starts, len(steps)))
    return steps[starts], np.add.reduceat(values, starts) / counts
