"""Resized tensors keep what they promise: the token of a resized patch, and of a grey image."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed

from dinov2.hub.resize import adapt_in_chans, resize_patch_embed, resize_positions


def tokens(images, weight):
    return F.conv2d(images, weight, stride=weight.shape[-1])


@pytest.mark.parametrize(("old", "new"), [(8, 8), (14, 16), (8, 12), (4, 16)])
def test_a_larger_kernel_gives_the_same_token_of_a_resized_patch(old, new):
    weight, patches = torch.randn(5, 3, old, old), torch.randn(7, 3, old, old)
    resized = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    # float32 and a pseudo-inverse: sums of at most 768 products
    torch.testing.assert_close(
        tokens(resized, resize_patch_embed(weight, new)), tokens(patches, weight), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize(("old", "new"), [(16, 14), (16, 8)])
def test_a_smaller_kernel_is_the_nearest_to_that(old, new):
    weight, patches = torch.randn(5, 1, old, old), torch.eye(old**2).view(-1, 1, old, old)
    small = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    kernel = resize_patch_embed(weight, new)
    error = (tokens(small, kernel) - tokens(patches, weight)).square().sum()
    for direction in torch.randn(20, *kernel.shape):
        moved = (tokens(small, kernel + 0.01 * direction) - tokens(patches, weight)).square().sum()
        assert moved > error


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (16, 8), (8, 8)])
def test_kernels_are_those_of_timm(old, new):
    weight = torch.randn(5, 3, old, old)
    expected = resample_patch_embed(weight, [new, new])
    torch.testing.assert_close(resize_patch_embed(weight, new), expected, atol=1e-4, rtol=1e-4)


def test_the_type_and_the_source_stay():
    weight = torch.randn(2, 3, 8, 8).half()
    before = weight.clone()
    assert resize_patch_embed(weight, 16).dtype == adapt_in_chans(weight, 1).dtype == torch.half
    assert torch.equal(weight, before)
    assert resize_patch_embed(weight, 8) is weight and adapt_in_chans(weight, 3) is weight


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 5), (1, 3), (4, 2), (2, 6)])
def test_an_image_with_equal_channels_gives_the_same_token(old, new):
    weight, grey = torch.randn(5, old, 4, 4), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        tokens(grey.expand(-1, new, -1, -1), adapt_in_chans(weight, new)),
        tokens(grey.expand(-1, old, -1, -1), weight),
        atol=1e-4,  # the sum runs in another order
        rtol=1e-4,
    )


def test_channels_are_summed_spread_or_repeated():
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(adapt_in_chans(weight, 1), weight.sum(dim=1, keepdim=True))
    for channel in adapt_in_chans(weight, 5).unbind(1):
        torch.testing.assert_close(channel, weight.mean(dim=1) * 3 / 5)
    one = weight[:, :1]
    for channel in adapt_in_chans(one, 4).unbind(1):
        torch.testing.assert_close(channel, one[:, 0] / 4)


def test_positions_follow_the_official_rule():
    positions = torch.randn(1, 1 + 16, 6)
    resized = resize_positions(positions, 6, offset=0.1, antialias=False)
    grid = positions[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(resized[:, :1], positions[:, :1])
    torch.testing.assert_close(resized[:, 1:], expected)
    assert resize_positions(positions, 4, offset=0.1, antialias=False) is positions
