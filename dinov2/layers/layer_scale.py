"""LayerScale: one learned factor for each feature of a residual branch.

Source: Touvron et al. 2021, arXiv:2103.17239; initial value 1e-5 in DINOv2's training, 1 in its released models.
"""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply features by `gamma`, [D].

    Args:
        dim: features D.
        init_values: initial value of every factor.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every factor to its initial value; nothing is drawn from the generator."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
