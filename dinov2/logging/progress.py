"""Progress of a run on screen: a bar on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

from dinov2.distributed import is_main_process

T = TypeVar("T")

logger = logging.getLogger("dinov2.train")

# name shown, key of the metric, how the steps since the last line become one number, format
_SHOWN = (
    ("loss", "total_loss", "mean", ".4f"),
    ("lr", "lr", "last", ".1e"),
    ("images_per_s", "images_per_s", "mean", ".0f"),
    ("data_s", "data_s", "mean", ".3f"),
    ("peak_gib", "peak_gib", "last", ".1f"),
)
_ON_BAR = ("loss", "lr", "images_per_s")
_LINE_PERIOD_S = 30


class Progress:
    """Show steps done; for rank 0.

    Args:
        total_steps: of the whole run.
        start_step: steps done before.
    """

    def __init__(self, *, total_steps: int, start_step: int) -> None:
        self._done = start_step
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Show the steps since the last call; the loss is their mean."""
        shown = summarise([values for _, values in rows])
        step = rows[-1][0] + 1
        if self._bar is None:
            logger.info("step=%d %s", step, " ".join(f"{name}={text}" for name, text in shown.items()))
        else:
            self._bar.set_postfix({name: shown[name] for name in _ON_BAR if name in shown}, refresh=False)
            self._bar.update(step - self._done)
        self._done = step

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Turn the values of several steps into one short text for each shown name that they have."""
    shown = {}
    for name, key, how, form in _SHOWN:
        values = [row[key] for row in rows if key in row]
        if values:
            shown[name] = format(sum(values) / len(values) if how == "mean" else values[-1], form)
    return shown


def track(items: Sequence[T], *, description: str) -> Iterator[T]:
    """Yield the items and show how far it is: a bar on a terminal, elsewhere a line each half minute; on rank 0."""
    if sys.stderr.isatty() and is_main_process():
        yield from tqdm(items, desc=description, dynamic_ncols=True, file=sys.stderr, leave=False)
        return
    shown_s = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - shown_s > _LINE_PERIOD_S and is_main_process():
            shown_s = time.monotonic()
            logging.getLogger("dinov2.eval").info("%s done=%d of=%d", description, done, len(items))
        yield item
