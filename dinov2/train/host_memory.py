"""Let the C library keep freed memory of a CPU run, so that each step finds it again instead of asking the kernel.

A training step allocates and frees gigabytes in pieces of many megabytes. By default glibc maps each such piece anew,
and the kernel then clears and maps it page by page; benchmarks/train_step_cpu_202611.md holds what that costs.
"""

import ctypes

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER_BYTES = 2**31 - 1
_GROWTH_BYTES = 64 * 2**20


def keep_freed_memory() -> None:
    """Change the process's allocator; without effect where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _NEVER_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES)
    mallopt(_M_TOP_PAD, _GROWTH_BYTES)
