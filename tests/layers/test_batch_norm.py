"""Batch normalisation with parameters in half precision, as FSDP hands them over."""

import pytest
import torch
from torch import nn

from dinov2.layers.batch_norm import BatchNorm2d
from dinov2.layers.sync_batchnorm import SyncBatchNorm


@pytest.mark.parametrize("kind", [BatchNorm2d, SyncBatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_pytorch_in_float32(kind, training):
    layer, reference = kind(4).train(training), nn.BatchNorm2d(4).train(training)
    for _ in range(2):
        x = 3 + 2 * torch.randn(6, 4, 3, 2)
        torch.testing.assert_close(layer(x), reference(x))
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in reference.state_dict().items())


@pytest.mark.parametrize("kind", [BatchNorm2d, SyncBatchNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_parameters_with_float32_statistics(kind, dtype, training):
    x = 3 + 2 * torch.randn(6, 4, 3, 2)
    layer, exact = kind(4).train(training), nn.BatchNorm2d(4).train(training)
    layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype and layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact(x), rtol=0.02, atol=0.02)  # 8 bits of mantissa
    out.sum().backward()
    assert layer.weight.grad.dtype == dtype and layer.weight.grad.isfinite().all()
