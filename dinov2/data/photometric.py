"""Changes of pixel values, batched, each row with a parameter of its own.

Shapes: B rows (crops), C channels. Images are float32 in 0..1, [B, C, H, W], left unchanged; parameters are [B].
Source: same values as `torchvision.transforms.v2.functional` gives row by row on float images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's rounding of ITU-R BT.601
_BLUR_KERNEL_PX = 9  # as in DINOv2


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply, and clip to 0..1."""
    return (images * _per_row(factors)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Move away from the mean: of the grey image for 3 channels, of each channel by itself for other numbers."""
    mean = (to_grey(images) if images.shape[1] == 3 else images).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, images, _per_row(factors)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Move away from the grey image; 3 channels."""
    return torch.lerp(to_grey(images), images, _per_row(factors)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour circle, keeping saturation and value of HSV; 3 channels, turns in -0.5..0.5.

    With V the largest channel, D the spread of the three and H the hue in sixths of a turn, the new channels are
    V - D * clamp(min(k, 4 - k), 0, 1) with k = (H + 5, 3, 1) modulo 6 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    spread = value - images.amin(1)
    divisor = torch.where(spread == 0, 1, spread)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * turns[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    place = torch.remainder(hue[:, None] + offsets, 6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return torch.addcmul(value[:, None], spread[:, None], share, value=-1)


def to_grey(images: Tensor) -> Tensor:
    """Luma of 3 channels: [B, 1, H, W]."""
    weights = torch.tensor(_GREY_WEIGHTS, device=images.device, dtype=images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur with a kernel of 9 px, the border mirrored; sigmas in px, above 0. Images are larger than 4 px."""
    reach = _BLUR_KERNEL_PX // 2
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)
    num_rows, num_channels = images.shape[:2]
    weights = kernels.repeat_interleave(num_channels, 0)[:, None, None]  # [B * C, 1, 1, 9]
    flat = F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, weights, groups=num_rows * num_channels)
    flat = F.conv2d(flat, weights.transpose(2, 3), groups=num_rows * num_channels)
    return flat[0].unflatten(0, (num_rows, num_channels))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from `threshold` (fraction of full scale) on."""
    return torch.where(images >= threshold, 1 - images, images)


def _per_row(parameters: Tensor) -> Tensor:
    return parameters[:, None, None, None]
