"""A picture of a confusion matrix: which classes are taken for which."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinov2.eval.results import UNKNOWN

_MAX_COUNTED = 25  # classes up to which the counts are written into the cells
_MAX_NAMED = 60  # classes up to which they are named
_MAX_NAME = 24  # letters of a class


def draw_confusion(path: Path, confusion: np.ndarray, *, class_names: Sequence[str], title: str) -> None:
    """Draw each class's images by predicted class, shades by the share of the class, and write the picture.

    Args:
        path: of the PNG file; it appears whole or not at all.
        confusion: [C + 1, C]; the last row, of classes that the training set lacks, is left out if it is empty.
        class_names: [C].
        title: above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    names = [*class_names, UNKNOWN]
    if not confusion[-1].any():
        confusion, names = confusion[:-1], names[:-1]
    num_classes = len(class_names)
    side = 2.5 + min(max(0.35 * num_classes, 2.5), 13)  # inches
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="% of the class")
    if num_classes <= _MAX_COUNTED:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    _name_classes(axes, names, num_classes=num_classes)
    axes.set_title(_shortened(title, 90), fontsize=9, parse_math=False)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        figure.savefig(unfinished, dpi=110, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _name_classes(axes: Axes, names: Sequence[str], *, num_classes: int) -> None:
    axes.set_xlabel("predicted class")
    axes.set_ylabel("right class")
    if num_classes > _MAX_NAMED:
        return
    shown = [_shortened(name, _MAX_NAME) for name in names]
    axes.set_xticks(range(num_classes), shown[:num_classes], rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(shown)), shown, fontsize=7, parse_math=False)


def _shortened(text: str, most: int) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= most else f"{text[:most]}..."
