"""Process set-up: which rank this is, which device it computes on, and the process group.

Without a launcher, or with one process, there is no process group.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dinov2.distributed.heartbeat import Heartbeat
from dinov2.distributed.launch_environment import (
    LaunchEnvironment,
    read_job_id,
    read_launch_environment,
    read_timeouts,
)
from dinov2.distributed.rendezvous import meet
from dinov2.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Ranks and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device


_environment: Environment | None = None  # set by init, cleared by shutdown
_heartbeat: Heartbeat | None = None  # the same, with several processes


def init(device: str = "auto", *, timeout_s: float | None = None) -> Environment:
    """Choose the device and, with several processes, join the process group.

    Call it once, at the start of a program; a further call returns the first one's result. From then on this process
    ends, with one sentence and exit code 1, when another one of the group has ended or does not answer any more.

    Args:
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N with one process.
        timeout_s: how long a collective waits for ranks that are alive before it fails; None: as the environment says
            (DINOV2_COLLECTIVE_TIMEOUT_S), or half an hour.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other, or the device does not exist.
        TrainingError: other processes did not come, or cannot be reached.
    """
    global _environment
    if _environment is not None:
        return _environment
    launch = read_launch_environment(os.environ)
    chosen = _choose_device(device, launch=launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launch.world_size > 1:
        _join_process_group(launch, device=chosen, timeout_s=timeout_s)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        logger.warning(
            "SLURM_NTASKS=%s but this process was not started by srun; running as one process",
            os.environ["SLURM_NTASKS"],
        )
    _environment = Environment(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        device=chosen,
    )
    return _environment


def launched_world_size() -> int:
    """Return how many processes the launcher started, before any of them has joined the others.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    return read_launch_environment(os.environ).world_size


def job_id() -> str | None:
    """Return the number of the scheduler's job that this process belongs to, such as 123 or 123_4; None outside."""
    return read_job_id(os.environ)


def note_step(step: int) -> None:
    """Say which step this rank is at, for what the others would tell if it ended."""
    if _heartbeat is not None:
        _heartbeat.step = step


def call_before_ending(callback: Callable[[str, bool], None] | None) -> None:
    """Have a function called, from another thread, when this process is to end because another rank has.

    Args:
        callback: is given the reason in one sentence, and whether it is a failure (not one: the other rank was told to
            stop); takes the place of an earlier one. None: nothing is called.
    """
    if _heartbeat is not None:
        _heartbeat.callback = callback


def end_with_lost_rank(error: BaseException | None) -> None:
    """If an error is one of a collective because another rank has ended, say which one and end this process."""
    if _heartbeat is not None:
        _heartbeat.explain(error)


def shutdown() -> None:
    """Leave the process group, if there is one; `init` may be called again afterwards.

    While an error is being raised, the other ranks are told, or, if it is because of another rank, the process ends as
    by `end_with_lost_rank`.
    """
    global _environment, _heartbeat
    if _heartbeat is not None:
        end_with_lost_rank(sys.exception())
        _heartbeat.close(sys.exception())
        _heartbeat = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _environment = None


def get_rank() -> int:
    """Return this process's rank among all processes, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_local_rank() -> int:
    """Return this process's rank among the processes of its node."""
    return 0 if _environment is None else _environment.local_rank


def get_local_world_size() -> int:
    """Return the number of processes on this node."""
    return 1 if _environment is None else _environment.local_world_size


def get_device() -> torch.device:
    """Return the device chosen by `init`, the CPU before it."""
    return torch.device("cpu") if _environment is None else _environment.device


def is_main_process() -> bool:
    """Say whether this is rank 0, the one that writes shared files."""
    return get_rank() == 0


get_global_rank = get_rank  # names of the parents
get_global_size = get_world_size


def _choose_device(device: str, *, launch: LaunchEnvironment) -> torch.device:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise ConfigError(f"compute_precision.device={device}: must be auto, cpu, cuda or cuda:N")
    has_gpu = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and not has_gpu):
        return torch.device("cpu")
    if not has_gpu:
        raise ConfigError(f"compute_precision.device={device} but PyTorch finds no GPU here; use cpu or auto")
    num_gpus = torch.cuda.device_count()
    if index:
        if launch.world_size > 1:
            raise ConfigError(
                f"compute_precision.device={device} names one GPU but {launch.world_size} processes run; use cuda"
            )
        if int(index) >= num_gpus:
            raise ConfigError(
                f"compute_precision.device={device} but there are {num_gpus} GPUs; use cuda:0 to cuda:{num_gpus - 1}"
            )
        return torch.device("cuda", int(index))
    if launch.one_gpu_per_process and num_gpus == 1:
        return torch.device("cuda", 0)
    if launch.local_rank >= num_gpus:
        raise ConfigError(
            f"{launch.local_world_size} processes run on this node but it has {num_gpus} GPUs; "
            f"start at most {num_gpus} or set compute_precision.device=cpu"
        )
    return torch.device("cuda", launch.local_rank)


def _join_process_group(launch: LaunchEnvironment, *, device: torch.device, timeout_s: float | None) -> None:
    global _heartbeat
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeouts = read_timeouts(os.environ)
    store = meet(launch, timeout_s=timeouts.rendezvous_s)
    heartbeat = None
    try:
        heartbeat = Heartbeat(launch, store, timeout_s=timeouts.lost_rank_s)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s or timeouts.collective_s),
        )
    except (RuntimeError, ValueError) as error:
        if heartbeat is not None:
            heartbeat.close(error)
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise TrainingError(
            f"the {launch.world_size} ranks have met at {launch.address}:{launch.port} but cannot connect to each "
            f"other ({reason}); name the network between the machines with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    _heartbeat = heartbeat
