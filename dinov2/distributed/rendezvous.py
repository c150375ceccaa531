"""Where the processes of a program meet at its start, and who has not come when the time is over."""

import itertools
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from dinov2.distributed.launch_environment import LaunchEnvironment
from dinov2.errors import TrainingError

_ALL_ARE_HERE = "all"
_POLL_S = (0.01, 0.5)  # first and longest pause between two looks
_PORT_IS_FREED_S = 15.0
_VARIABLE = "DINOV2_RENDEZVOUS_TIMEOUT_S"
_meetings = itertools.count()  # of this process: a second one must not find what the first one left


def meet(launch: LaunchEnvironment, *, timeout_s: float) -> dist.Store:
    """Wait until all processes have come to the same place.

    Args:
        launch: place of this process among several.
        timeout_s: how long to wait for the others.

    Returns:
        A store that all of them read and write, with nothing in it that is of interest.

    Raises:
        TrainingError: some have not come in time, or the place cannot be opened or reached.
    """
    end_s = time.monotonic() + timeout_s
    serves = launch.rank == 0 and not launch.is_met_by_launcher
    if serves:
        _wait_for_port(launch, end_s=min(end_s, time.monotonic() + _PORT_IS_FREED_S))
    else:
        _wait_for_server(launch, end_s=end_s, timeout_s=timeout_s)
    try:
        whole = dist.TCPStore(
            launch.address,
            launch.port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        store = dist.PrefixStore(f"dinov2/{launch.attempt}/{next(_meetings)}", whole)
        store.set(_key(launch.rank), socket.gethostname())
        _wait_for_all(launch, store, end_s=end_s, timeout_s=timeout_s)
    except dist.DistError as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise TrainingError(f"the meeting of {launch.world_size} ranks at {_place(launch)} failed: {reason}") from error
    return store


def _wait_for_port(launch: LaunchEnvironment, *, end_s: float) -> None:
    """Wait until the port is free: the loader processes of a run that was killed hold it for some seconds more."""
    for pause_s in _pauses():
        try:
            socket.create_server(("", launch.port)).close()
            return
        except OSError as error:
            if time.monotonic() >= end_s:
                raise TrainingError(
                    f"port {launch.port} of this machine cannot be opened for the other ranks "
                    f"({reason_of(error)}); set MASTER_PORT to another one"
                ) from error
        time.sleep(pause_s)


def _wait_for_server(launch: LaunchEnvironment, *, end_s: float, timeout_s: float) -> None:
    """Wait until somebody listens there; what the store itself says of nobody fills a screen."""
    for pause_s in _pauses():
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(end_s - time.monotonic(), 1)).close()
            return
        except OSError as error:
            if time.monotonic() >= end_s:
                who = "torchrun" if launch.is_met_by_launcher else "rank 0"
                raise TrainingError(
                    f"nobody answers at {_place(launch)} after {timeout_s:g} s ({reason_of(error)}): {who} has "
                    f"not started or has ended there, or a firewall is in between; look at its log, or give a slow "
                    f"start more time with {_VARIABLE}"
                ) from error
        time.sleep(pause_s)


def _wait_for_all(launch: LaunchEnvironment, store: dist.Store, *, end_s: float, timeout_s: float) -> None:
    """Rank 0 looks for all, the others for what it says then."""
    keys = [_key(rank) for rank in range(launch.world_size)]
    for pause_s in _pauses():
        if store.check([_ALL_ARE_HERE]) or (launch.rank == 0 and store.check(keys)):
            store.set(_ALL_ARE_HERE, "")
            return
        if time.monotonic() >= end_s:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            here = sorted({store.get(keys[rank]).decode() for rank in range(launch.world_size) if rank not in missing})
            raise TrainingError(
                f"{ranks_in_words(missing)} of {launch.world_size} did not come to {_place(launch)} within "
                f"{timeout_s:g} s (the others are on {', '.join(here)}); look at their logs, or give a slow start more "
                f"time with {_VARIABLE}"
            )
        time.sleep(pause_s)


def reason_of(error: OSError) -> str:
    """Say why, without the place."""
    return os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror or str(error)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Name ranks, in ascending order: `rank 3`, or `ranks 1, 4-7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(names)}"


def _pauses() -> "itertools.chain[float]":
    """Yield longer and longer pauses, for ever."""
    shortest_s, longest_s = _POLL_S
    growing = itertools.takewhile(lambda s: s < longest_s, (shortest_s * 1.5**n for n in itertools.count()))
    return itertools.chain(growing, itertools.repeat(longest_s))


def _key(rank: int) -> str:
    return f"rank{rank}"


def _place(launch: LaunchEnvironment) -> str:
    return f"{launch.address}:{launch.port}"
