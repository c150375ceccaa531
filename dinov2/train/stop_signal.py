"""Let a run finish its step and save before a signal ends it."""

import signal
from collections.abc import Iterable
from types import FrameType

from dinov2.errors import StoppedEarly
from dinov2.signals import HandledSignals


class StopSignal(HandledSignals):
    """While entered, a signal tells the run to stop instead of ending the process in the middle of anything.

    SIGINT is Ctrl-C; schedulers send SIGTERM, and SIGUSR1 or SIGUSR2 where they are told to warn of the time limit.
    Before `begin_steps` there is nothing to save, and a signal raises `StoppedEarly` (SIGINT: KeyboardInterrupt) where
    the main thread is. From then on it sets `received`; a second SIGINT ends the run all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: str | None = None
        self._saves = False

    def begin_steps(self) -> None:
        """From now on a step is ended and saved first."""
        self._saves = True

    @property
    def leaves_time(self) -> bool:
        """Say whether the process may take its time to end: no scheduler has told it to stop."""
        return self.received in (None, signal.SIGINT.name)

    def _numbers(self) -> Iterable[int]:
        return (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before, self.received = self.received, signal.Signals(number).name
        if number == signal.SIGINT and (not self._saves or before == self.received):
            raise KeyboardInterrupt
        if not self._saves and before is None:  # a launcher may pass on what came directly, too
            raise StoppedEarly(self.received)
