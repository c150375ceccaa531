"""Random numbers as a function of (seed, place) alone: the same on any worker, rank and device, from any start.

Two hashes do all the work: `mix64` on Python integers and NumPy arrays, for seeds and orders; `uniforms` in torch, for
the parameters of a whole batch at once.
Source: `mix64` is the finaliser of SplitMix64 (Steele et al. 2014), the 32-bit one is Wellons' lowbias32.
"""

import numpy as np
import torch
from torch import Tensor

_WORD64 = (1 << 64) - 1
_WORD32 = (1 << 32) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Scramble a 64-bit number; one to one."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD64
    return value ^ (value >> 31)


def derive_seed(*numbers: int) -> int:
    """Combine non-negative integers, order included, into one seed of 0 .. 2**63 - 1."""
    state = 0
    for number in numbers:
        state = mix64((state + _GOLDEN + mix64(number & _WORD64)) & _WORD64)
    return state >> 1


def sample_seed(seed: int, position: int) -> int:
    """Seed of everything random about one training sample.

    Args:
        seed: train.seed.
        position: place in the global stream of samples, counted from the start of training.
    """
    return derive_seed(seed, 0, position)


def shuffled(count: int, seed: int) -> np.ndarray:
    """Permutation of 0 .. count - 1 in int64, the same in every version of NumPy."""
    keys = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix64(seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


def uniforms(seeds: Tensor, streams: Tensor, *, count: int) -> Tensor:
    """Draw `count` numbers from 0 .. 1 (1 excluded) for each row, with 24 random bits each.

    Args:
        seeds: [B], int64, not negative.
        streams: [B], int64, 0 .. 2**32 - 1; another stream of the same seed is independent of it.

    Returns:
        [B, count], float32, on the seeds' device; a row depends on its own seed and stream only.
    """
    low, high = seeds & _WORD32, seeds >> 32
    row = _mix32(low ^ _mix32(high ^ _mix32(streams + 0x3C6EF372 & _WORD32)))
    counter = torch.arange(1, count + 1, device=seeds.device) * 0x9E3779B9 & _WORD32
    return (_mix32((row[:, None] + counter) & _WORD32) >> 8).float() / (1 << 24)  # [B, count]


def _mix32(value: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64; no product leaves the range of int64."""
    value = (value ^ (value >> 16)) * 0x7FEB352D & _WORD32
    value = (value ^ (value >> 15)) * (0x846CA68B - (1 << 32)) & _WORD32  # the factor modulo 2**32
    return value ^ (value >> 16)
