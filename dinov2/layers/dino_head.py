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

    @torch.no_grad()
    def start_from(self, prototypes: Tensor) -> None:
        """Take over prototypes [K, D] of length 1, so that scores are cosines."""
        self.weight.copy_(prototypes)

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

    @torch.no_grad()
    def start_from(self, prototypes: Tensor) -> None:
        """Take over prototypes [K, D] of length 1; `weight_v` is as long as it is when drawn, so as quick to turn."""
        self.weight_v.copy_(prototypes * 3**-0.5)
        self.weight_g.fill_(1.0)

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

    @property
    def num_projected(self) -> int:
        """Number of axes that `start_as_projection` can take at most."""
        first, *others = self._linears()
        widths = [layer.in_features // 2 for layer in others]
        return min(first.in_features, *widths, (others or [first])[-1].out_features)

    @torch.no_grad()
    def start_as_projection(self, axes: Tensor, mean: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Let the MLP compute (x - mean) @ axes.T, turned and scaled as a whole, until training changes it.

        GELU(t) - GELU(-t) = t, so two hidden units of opposite sign hand a number on as it is. The other hidden units
        keep what they were drawn with; the last layer starts without them and learns to use them. A layer's weights
        stay about as large as they were drawn, so that a learning rate does to them what it does to a drawn head's.

        Args:
            axes: [d, D_in], d at most `num_projected`.
            mean: [D_in].
            generator: for the turns, which spread the numbers over all units.

        Raises:
            ValueError: a layer has no bias, or batch normalisation stands between them.
        """
        first, *others = self._linears()
        has_norm = any(isinstance(module, nn.BatchNorm1d) for module in self.mlp.modules())
        if has_norm or any(layer.bias is None for layer in (first, *others)):
            raise ValueError("only an MLP with biases and without batch normalisation can start as a projection")
        num_pairs = 2 * len(axes)
        if not others:
            weight = _as_large_as(first.weight, _turn(first.out_features, len(axes), generator) @ axes)
            first.weight.copy_(weight)
            first.bias.copy_(-weight @ mean)
            return
        weight = _as_large_as(first.weight, axes)
        first.weight[:num_pairs] = torch.cat([weight, -weight])
        first.bias[:num_pairs] = torch.cat([-weight @ mean, weight @ mean])
        for layer in others[:-1]:
            pair = _pair(_as_large_as(layer.weight, _turn(len(axes), len(axes), generator)))
            layer.weight[:num_pairs] = 0
            layer.weight[:num_pairs, :num_pairs] = torch.cat([pair, -pair])
            layer.bias[:num_pairs] = 0
        last = others[-1]
        pair = _pair(_as_large_as(last.weight, _turn(last.out_features, len(axes), generator)))
        last.weight.zero_()
        last.weight[:, :num_pairs] = pair
        last.bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.mlp.modules() if isinstance(module, nn.Linear)]

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


def _turn(num_rows: int, num_columns: int, generator: torch.Generator | None) -> Tensor:
    """Draw a matrix that keeps all angles, [rows >= columns, columns]."""
    return nn.init.orthogonal_(torch.empty(num_rows, num_columns), generator=generator)


def _pair(weight: Tensor) -> Tensor:
    """Let a weight [rows, n] act on the difference of two halves, [rows, 2 * n]."""
    return torch.cat([weight, -weight], dim=1)


def _as_large_as(drawn: Tensor, weight: Tensor) -> Tensor:
    """Scale a weight to the root mean square of the one that it replaces."""
    return weight * (drawn.square().mean() / weight.square().mean()).sqrt()
