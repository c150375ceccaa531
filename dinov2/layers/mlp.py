"""Feed-forward network of a transformer block: two linear layers with an activation between them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.layers.initialisation import init_linear
from dinov2.layers.recompute import recomputed


class Mlp(nn.Module):
    """Widen, activate, narrow.

    Args:
        in_features: features D of a token.
        hidden_features: width between the layers; D if left out.
        out_features: features of the result; D if left out.
        act_layer: builds the activation.
        bias: whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters."""
        init_linear(self.fc1, generator)
        init_linear(self.fc2, generator)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        active = self.act(wide)
        with recomputed(active, lambda: self.act(wide.detach())):
            return self.fc2(active)
