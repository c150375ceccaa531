"""Let a run finish its step and save before a signal ends it."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """While entered, a signal sets `received` instead of ending the process; a second SIGINT ends it.

    SIGINT is Ctrl-C; schedulers send SIGTERM, and SIGUSR1 or SIGUSR2 where they are told to warn of the time limit.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
