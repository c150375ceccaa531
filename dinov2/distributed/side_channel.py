"""A second channel between the same ranks, for a thread that works beside training."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dinov2.distributed.environment import get_world_size

_TIMEOUT = timedelta(days=1)  # a slow disk is no failure; a process that has ended is noticed at once


class SideChannel:
    """A process group of its own on the hosts: what goes over it never mixes with the collectives of the main thread.

    One thread of each rank uses it, all in the same order.
    """

    def __init__(self) -> None:
        """Join the other ranks; all must call it, from their main threads."""
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if get_world_size() > 1 else None

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """Collect one picklable object of each rank, in rank order, on every rank.

        Raises:
            RuntimeError: another process has ended or did not come in time.
        """
        if self._group is None:
            return [obj]
        box: list[Any] = [None] * get_world_size()
        dist.all_gather_object(box, obj, group=self._group)
        return box

    def close(self) -> None:
        """Leave the group; all ranks call it."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
