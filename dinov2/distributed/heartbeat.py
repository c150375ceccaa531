"""Signs of life between ranks: when one has ended or does not answer, all others end too, with one sentence.

Without it they would wait in a collective until its time-out, 30 minutes, and then each show a traceback that says
nothing of the cause. Every rank keeps a connection to rank 0, which a thread of its own watches, so that a rank that
computes, compiles or waits for data for an hour is alive. Three things are noticed:

    a connection closes      its process has ended (kill -9, out of memory): at once
    nothing comes over it    its machine or the network is gone, or the process is suspended: after `timeout_s`
    a rank says it fails     all may fail with the same error, so the others get `timeout_s` to end by themselves
    a rank says it was told  most likely all were: the others get some seconds to end by themselves, and end with 0
    to stop (StoppedEarly)

Rank 0 tells the others. A rank that leaves without an error says so and is missed by nobody. Messages are JSON, one a
line.
"""

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from dinov2.distributed.launch_environment import LaunchEnvironment
from dinov2.distributed.rendezvous import ranks_in_words, reason_of
from dinov2.errors import Dinov2Error, StoppedEarly, TrainingError

logger = logging.getLogger(__name__)

_BEAT_S = 2.0  # at most; several fit into the time-out
_BEATS_IN_TIMEOUT = 6
_VERDICT_S = 10.0  # how long a rank whose collective has failed waits to hear why
_LAST_WORDS_S = 10.0  # for writing down why this process ends
_STOP_S = 5.0  # for other ranks to end, when one was told to stop
_MAX_REASON_CHARS = 500
_ADDRESS_KEY = "heartbeat"
_MAX_LINE_BYTES = 1 << 14
_LOOPBACK = ("localhost", "127.0.0.1")


@dataclass
class _Peer:
    """The other end of a connection; a stranger, of whom nothing is believed, until its first line tells the token."""

    connection: socket.socket
    heard_at_s: float
    rank: int = -1  # of a stranger
    host: str = ""
    pid: int = 0
    step: int | None = None
    has_left: bool = False
    unread: bytes = b""

    @property
    def is_watched(self) -> bool:
        """Say whether its end would be missed."""
        return self.rank >= 0 and not self.has_left


class Heartbeat:
    """Watches the other ranks from entering the group to leaving it.

    Args:
        launch: place of this process among several.
        store: that all ranks have.
        timeout_s: how long a rank may be silent.
    """

    def __init__(self, launch: LaunchEnvironment, store: dist.Store, *, timeout_s: float) -> None:
        self.step: int | None = None  # in progress; set by the main thread
        self.callback: Callable[[str, bool], None] | None = None  # is told the reason, and whether it is a failure
        self._launch = launch
        self._timeout_s = timeout_s
        self._beat_s = min(_BEAT_S, timeout_s / _BEATS_IN_TIMEOUT)
        self._about_me = {"rank": launch.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._peers: list[_Peer] = []
        self._verdict: str | None = None
        self._is_failure = True
        self._prints = True
        self._end_at_s = 0.0
        self._is_verdict_known = threading.Event()
        self._is_closed = False
        self._wakes, self._woken_by = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self._token = ""
        self._expected = set(range(1, launch.world_size)) if launch.rank == 0 else set()  # have not connected yet
        self._started_at_s = time.monotonic()
        if launch.rank == 0:
            self._listen(store)
        else:
            self._connect(store)
        # Processes that load images are forked, and would keep the connections of a rank that was killed open.
        os.register_at_fork(after_in_child=self._close_sockets)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def explain(self, error: BaseException | None) -> None:
        """If an error is that of a collective, wait until it is known which rank has ended; does not return then."""
        if not _is_of_a_collective(error):
            return
        if not self._is_verdict_known.wait(_VERDICT_S) and "imed out" in str(error):
            self._find(f"a collective did not end in time though no rank is lost ({self._steps_in_words()})")
        if self._verdict is not None:
            self._end_at_s = 0.0
            self._wake()
            self._thread.join(2 * _LAST_WORDS_S)  # it ends this process
            os._exit(self._exit_code)

    def close(self, error: BaseException | None = None) -> None:
        """Leave, and tell the others of the error that this rank ends with, if there is one."""
        if error is None or isinstance(error, SystemExit):
            last_message = {"left": True}
        else:
            last_message = {"stopped" if isinstance(error, StoppedEarly) else "failed": _in_one_line(error)}
        self._is_closed = True
        self._wake()
        self._thread.join(_LAST_WORDS_S)
        self._tell_all(last_message)
        self._close_sockets()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._woken_by.send(b"x")

    def _listen(self, store: dist.Store) -> None:
        self._token = secrets.token_hex(16)
        host = "127.0.0.1" if self._launch.address in _LOOPBACK else ""
        if host or not socket.has_dualstack_ipv6():
            self._listener = socket.create_server((host, 0), backlog=self._launch.world_size)
        else:
            self._listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self._launch.world_size
            )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        address = {"port": self._listener.getsockname()[1], "token": self._token}
        store.set(_ADDRESS_KEY, json.dumps(address | self._about_me))

    def _connect(self, store: dist.Store) -> None:
        found = json.loads(store.get(_ADDRESS_KEY))
        try:
            connection = socket.create_connection((self._launch.address, found["port"]), timeout=self._timeout_s)
            connection.sendall(_line({"token": found["token"], "step": None} | self._about_me))
        except OSError as error:
            raise TrainingError(
                f"rank 0 cannot be reached at port {found['port']} of {self._launch.address} "
                f"({reason_of(error)}), though it was at port {self._launch.port}: the ranks need all ports "
                f"between their machines"
            ) from error
        self._add(_Peer(connection, time.monotonic(), rank=0, host=found["host"], pid=found["pid"]))

    def _add(self, peer: _Peer) -> None:
        peer.connection.setblocking(False)
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _watch(self) -> None:
        """Until this rank leaves: listen, give signs of life, and find out who gives none."""
        beat_at_s = looked_at_s = time.monotonic()
        while not self._is_closed:
            events = self._selector.select(self._beat_s / 2)
            now_s = time.monotonic()
            if now_s - looked_at_s > 2 * self._beat_s:  # this process was suspended itself, and has heard nobody
                for peer in self._peers:
                    peer.heard_at_s = now_s
                self._started_at_s = now_s
            looked_at_s = now_s
            if self._is_closed:
                return
            ended = [peer for key, _ in events if (peer := self._read(key)) is not None]
            if ended:
                self._find(f"{_names(ended)} {_have(ended)} ended without a word{_last_step(ended)}")
            if now_s >= beat_at_s:
                self._tell_all({"step": self.step})
                beat_at_s = now_s + self._beat_s
            self._look_for_the_silent(now_s)
            if self._verdict is not None and now_s >= self._end_at_s:
                self._end()

    def _read(self, key: selectors.SelectorKey) -> _Peer | None:
        """Read what has come over a connection; returns its peer if that has ended without having left."""
        if key.fileobj is self._listener:
            with contextlib.suppress(OSError):
                self._add(_Peer(self._listener.accept()[0], time.monotonic()))
            return None
        peer = key.data
        if peer is None:
            self._wakes.recv(1)
            return None
        try:
            received = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError:
            received = b""
        if not received:
            self._drop(peer)
            return peer if peer.is_watched else None
        peer.heard_at_s = time.monotonic()
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        for line in lines:
            if peer in self._peers:  # not a stranger that told something else
                self._heed(peer, line)
        if len(peer.unread) > _MAX_LINE_BYTES and peer in self._peers:
            self._drop(peer)
        return None

    def _heed(self, peer: _Peer, line: bytes) -> None:
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            message = {}
        if peer.rank < 0:
            if not isinstance(message, dict) or message.get("token") != self._token:
                self._drop(peer)
                return
            peer.rank, peer.host, peer.pid = message["rank"], message["host"], message["pid"]
            self._expected.discard(peer.rank)
        peer.step = message.get("step", peer.step)
        if "left" in message:
            peer.has_left = True
        elif "failed" in message:
            peer.has_left = True
            at = "" if peer.step is None else f" at step {peer.step}"
            self._find(f"{_names([peer])} has failed{at}: {message['failed']}", grace_s=self._timeout_s)
        elif "stopped" in message:
            peer.has_left = True
            self._find(f"{_names([peer])} was stopped by {message['stopped']}", grace_s=_STOP_S, is_failure=False)
        elif "lost" in message:
            self._prints = self._launch.local_rank == 0  # rank 0 does in any case
            self._find(message["lost"], grace_s=message["grace_s"], is_failure=message["is_failure"])

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)

    def _look_for_the_silent(self, now_s: float) -> None:
        if any(now_s - peer.heard_at_s > self._timeout_s for peer in self._peers if peer.is_watched):
            # Others of the same machine follow within a beat or two; they are named together.
            late_s = self._timeout_s / 2
            silent = [peer for peer in self._peers if now_s - peer.heard_at_s > late_s and peer.is_watched]
            self._find(
                f"{_names(silent)} {_have(silent)} not answered for {self._timeout_s:g} s{_last_step(silent)}: the "
                f"machine or the network to it is gone, or the process is suspended"
            )
        elif self._expected and now_s - self._started_at_s > self._timeout_s:
            self._find(f"{ranks_in_words(sorted(self._expected))} ended right after the start, without a word")

    def _find(self, sentence: str, *, grace_s: float = 0.0, is_failure: bool = True) -> None:
        """Take note of why all ranks have to end; the first reason counts."""
        if self._verdict is not None:
            return
        self._verdict, self._is_failure = sentence, is_failure
        self._end_at_s = time.monotonic() + grace_s
        self._is_verdict_known.set()
        self._tell_all({"lost": sentence, "grace_s": grace_s, "is_failure": is_failure})

    def _tell_all(self, message: dict[str, Any]) -> None:
        if "lost" in message and self._launch.rank != 0:
            return  # it is rank 0 that is lost or has told this
        for peer in filter(lambda peer: peer.rank >= 0, self._peers):
            with contextlib.suppress(OSError):  # it does not read; it will be found silent
                peer.connection.send(_line(message))

    def _end(self) -> NoReturn:
        """Say why and end the process, whatever its main thread waits for."""
        words = threading.Thread(target=self._say_last_words, daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        os._exit(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return TrainingError.exit_code if self._is_failure else 0

    def _say_last_words(self) -> None:
        sentence = f"{self._verdict}; all ranks end, start again to go on"
        if logger.hasHandlers():  # without any, Python itself would show the line a second time
            level = logging.ERROR if self._is_failure else logging.INFO
            logger.log(level, "%s", sentence, extra={"file_only": True})
        if self._prints:
            kind = "error: " if self._is_failure else ""
            print(f"{kind}rank {self._launch.rank}: {sentence}", file=sys.stderr, flush=True)
        if self.callback is not None:
            self.callback(f"{self._verdict}", self._is_failure)
        logging.shutdown()
        sys.stdout.flush()

    def _steps_in_words(self) -> str:
        """Say where the ranks are that this one knows of."""
        ranks_at: dict[int | None, list[int]] = {self.step: [self._launch.rank]}
        for peer in sorted(self._peers, key=lambda peer: peer.rank):
            ranks_at.setdefault(peer.step, []).append(peer.rank)
        return "; ".join(f"{ranks_in_words(sorted(ranks))} at step {step}" for step, ranks in ranks_at.items())

    def _close_sockets(self) -> None:
        for peer in self._peers:
            peer.connection.close()
        for other in (self._listener, self._wakes, self._woken_by):
            if other is not None:
                other.close()


def _names(peers: Sequence[_Peer]) -> str:
    """Name ranks and where they run: `rank 3 (process 4711 on node2)`, `ranks 4-7 (on node2)`."""
    hosts = ", ".join(dict.fromkeys(peer.host for peer in peers))
    where = f"process {peers[0].pid} on {hosts}" if len(peers) == 1 else f"on {hosts}"
    return f"{ranks_in_words(sorted(peer.rank for peer in peers))} ({where})"


def _have(peers: Sequence[_Peer]) -> str:
    return "has" if len(peers) == 1 else "have"


def _last_step(peers: Sequence[_Peer]) -> str:
    steps = [peer.step for peer in peers if peer.step is not None]
    return f", last seen at step {max(steps)}" if steps else ""


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, may be that of a rank whose neighbour has ended."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    text = " ".join(str(error).split())[:_MAX_REASON_CHARS]
    return text if isinstance(error, Dinov2Error) else f"{type(error).__name__}: {text}"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
