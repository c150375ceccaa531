"""Linear classifiers of a grid, trained together: learning rates x numbers of blocks x with or without the patch mean.

All of them see the same batches of features of the largest pool; each takes the columns of its own pool. Those that
differ in the learning rate alone stand side by side in one matrix.

Shapes: B images, K classes, L learning rates, F features of a pool.
Source: the parents' `eval/linear.py`: grid, SGD with momentum 0.9, cosine to 0, first weights with deviation 0.01.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dinov2.eval.pooling import Pool, parse_pool

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
NUM_BLOCKS = (1, 4)
_REFERENCE_BATCH = 256  # images that a learning rate is meant for
_MOMENTUM = 0.9
_INITIAL_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One classifier of the grid."""

    num_blocks: int
    has_mean: bool
    learning_rate: float  # scaled to the batch

    @property
    def name(self) -> str:
        """As the parents name it."""
        name = f"classifier_{self.num_blocks}_blocks_avgpool_{self.has_mean}_lr_{self.learning_rate:.5f}"
        return name.replace(".", "_")

    @property
    def pool(self) -> str:
        """Name of its pool of features."""
        return Pool(num_blocks=self.num_blocks, has_mean=self.has_mean).name


def make_grid(
    pool: str, *, num_blocks: Sequence[int], learning_rates: Sequence[float], batch_size: int
) -> list[Candidate]:
    """List the classifiers whose features a pool holds, those that share a matrix one after the other.

    Args:
        pool: the largest; one without a mean has no classifiers with it.
        num_blocks: last blocks whose class tokens are taken.
        learning_rates: for 256 images.
        batch_size: images of a step, over all processes.
    """
    means = (False, True) if parse_pool(pool).has_mean else (False,)
    scaled = [rate * batch_size / _REFERENCE_BATCH for rate in learning_rates]
    return [
        Candidate(num_blocks=blocks, has_mean=has_mean, learning_rate=rate)
        for blocks, has_mean, rate in product(num_blocks, means, scaled)
    ]


class LinearGrid:
    """Weights, momenta and step of all classifiers.

    Args:
        candidates: as `make_grid` lists them.
        pool: of the features that come in.
        num_features: of that pool.
        num_classes: K.
        total_steps: over which the learning rate falls to 0.
        device: where all is computed, in float32.
        seed: of the first weights.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        pool: str,
        num_features: int,
        num_classes: int,
        total_steps: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.candidates = tuple(candidates)
        self.num_classes, self.total_steps, self.device = num_classes, total_steps, device
        self.step = 0
        largest = parse_pool(pool)
        width = num_features // largest.num_parts
        generator = torch.Generator().manual_seed(seed)
        self._families = []
        for kind in dict.fromkeys((one.num_blocks, one.has_mean) for one in candidates):
            rates = [one.learning_rate for one in candidates if (one.num_blocks, one.has_mean) == kind]
            start, stop = (largest.num_blocks - kind[0]) * width, (largest.num_blocks + kind[1]) * width
            columns = len(rates) * num_classes
            weight = torch.randn(stop - start + 1, columns, generator=generator).mul_(_INITIAL_STD)
            weight[-1] = 0  # the biases
            self._families.append(
                _Family(
                    columns=slice(start, stop),
                    weight=weight.to(device),
                    momentum=torch.zeros(stop - start + 1, columns, device=device),
                    rates=torch.tensor(rates, device=device).repeat_interleave(num_classes),
                )
            )

    def train_step(self, features: Tensor, targets: Tensor) -> None:
        """Move all classifiers by one step of gradient descent on the mean cross-entropy.

        Args:
            features: of the largest pool, [B, F], float32, on the device.
            targets: classes, [B] int64.
        """
        factor = (1 + math.cos(math.pi * self.step / self.total_steps)) / 2
        rows = torch.arange(len(targets), device=self.device)
        for family in self._families:
            inputs = features[:, family.columns]
            logits = torch.addmm(family.weight[-1], inputs, family.weight[:-1])  # [B, L * K]
            residual = logits.unflatten(1, (-1, self.num_classes)).softmax(dim=2)
            residual[rows, :, targets] -= 1
            residual = residual.flatten(1).div_(len(targets))
            family.momentum[:-1].addmm_(inputs.T, residual, beta=_MOMENTUM)
            family.momentum[-1].mul_(_MOMENTUM).add_(residual.sum(dim=0))
            family.weight.addcmul_(family.momentum, family.rates, value=-factor)
        self.step += 1

    def logits(self, features: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n, K] of each classifier for features of the largest pool [n, F], on the device."""
        for family in self._families:
            logits = torch.addmm(family.weight[-1], features[:, family.columns], family.weight[:-1])
            yield from logits.unflatten(1, (-1, self.num_classes)).unbind(1)

    def classifier(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a copy of the weight [K, F] and bias [K] of one candidate, for features of its own pool."""
        matrices = [part for family in self._families for part in family.weight.split(self.num_classes, dim=1)]
        matrix = matrices[number].clone()
        return matrix[:-1].T.contiguous(), matrix[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; tensors are not copied."""
        tensors = [{"weight": family.weight, "momentum": family.momentum} for family in self._families]
        return {"step": self.step, "families": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of a grid of the same shape.

        Raises:
            ValueError: it has another shape.
        """
        if len(state["families"]) != len(self._families):
            raise ValueError(f"a state of {len(state['families'])} families, not of {len(self._families)}")
        for family, tensors in zip(self._families, state["families"], strict=True):
            for name, value in tensors.items():
                own = getattr(family, name)
                if own.shape != value.shape:
                    raise ValueError(f"{name} of shape {tuple(value.shape)}, not {tuple(own.shape)}")
                own.copy_(value)
        self.step = state["step"]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Classifiers of one pool."""

    columns: slice  # of the largest pool
    weight: Tensor  # [F + 1, L * K], biases in the last row
    momentum: Tensor  # the same
    rates: Tensor  # [L * K]
