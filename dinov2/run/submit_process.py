"""A program as a process of its own, to which the signals of its job are passed on.

A process of its own, because a program sets its own signal handlers and ends in its own way.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from dinov2.signals import HandledSignals

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # a job, or ahead of its end
_BY_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Processes(HandledSignals):
    """Processes of one program; while this is entered, a signal to this process is passed on to them.

    Ctrl-C and the end of a terminal become SIGTERM, for which the programs save; they are also told to end if this
    process is killed.

    Args:
        in_own_sessions: where a terminal does not signal them as well; Slurm may lose sight of them there.
    """

    def __init__(self, *, in_own_sessions: bool = False) -> None:
        super().__init__()
        self._in_own_sessions = in_own_sessions
        self.stopped_by: str | None = None  # the first signal
        self._running: list[subprocess.Popen[bytes]] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for process in self._running:  # after an error of ours
            process.kill()

    def start(
        self, command: Sequence[str], *, folder: Path, variables: Mapping[str, str], output: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start one of them; `output`: for all it prints, None: where this process prints."""
        error = None if output is None else subprocess.STDOUT
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(variables),
            stdout=output,
            stderr=error,
            start_new_session=self._in_own_sessions,
            preexec_fn=end_with_parent,
        )
        self._running.append(process)
        if self.stopped_by is not None:  # it came while the process was being started
            process.send_signal(signal.Signals[self.stopped_by])
        return process

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of one; returns its exit code, 128 + the signal that ended it."""
        process.wait()
        return self.ended(process)

    def ended(self, process: subprocess.Popen[bytes]) -> int | None:
        """Return the exit code of one, 128 + the signal that ended it; None: it runs."""
        code = process.poll()
        if code is None:
            return None
        if process in self._running:
            self._running.remove(process)
        return code if code >= 0 else 128 - code

    def stop(self, number: signal.Signals) -> None:
        """Send all that run a signal, as if this process had received it."""
        if self.stopped_by is None:
            self.stopped_by = number.name
        self.send(number)

    def send(self, number: signal.Signals) -> None:
        """Send all that run a signal."""
        for process in self._running:
            process.send_signal(number)

    def _numbers(self) -> Iterable[int]:
        return ending_signals() if threading.current_thread() is threading.main_thread() else ()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop(signal.SIGTERM if number in _BY_THE_TERMINAL else signal.Signals(number))


def ending_signals() -> list[int]:
    """Return the signals that would end a job, without those ignored: `nohup` ignores the end of a terminal."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def end_with_parent() -> None:
    """Let Linux send this process SIGTERM when its parent ends, however it ends; elsewhere, do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def without_launcher(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment without what a launcher around this one has set."""
    of_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in variables.items() if name not in of_a_launcher}
