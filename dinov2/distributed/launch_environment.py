"""What the launcher (torchrun, srun, or nobody) says about this process in its environment variables.

torchrun wins over Slurm, because torchrun is also started inside Slurm jobs. Slurm's variables count only within a job
step (`srun`): a batch script also sees SLURM_NTASKS, but runs as one process.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dinov2.errors import ConfigError

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM_STEP_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 20000, 20000


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """Place of this process among all, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""  # of the host where the processes meet; empty for one process
    port: int = 0
    is_met_by_launcher: bool = False  # torchrun serves the meeting point, not rank 0
    attempt: str = "0"  # torchrun's restarts share one meeting point
    one_gpu_per_process: bool = False  # the launcher shows each process its own GPU only


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long processes wait for each other, in seconds."""

    rendezvous_s: float = 300  # for all to come, at the start
    lost_rank_s: float = 60  # for a sign of life of another process
    collective_s: float = 1800  # for the others in a collective, while all are alive


_TIMEOUT_VARIABLES = {
    "DINOV2_RENDEZVOUS_TIMEOUT_S": "rendezvous_s",
    "DINOV2_LOST_RANK_TIMEOUT_S": "lost_rank_s",
    "DINOV2_COLLECTIVE_TIMEOUT_S": "collective_s",
}


def read_launch_environment(variables: Mapping[str, str]) -> LaunchEnvironment:
    """Read ranks from the variables of torchrun or of a Slurm job step; one process if there are none.

    Raises:
        ConfigError: some but not all variables are set, or their values contradict each other.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        found = _read_torchrun(variables)
    elif "SLURM_PROCID" in variables and "SLURM_STEP_NUM_TASKS" in variables:
        found = _read_slurm_step(variables)
    else:
        return LaunchEnvironment()
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(f"rank {found.rank} is outside 0..{found.world_size - 1}; start the program with torchrun")
    if not 0 <= found.local_rank < found.local_world_size:
        raise ConfigError(
            f"local rank {found.local_rank} is outside 0..{found.local_world_size - 1}; start the program with torchrun"
        )
    return found


def _read_torchrun(variables: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in variables]
    world_size = _as_int(variables, "WORLD_SIZE") if "WORLD_SIZE" in variables else 1
    if world_size > 1:
        missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if missing:
        present = "RANK" if "RANK" in variables else "WORLD_SIZE"
        raise ConfigError(
            f"{present}={variables[present]} is set but {', '.join(missing)} not; "
            f"start the program with torchrun or unset {present}"
        )
    local_rank = _as_int(variables, "LOCAL_RANK")
    has_local_size = "LOCAL_WORLD_SIZE" in variables
    port = variables.get("MASTER_PORT", "")
    return LaunchEnvironment(
        rank=_as_int(variables, "RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=_as_int(variables, "LOCAL_WORLD_SIZE") if has_local_size else max(world_size, local_rank + 1),
        address=variables.get("MASTER_ADDR", ""),
        port=_as_int(variables, "MASTER_PORT") if port else 0,
        is_met_by_launcher=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=variables.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _read_slurm_step(variables: Mapping[str, str]) -> LaunchEnvironment:
    world_size = _as_int(variables, "SLURM_STEP_NUM_TASKS")
    if world_size == 1:
        return LaunchEnvironment()
    missing = [name for name in _SLURM_STEP_VARIABLES if name not in variables]
    if missing:
        raise ConfigError(f"SLURM_PROCID={variables['SLURM_PROCID']} is set but {', '.join(missing)} not; use srun")
    node_list = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or "localhost"
    job_id = int(variables.get("SLURM_JOB_ID", "0")) + int(variables.get("SLURM_STEP_ID", "0"))
    address = variables.get("MASTER_ADDR") or first_slurm_host(node_list)
    has_port = bool(variables.get("MASTER_PORT"))
    port = _as_int(variables, "MASTER_PORT") if has_port else _FIRST_SLURM_PORT + job_id % _NUM_SLURM_PORTS
    tasks_per_node = expand_slurm_counts(variables.get("SLURM_STEP_TASKS_PER_NODE") or str(world_size))
    node = int(variables.get("SLURM_NODEID", "0"))
    if node >= len(tasks_per_node):
        raise ConfigError(f"SLURM_NODEID={node} but SLURM_STEP_TASKS_PER_NODE lists {len(tasks_per_node)} nodes")
    return LaunchEnvironment(
        rank=_as_int(variables, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_as_int(variables, "SLURM_LOCALID"),
        local_world_size=tasks_per_node[node],
        address=address,
        port=port,
        one_gpu_per_process=_has_gpu_of_its_own(variables, num_tasks=tasks_per_node[node]),
    )


def read_timeouts(variables: Mapping[str, str]) -> Timeouts:
    """Read how long processes wait for each other.

    Raises:
        ConfigError: a variable is not a number above 0.
    """
    found = {}
    for name, field in _TIMEOUT_VARIABLES.items():
        if name in variables:
            try:
                found[field] = float(variables[name])
            except ValueError:
                found[field] = 0.0
            if not 0 < found[field] < math.inf:
                raise ConfigError(f"{name}={variables[name]}: must be a number of seconds above 0")
    return Timeouts(**found)


def read_job_id(variables: Mapping[str, str]) -> str | None:
    """Name the job of a scheduler that this process belongs to: 123, or 123_4 of an array; None outside of any.

    The launcher's own job on this machine goes first: it may run inside of one of Slurm.
    """
    if "SUBMITIT_LOCAL_JOB_ID" in variables:
        return variables["SUBMITIT_LOCAL_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables.get('SLURM_ARRAY_TASK_ID', '0')}"
    return variables.get("SLURM_JOB_ID")


def _has_gpu_of_its_own(variables: Mapping[str, str], *, num_tasks: int) -> bool:
    """Say whether Slurm shows each task of this node its own GPU only, if it shows one: there are enough for all."""
    on_node = variables.get("SLURM_GPUS_ON_NODE", "0")
    return "SLURM_GPUS_PER_TASK" in variables or (on_node.isdecimal() and int(on_node) >= num_tasks)


def first_slurm_host(node_list: str) -> str:
    """Name the first host of a Slurm node list, e.g. `gpu03` of `gpu[03-05,9],cpu1`."""
    first = re.split(r",(?![^\[]*\])", node_list, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def expand_slurm_counts(counts: str) -> list[int]:
    """Expand Slurm's run-length form, e.g. `4(x2),1` to [4, 4, 1]."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={counts} is not a list of counts such as 4(x2),1")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded


def _as_int(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError:
        raise ConfigError(f"{name}={variables[name]} is not a whole number; start the program with torchrun") from None
