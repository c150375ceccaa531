"""Picture of the directions that features use: singular values, largest first."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinov2.errors import ConfigError

_SMALLEST = 1e-6  # of the largest: below is rounding noise of float32 features


def plot_spectrum(spectra: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw singular values over their number, each relative to the largest of its set, both axes logarithmic.

    A line that stays high up to the last number: all directions are used. One that drops early: the features have
    collapsed to the directions before the drop.

    Args:
        spectra: name for the legend to singular values, largest first, not all 0.
        path: picture to write.

    Raises:
        ConfigError: it cannot be written.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in spectra.items():
        shown = values[values > _SMALLEST * values[0]]
        axes.plot(np.arange(1, len(shown) + 1), shown / values[0], linewidth=1.4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value over the largest")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output-dir") from error
