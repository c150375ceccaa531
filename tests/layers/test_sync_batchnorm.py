"""Batch normalisation over ranks: equal to plain batch normalisation of the whole batch."""

import pytest
import torch
from support.dist import run_distributed
from torch import nn

from dinov2 import distributed
from dinov2.layers.sync_batchnorm import SyncBatchNorm


def batch():
    torch.manual_seed(0)
    return 3 + 2 * torch.randn(6, 4, 3, 2), torch.randn(6, 4, 3, 2)


def run(layer, x, weights):
    """Three steps in training mode; returns outputs, gradients and statistics of the last."""
    x = x.clone().requires_grad_()
    nn.init.constant_(layer.weight, 1.5)
    for _ in range(3):
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        (out * weights).sum().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
        "num": layer.num_batches_tracked,
    }


def step_on_a_rank():
    rank = distributed.get_rank()
    share = slice(0, 4) if rank == 0 else slice(4, 6)  # unequal batches
    x, weights = batch()
    layer = SyncBatchNorm(4)
    result = run(layer, x[share], weights[share])
    return result | {"eval": layer.eval()(x[share]).detach()}


@pytest.mark.dist
def test_ranks_with_unequal_batches_agree_with_one_process():
    x, weights = batch()
    layer = nn.BatchNorm2d(4)
    want = run(layer, x, weights)
    first, second = run_distributed(step_on_a_rank)
    for name in ("mean", "var", "num"):
        torch.testing.assert_close(first[name], want[name])
        torch.testing.assert_close(second[name], want[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], want[name])
    for name in ("out", "x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), want[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([first["eval"], second["eval"]]), layer.eval()(x).detach())


def test_one_process_is_plain_batch_normalisation():
    x, weights = batch()
    torch.testing.assert_close(run(SyncBatchNorm(4), x, weights), run(nn.BatchNorm2d(4), x, weights))
