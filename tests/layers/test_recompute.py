import torch
from torch import nn

from dinov2.layers.mlp import Mlp
from dinov2.layers.recompute import recomputed


def test_gradients_are_those_of_keeping_the_result():
    first, second, x = nn.Linear(4, 8), nn.Linear(8, 4), torch.randn(5, 4)
    plain = second(torch.tanh(first(x)))
    expected = torch.autograd.grad(plain.square().sum(), list(first.parameters()) + list(second.parameters()))
    calls = []

    def again() -> torch.Tensor:
        calls.append(1)
        return torch.tanh(wide.detach())

    wide = first(x)
    active = torch.tanh(wide)
    with recomputed(active, again):
        out = second(active)
    own = torch.autograd.grad(out.square().sum(), list(first.parameters()) + list(second.parameters()))
    assert calls == [1]
    for left, right in zip(own, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_an_mlp_keeps_one_wide_tensor_instead_of_two():
    mlp, kept = Mlp(16, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(torch.randn(10, 16))
    assert kept.count(torch.Size([10, 64])) == 1  # what the activation saves; the inner hook hides the second layer's
