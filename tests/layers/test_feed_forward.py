"""Feed-forward networks, normalisations, LayerScale and patch embedding against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.norms import NORM_LAYERS
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNSeparate


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


@pytest.mark.parametrize(("asked", "align_to", "width"), [(2304, 8, 1536), (100, 8, 72), (100, 64, 128), (96, 64, 64)])
def test_separate_swiglu_takes_two_thirds_rounded_up_as_asked(asked, align_to, width):
    with torch.device("meta"):
        layer = SwiGLUFFNSeparate(48, hidden_features=asked, align_to=align_to)
    assert layer.w1.weight.shape == layer.w2.weight.shape == (width, 48)
    assert layer.w3.weight.shape == (48, width)


def test_separate_swiglu_is_the_fused_one_in_two_matrices():
    torch.manual_seed(0)
    fused, separate = SwiGLUFFNFused(6, hidden_features=24), SwiGLUFFNSeparate(6, hidden_features=24)
    x = torch.randn(5, 6)
    gate, value = fused.w12.weight.chunk(2)
    state = {"w1.weight": gate, "w2.weight": value, "w3.weight": fused.w3.weight, "w3.bias": fused.w3.bias}
    state |= dict(zip(("w1.bias", "w2.bias"), fused.w12.bias.chunk(2), strict=True))
    separate.load_state_dict(state)
    for layer in (fused, separate):
        layer(x).square().sum().backward()
    torch.testing.assert_close(separate(x), fused(x))
    grads = torch.cat([separate.w1.weight.grad, separate.w2.weight.grad])
    torch.testing.assert_close(grads, fused.w12.weight.grad)


@pytest.mark.parametrize(("name", "eps"), [("layernorm", 1e-6), ("layernormbf16", 1e-5)])
def test_layer_norms_differ_in_epsilon(name, eps):
    layer, x = NORM_LAYERS[name](8), 1e-3 * torch.randn(3, 8)
    want = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(layer(x), want)


def test_rms_norm_divides_by_the_root_of_the_mean_square_and_has_no_shift():
    layer, x = NORM_LAYERS["rmsnorm"](8), 1e-3 * torch.randn(3, 8)
    with torch.no_grad():
        layer.weight.uniform_()
    want = layer.weight * x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), want)
    assert set(layer.state_dict()) == {"weight"}


def test_layer_scale_multiplies_features():
    layer = LayerScale(3, 0.5)
    torch.testing.assert_close(layer(torch.ones(2, 3)), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("make", [Mlp, SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNSeparate])
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
