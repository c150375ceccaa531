"""Initial values that several layers share; each parameter gets the parents' distribution."""

import torch
from torch import nn


def init_linear(layer: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Draw the weight from a normal of standard deviation 0.02 cut off at 2; set the bias to zero."""
    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_norm(layer: nn.LayerNorm | nn.RMSNorm) -> None:
    """Set scale one and, where there is one, shift zero."""
    nn.init.ones_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
