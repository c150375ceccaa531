"""A scatter of images in the plane, coloured by one of their columns.

n images.
"""

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MOST_NAMED = 20  # values that get a colour and a line of the legend
_MOST_LETTERS = 30  # of a name
_MOST_OF_TITLE = 140  # letters of a line
_GREY = "#c8c8c8"
_INCHES = (9.0, 7.0)
_DPI = 120


def draw_scatter(path: Path, points: np.ndarray, *, column: np.ndarray | None, title: str, column_name: str) -> None:
    """Draw points, one colour for each value of a column, and write the picture, 1080 x 840 px.

    Many values: the most frequent get colours, all others grey. Numbers of more values than that get a scale.

    Args:
        path: of the PNG file; it appears whole or not at all.
        points: [n, 2].
        column: [n], names or numbers; None: one colour for all.
        title: above the picture, lines of at most 140 letters.
        column_name: above the legend.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = float(np.clip(12_000 / max(len(points), 1), 3, 40))
    if column is None:
        axes.scatter(*points.T, s=size, linewidths=0)
    elif np.issubdtype(column.dtype, np.number) and len(np.unique(column)) > _MOST_NAMED:
        drawn = axes.scatter(*points.T, s=size, c=column.astype(float), cmap="viridis", linewidths=0, alpha=0.8)
        figure.colorbar(drawn, ax=axes, label=column_name)
    else:
        _draw_classes(axes, points, column, size=size, column_name=column_name)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    lines = [_shortened(line, _MOST_OF_TITLE) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=9, parse_math=False)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        figure.savefig(unfinished, dpi=_DPI, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_classes(axes: Axes, points: np.ndarray, column: np.ndarray, *, size: float, column_name: str) -> None:
    values, numbers, counts = np.unique(column, return_inverse=True, return_counts=True)
    named = np.sort(np.argsort(-counts, kind="stable")[:_MOST_NAMED])
    others = ~np.isin(numbers, named)
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    if others.any():
        label = f"{len(values) - len(named)} others ({others.sum()})"
        axes.scatter(*points[others].T, color=_GREY, label=label, **style)
    colours = matplotlib.colormaps["tab10" if len(named) <= 10 else "tab20"].colors
    for colour, number in zip(colours, named, strict=False):
        label = f"{_shortened(str(values[number]), _MOST_LETTERS)} ({counts[number]})".lstrip("_")
        axes.scatter(*points[numbers == number].T, color=colour, label=label.replace("$", r"\$"), **style)
    legend = axes.legend(
        title=_shortened(column_name, _MOST_LETTERS), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False
    )
    for handle in legend.legend_handles:
        handle.set_sizes([30])


def _shortened(text: str, most: int) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= most else f"{text[:most]}..."
