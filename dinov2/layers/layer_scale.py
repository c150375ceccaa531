"""LayerScale: one learned factor for each feature of a residual branch.

Source: Touvron et al. 2021, arXiv:2103.17239; initial value 1e-5 in DINOv2's training, 1 in its released models.
"""

import torch
import torch.nn.functional as F
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


def scaled_linear(linear: nn.Linear, x: Tensor, gamma: Tensor | None) -> Tensor:
    """Return linear(x) * gamma for rows x [T, D_in] and factors [D_out] or None.

    With more rows than inputs the factors are multiplied into the weight instead of the result: less memory is read
    and written, and the unscaled result need not be kept for the gradient. Not in float16, where such a product
    underflows.
    """
    if gamma is None:
        return linear(x)
    if x.shape[0] <= linear.in_features or x.dtype is torch.float16:
        return linear(x) * gamma
    bias = None if linear.bias is None else linear.bias * gamma
    return F.linear(x, linear.weight * gamma[:, None], bias)
