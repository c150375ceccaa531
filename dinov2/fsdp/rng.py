"""The state of this process's random number generators, in a form that rank files can hold."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


class RngState:
    """Collects and restores the states of Python's, NumPy's and PyTorch's global generators."""

    def state_dict(self) -> dict[str, Any]:
        """Return all states as tensors, numbers, strings and lists."""
        version, words, next_gauss = random.getstate()
        algorithm, keys, position, has_gauss, cached_gaussian = np.random.get_state()
        return {
            "python": [version, list(words), next_gauss],
            "numpy": {
                "algorithm": str(algorithm),
                "keys": torch.from_numpy(keys.astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached_gaussian": float(cached_gaussian),
            },
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a GPU's state is skipped where there is none."""
        version, words, next_gauss = state["python"]
        random.setstate((version, tuple(words), next_gauss))
        legacy = state["numpy"]
        keys = legacy["keys"].numpy().astype(np.uint32)
        np.random.set_state(
            (legacy["algorithm"], keys, legacy["position"], legacy["has_gauss"], legacy["cached_gaussian"])
        )
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def load_state_of_another(self, state: dict[str, Any], *, rank: int) -> None:
        """Start fresh sequences for a rank that the saved run did not have.

        Args:
            state: of a rank that it had.
            rank: of this process; each gets sequences of its own, the same ones whenever it is called.
        """
        words = state["torch"].numpy().tobytes() + repr(state["python"]).encode()
        seed = int.from_bytes(hashlib.sha256(words + rank.to_bytes(8, "little")).digest()[:8], "little")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
