"""Peak memory of this process."""

import resource
import sys

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory used so far, in GiB: tensors on an accelerator, or the process's resident set on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 2**30
    return torch.accelerator.max_memory_allocated(device) / 2**30
