"""Feed-forward networks, LayerScale and patch embedding against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused


@pytest.mark.parametrize(("asked", "hidden"), [(192, 128), (100, 72), (4096, 2736), (6144, 4096)])
def test_fused_swiglu_takes_two_thirds_rounded_up_to_eight(asked, hidden):
    with torch.device("meta"):
        layer = SwiGLUFFNFused(48, hidden_features=asked)
    assert layer.w12.weight.shape == (2 * hidden, 48)
    assert layer.w3.weight.shape == (48, hidden)


def test_swiglu_gates_with_the_first_half():
    torch.manual_seed(0)
    layer, x = SwiGLUFFN(6, hidden_features=10), torch.randn(5, 6)
    first, second = layer.w12.weight.split(10)
    bias_first, bias_second = layer.w12.bias.split(10)
    want = F.linear(
        F.silu(x @ first.T + bias_first) * (x @ second.T + bias_second), layer.w3.weight, bias=layer.w3.bias
    )
    torch.testing.assert_close(layer(x), want)


def test_layer_scale_multiplies_features():
    layer = LayerScale(3, 0.5)
    torch.testing.assert_close(layer(torch.ones(2, 3)), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("make", [Mlp, SwiGLUFFN, SwiGLUFFNFused])
def test_bias_can_be_left_out(make):
    assert all(not name.endswith("bias") for name, _ in make(8, hidden_features=12, bias=False).named_parameters())


def test_patches_are_taken_row_by_row():
    torch.manual_seed(0)
    layer = PatchEmbed(img_size=8, patch_size=4, in_chans=2, embed_dim=5)
    x = torch.randn(1, 2, 8, 12)
    patch = x[0, :, 4:8, 8:12]  # second row, third column
    want = layer.proj.weight.flatten(1) @ patch.flatten() + layer.proj.bias
    torch.testing.assert_close(layer(x)[0, 5], want)


def test_images_that_do_not_fit_are_named():
    layer = PatchEmbed(img_size=8, patch_size=4, in_chans=3, embed_dim=5)
    with pytest.raises(ValueError, match=r"^image size 8 x 10 is not a multiple of patch_size=4$"):
        layer(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ValueError, match=r"^images have 1 channels, the model was built for in_chans=3$"):
        layer(torch.zeros(1, 1, 8, 8))
