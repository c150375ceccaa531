"""Histograms of what `check_data` found out: brightness, sizes, labels, groups of each set, in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinov2.run.data_report import CheckedSet
from dinov2.run.data_table import printable
from dinov2.run.image_facts import SetFacts

_COLOURS = ("tab:red", "tab:green", "tab:blue")
_NUM_COLUMNS = 4
_MAX_BARS = 40
_MAX_NAME = 24  # letters of a class
_MAX_TITLE = 110  # letters of a dataset string


def plot_sets(sets: Sequence[CheckedSet], found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a row of histograms for each set and write the picture.

    Raises:
        OSError: it cannot be written.
    """
    figure = Figure(figsize=(4.2 * _NUM_COLUMNS, 3.4 * len(sets)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (checked, facts) in enumerate(zip(sets, found, strict=True)):
        axes = [figure.add_subplot(len(sets), _NUM_COLUMNS, row * _NUM_COLUMNS + place + 1) for place in range(4)]
        name = printable(checked.name)
        title = name if len(name) <= _MAX_TITLE else f"{name[:_MAX_TITLE]}..."
        axes[0].annotate(
            title,
            (0, 1.16),
            xycoords="axes fraction",
            fontsize=9,
            weight="bold",
            parse_math=False,
            annotation_clip=False,
        )
        _draw_brightness(axes[0], checked.facts)
        _draw_sizes(axes[1], checked.facts)
        _draw_labels(axes[2], facts["labels"])
        _draw_groups(axes[3], facts["groups"])
    figure.savefig(path, dpi=110)


def _draw_brightness(axes: Axes, facts: SetFacts) -> None:
    """Share of the pixels at each brightness, a line a channel."""
    _label(axes, "brightness of the pixels", "fraction of full scale", "share of the pixels")
    if not facts.brightness:
        return
    brightness = max(facts.brightness.values(), key=lambda one: one.count)
    shares = brightness.histogram / brightness.count  # [C, bins]
    places = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
    for number, share in enumerate(shares):
        colour = _COLOURS[number] if len(shares) == 3 else None
        axes.plot(places, share, linewidth=1, color=colour, label=f"channel {number + 1}")
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.legend(fontsize=6, frameon=False)


def _draw_sizes(axes: Axes, facts: SetFacts) -> None:
    """How often each length of the sides occurs."""
    _label(axes, "sides of the images", "px", "images")
    readable = facts.is_readable
    if not readable.any():
        return
    width, height = facts.width[readable], facts.height[readable]
    low, high = min(width.min(), height.min()), max(width.max(), height.max())
    bins = np.linspace(low, high + 1, 41) if high > low else np.array([low - 0.5, low + 0.5])
    axes.hist([width, height], bins=bins, label=["width", "height"])
    axes.legend(fontsize=7, frameon=False)


def _draw_labels(axes: Axes, labels: Mapping[str, Any] | None) -> None:
    """How many images each class has."""
    _label(axes, "labels", "", "images")
    if not labels:
        _say(axes, "no labels")
        return
    images = labels["num_images"]
    if len(images) > _MAX_BARS:
        axes.plot(sorted(images.values(), reverse=True), linewidth=1)
        axes.set_xlabel("classes, the largest first", fontsize=8)
        axes.set_ylim(bottom=0)
        return
    names = [printable(name) for name in images]
    names = [name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..." for name in names]
    axes.bar(range(len(names)), list(images.values()))
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 5 else 0, fontsize=7, parse_math=False)


def _draw_groups(axes: Axes, groups: Mapping[str, Any] | None) -> None:
    """How many groups there are of each size."""
    _label(axes, "groups", "images of a group", "groups")
    if not groups:
        _say(axes, "no groups")
        return
    sizes = groups["num_groups_by_size"]
    if len(sizes) > _MAX_BARS:
        axes.hist(list(sizes), bins=_MAX_BARS, weights=list(sizes.values()))
        return
    axes.bar(list(sizes), list(sizes.values()))
    if len(sizes) == 1:
        axes.set_xticks(list(sizes))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=9, color="grey")
    axes.set_xticks([])
    axes.set_yticks([])


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=7)
    if y_label in ("images", "groups"):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
