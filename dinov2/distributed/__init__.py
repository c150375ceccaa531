"""Ranks, process set-up and the named collectives that the rest of the library calls.

Everything works without a process group: there is one rank then, and each collective returns its input.
"""

from dinov2.distributed.collectives import (
    all_gather_cat,
    all_gather_cat_autograd,
    all_gather_objects,
    all_gather_varlen,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    barrier,
    broadcast_object,
    broadcast_tensor,
    gather_objects,
    on_every_rank,
    on_main_first,
)
from dinov2.distributed.environment import (
    Environment,
    get_device,
    get_global_rank,
    get_global_size,
    get_local_rank,
    get_local_world_size,
    get_rank,
    get_world_size,
    init,
    is_main_process,
    job_id,
    launched_world_size,
    shutdown,
)
from dinov2.distributed.side_channel import SideChannel

__all__ = [
    "Environment",
    "SideChannel",
    "all_gather_cat",
    "all_gather_cat_autograd",
    "all_gather_objects",
    "all_gather_varlen",
    "all_reduce_max",
    "all_reduce_mean",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "broadcast_tensor",
    "gather_objects",
    "get_device",
    "get_global_rank",
    "get_global_size",
    "get_local_rank",
    "get_local_world_size",
    "get_rank",
    "get_world_size",
    "init",
    "is_main_process",
    "job_id",
    "launched_world_size",
    "on_every_rank",
    "on_main_first",
    "shutdown",
]
