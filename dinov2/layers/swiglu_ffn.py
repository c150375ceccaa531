"""Gated feed-forward network: silu(x W1) * (x W2), then W3.

W1 and W2 lie in one matrix in the released weights of DINOv2's giant model, and in two in those of DINOv3.
Source: Shazeer 2020, arXiv:2002.05202.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.initialisation import init_linear
from dinov2.layers.recompute import recomputed


class SwiGLUFFN(nn.Module):
    """Gate and widen in one product, then narrow.

    Args:
        in_features: features D of a token.
        hidden_features: width of the gate; D if left out.
        out_features: features of the result; D if left out.
        bias: whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters."""
        init_linear(self.w12, generator)
        init_linear(self.w3, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        active = F.silu(gate) * value
        with recomputed(active, lambda: F.silu(gate.detach()) * value.detach()):
            return self.w3(active)


class SwiGLUFFNFused(SwiGLUFFN):
    """SwiGLU of two thirds of `hidden_features`, rounded up to a multiple of 8: about the parameters of an MLP."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
    ) -> None:
        hidden_features = (int((hidden_features or in_features) * 2 / 3) + 7) // 8 * 8
        super().__init__(in_features, hidden_features, out_features, bias)


class SwiGLUFFNSeparate(nn.Module):
    """SwiGLU with a matrix for the gate and one for the value, of two thirds of `hidden_features`, rounded up.

    Args:
        in_features: features D of a token.
        hidden_features: two thirds of it are the width of the gate; D if left out.
        out_features: features of the result; D if left out.
        bias: whether all layers have a bias.
        align_to: the width is rounded up to a multiple of this.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        align_to: int = 8,
    ) -> None:
        super().__init__()
        width = int((hidden_features or in_features) * 2 / 3)
        width += -width % align_to
        self.w1 = nn.Linear(in_features, width, bias=bias)
        self.w2 = nn.Linear(in_features, width, bias=bias)
        self.w3 = nn.Linear(width, out_features or in_features, bias=bias)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters."""
        for layer in (self.w1, self.w2, self.w3):
            init_linear(layer, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w1(x), self.w2(x)
        active = F.silu(gate) * value
        with recomputed(active, lambda: F.silu(gate.detach()) * value.detach()):
            return self.w3(active)
