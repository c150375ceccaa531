"""Projection head of DINO and iBOT: an MLP, a unit sphere, and a layer of prototypes.

DINOv2 keeps the prototypes weight-normalised, as direction and length; DINOv3 keeps them as they are.

Shapes: N tokens, D_in backbone features, D bottleneck features, K prototypes.
Source: Caron et al. 2021, arXiv:2104.14294, and the parents' `DINOHead`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.initialisation import init_linear

_ROWS = 4096  # rows whose product is summed at a time, for the cache


class PlainPrototypeLayer(nn.Module):
    """Hold K prototypes as they are, under the name of a linear layer's weight."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all values from a normal of standard deviation 0.02 cut off at 2."""
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)

    def prototypes(self) -> Tensor:
        """Return the prototypes, [K, D]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PrototypeLayer(nn.Module):
    """Hold K prototypes as direction and length, under the names that `torch.nn.utils.weight_norm` gave them."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw directions as `nn.Linear` does; set every length to 1."""
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound, generator=generator)
        nn.init.ones_(self.weight_g)

    def prototypes(self) -> Tensor:
        """Return the prototypes, [K, D]."""
        return _WeightNorm.apply(self.weight_v, self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.prototypes())


class _WeightNorm(torch.autograd.Function):
    """w = g * v / |v| row by row; differentiated by hand because K x D temporaries cost more than the arithmetic."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, v: Tensor, g: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        ctx.save_for_backward(v, g, norm)
        return v * (g / norm)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_w: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        v, g, norm = ctx.saved_tensors
        pairs = zip(d_w.split(_ROWS), v.split(_ROWS), strict=True)
        along = torch.cat([(left * right).sum(dim=1, keepdim=True) for left, right in pairs])  # [K, 1]
        d_v = torch.addcmul(d_w, v, along / norm.square(), value=-1).mul_(g / norm)
        return d_v, along / norm


class DINOHead(nn.Module):
    """Map tokens to prototype scores, or hand the parts of that last product to a criterion.

    Args:
        in_dim: features of the backbone.
        out_dim: number of prototypes K.
        use_bn: batch normalisation between the layers of the MLP.
        nlayers: linear layers of the MLP, >= 1.
        hidden_dim: width of the inner layers.
        bottleneck_dim: features D that are put on the unit sphere.
        mlp_bias: whether the linear layers have a bias.
        weight_norm: True: prototypes of learned direction and length, as in DINOv2 (`last_layer.weight_g`, `_v`).
            False: plain prototypes, as in DINOv3 (`last_layer.weight`).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        *,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(
            in_dim, max(nlayers, 1), hidden_dim=hidden_dim, out_dim=bottleneck_dim, use_bn=use_bn, bias=mlp_bias
        )
        self.last_layer = (PrototypeLayer if weight_norm else PlainPrototypeLayer)(bottleneck_dim, out_dim)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters: truncated normal of standard deviation 0.02, zero biases, the prototypes' own values."""
        for module in self.mlp.modules() if isinstance(self.mlp, nn.Sequential) else [self.mlp]:
            if isinstance(module, nn.Linear):
                init_linear(module, generator)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()
        self.last_layer.init_weights(generator)

    def forward(
        self, x: Tensor, criterion: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return prototype scores [N, K], or `criterion(unit features [N, D], prototypes [K, D])`.

        A criterion runs inside this forward so that sharded prototypes are whole while it reads them.
        """
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        x = F.normalize(x, dim=-1, p=2, eps=eps)
        if criterion is None:
            return self.last_layer(x)
        return criterion(x, self.last_layer.prototypes())


def _mlp(
    in_dim: int, nlayers: int, *, hidden_dim: int, out_dim: int, use_bn: bool, bias: bool
) -> nn.Sequential | nn.Linear:
    """Build the MLP with the parents' child numbers (mlp.0, mlp.2, mlp.4 without batch normalisation)."""
    if nlayers == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    layers: list[nn.Module] = []
    for width_in in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width_in, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    layers.append(nn.Linear(hidden_dim, out_dim, bias=bias))
    return nn.Sequential(*layers)
