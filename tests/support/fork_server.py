"""Ranks forked from a process that has imported everything: a start costs no imports.

The ranks see the environment variables that torchrun would set; the forking process serves their meeting point.
"""

import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch


class ForkedRanks:
    """Processes that run the same function, each as one rank; they are ended when this is left.

    Args:
        function: is called in every process; returns its exit code. An exception is written to its log, and is 1.
        num_processes: ranks, all on this machine.
        log_dir: `rank_0.std.log` and so on there get what the ranks write.
    """

    def __init__(self, function: Callable[[], int], *, num_processes: int, log_dir: Path) -> None:
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first optimiser imports much; once is enough
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        variables = {
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process serves the store, rank 0 does not
        }
        self.exit_codes: dict[int, int] = {}  # by rank, of those that have ended; -9 after a kill
        self._pids: dict[int, int] = {}  # by rank
        self._descriptors: dict[int, int] = {}  # of running processes, by rank
        for rank in range(num_processes):
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._pids[rank] = _fork(function, variables=own, log=log_dir / f"rank_{rank}.std.log")
            self._descriptors[rank] = os.pidfd_open(self._pids[rank])
        # A thread serves the store: it starts after the forks, which would copy its locks.
        self._store: torch.distributed.TCPStore | None = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=True, master_listen_fd=listener.detach()
        )

    @property
    def running(self) -> list[int]:
        """Ranks that have not ended, as far as `wait` knows."""
        return list(self._descriptors)

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Send ranks a signal, that of kill -9 unless told otherwise, in this order; those that have ended get none."""
        for rank in ranks:
            if rank in self._descriptors:
                os.kill(self._pids[rank], number)

    def wait(self, timeout_s: float | None = None, *, also: int | None = None) -> None:
        """Return when a rank has ended, when the descriptor `also` can be read, or after this time; None: never."""
        poll = select.poll()
        for descriptor in (*self._descriptors.values(), *([] if also is None else [also])):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(None if timeout_s is None else max(timeout_s, 0) * 1000)}
        for rank, descriptor in list(self._descriptors.items()):
            if descriptor in ready:
                os.close(self._descriptors.pop(rank))
                self.exit_codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self._pids[rank], 0)[1])

    def wait_for_all(self, timeout_s: float) -> bool:
        """Return whether all ranks have ended, at the latest after this time."""
        end_s = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end_s:
            self.wait(end_s - time.monotonic())
        return not self.running

    def end_with_the_first_failure(self) -> bool:
        """Wait for all, killing them as soon as one fails; returns whether none has failed."""
        while self.running:
            self.wait()
            if any(self.exit_codes.values()):
                self.kill(*self.running)
        return not any(self.exit_codes.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.running:
            self.kill(*self.running)
            self.wait()
        self._store = None


def _fork(function: Callable[[], int], *, variables: dict[str, str], log: Path) -> int:
    """Start a process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= variables
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
