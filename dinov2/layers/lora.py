"""Low-rank updates (LoRA): a linear layer whose own weight W rests while a product of two small matrices learns.

The layer computes (W + scale * B A) x + bias. W keeps its name; the matrices stand beside it as `lora_a` and `lora_b`.
B starts at 0, so that training starts from the given network.

Shapes: r rank, A [r, inputs], B [outputs, r].
Source: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Collection, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError

UPDATE_NAMES = ("lora_a", "lora_b")


class LowRankUpdate(nn.Linear):
    """What `add_low_rank_updates` makes of a linear layer, of whatever class; it is not built by itself."""

    lora_scale: float
    lora_dropout: float

    def add_update(self, *, rank: int, scale: float, dropout: float) -> None:
        """Give the layer its two matrices, without values; `init_update` or a file sets them."""
        self.lora_scale, self.lora_dropout = scale, dropout
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.out_features, rank))

    def first_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw A, on the CPU, uniformly within 1 / sqrt(inputs), as `nn.Linear` does; B is 0."""
        bound = self.in_features**-0.5
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        return dict(zip(UPDATE_NAMES, (drawn, torch.zeros(self.lora_b.shape)), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return features [..., outputs] for features [..., inputs]."""
        left = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        return super().forward(x) + self.lora_scale * F.linear(F.linear(left, self.lora_a), self.lora_b)


def add_low_rank_updates(
    network: nn.Module,
    *,
    targets: Collection[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    but_for: Collection[str] = (),
) -> None:
    """Give linear layers of a network low-rank updates, in place; parameters keep their names and their values.

    Args:
        network: not sharded, on any device, the meta device too.
        targets: last parts of the names of the layers, such as `qkv`; those that the network does not have are passed
            over.
        rank: r, >= 1.
        alpha: the product counts alpha / rank times.
        dropout: share of the product's inputs that is left out at random in training mode, 0 to below 1.
        but_for: names of parameters; layers whose weight is among them are left as they are.

    Raises:
        ConfigError: the network has no layer of these names.
    """
    named = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    if not named:
        raise ConfigError(f"lora.targets={list(targets)}: the backbone has none of these layers; use qkv and proj")
    for name, module in named.items():
        if f"{name}.weight" not in but_for:
            module.__class__ = _with_update(type(module))  # in place, so that the layer keeps its parameters' identity
            module.add_update(rank=rank, scale=alpha / rank, dropout=dropout)


def low_rank_updates(network: nn.Module) -> Iterator[tuple[str, LowRankUpdate]]:
    """Yield the layers of a network that have low-rank updates, with their names."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, LowRankUpdate))


def update_parameters(network: nn.Module) -> set[str]:
    """Name the parameters that a network has beyond those of the plain one."""
    return {f"{name}.{matrix}" for name, _ in low_rank_updates(network) for matrix in UPDATE_NAMES}


def first_updates(network: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draw first values for all low-rank updates of a network, on the CPU, by parameter name; it is left unchanged."""
    return {
        f"{name}.{matrix}": values
        for name, layer in low_rank_updates(network)
        for matrix, values in layer.first_values(generator).items()
    }


def merge_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Return the weight of the plain layer that computes the same, [outputs, inputs]; all arguments left unchanged."""
    return torch.addmm(weight, lora_b.to(weight.dtype), lora_a.to(weight.dtype), alpha=scale)


@cache
def _with_update(kind: type[nn.Linear]) -> type[LowRankUpdate]:
    """Make the class of linear layers of a kind that have an update; its forward adds to that of the kind."""
    return LowRankUpdate if kind is nn.Linear else type(f"LowRank{kind.__name__}", (LowRankUpdate, kind), {})
