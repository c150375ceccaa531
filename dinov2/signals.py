"""Signals that are handled for a while, by the programs of a run and by the launcher."""

import signal
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Self


class HandledSignals:
    """While entered, `_note` is called for the signals of `_numbers`; then the earlier handlers are put back."""

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in self._numbers()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _numbers(self) -> Iterable[int]:
        raise NotImplementedError

    def _note(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError
