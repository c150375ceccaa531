"""Changes of pixel values, batched, each row with a parameter of its own.

Shapes: B rows (crops), C channels. Images are float32 in 0..1, [B, C, H, W], left unchanged; parameters are [B].
Source: same values as `torchvision.transforms.v2.functional` gives row by row on float images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's rounding of ITU-R BT.601
BLUR_REACH_PX = 4  # to either side: a kernel of 9 px, as in DINOv2


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

    With V the largest channel, D the spread of the three and H the hue in turns, a new channel is
    V - D * clamp(2 - 6 * |k|, 0, 1), where k = H + 1/2, 1/6, -1/6 for red, green, blue, less the nearest whole number.
    """
    red, green, blue = images.unbind(1)  # [B, H, W] each
    value = images.amax(1)
    spread = value - images.amin(1)
    # 0 where that channel is the largest, else 1; on a CPU ten times faster than comparing and choosing
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    per_spread = (spread * 6).clamp_(min=1e-9).reciprocal_()
    from_green = ((blue - red) * per_spread).add_(1 / 3)
    from_blue = ((red - green) * per_spread).add_(2 / 3)
    hue = torch.lerp((green - blue) * per_spread, torch.lerp(from_green, from_blue, not_green), not_red)
    hue += turns[:, None, None]
    distance = hue[:, None] + _new(images, (1 / 2, 1 / 6, -1 / 6))[:, None, None]  # [B, 3, H, W]
    share = distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], spread[:, None], share, value=-1)


def to_grey(images: Tensor) -> Tensor:
    """Luma of 3 channels: [B, 1, H, W]."""
    return torch.einsum("bchw,c->bhw", images, _new(images, _GREY_WEIGHTS))[:, None]


def gaussian_blur(images: Tensor, sigmas: Tensor, *, reach_px: int = BLUR_REACH_PX) -> Tensor:
    """Blur with a kernel that reaches so far to either side, the border mirrored; sigmas in px, above 0.

    Images are larger than the reach.
    Sums of shifted images: as fast as the best grouped convolution here, and a row never depends on the others.
    """
    steps = torch.arange(reach_px + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (steps / sigmas[:, None]) ** 2)  # [B, reach + 1], from the centre outwards
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    padded = F.pad(images, (reach_px,) * 4, mode="reflect")
    return _blur_along(_blur_along(padded, 3, weights), 2, weights)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from `threshold` (fraction of full scale) on."""
    return torch.where(images >= threshold, 1 - images, images)


def _blur_along(padded: Tensor, dim: int, weights: Tensor) -> Tensor:
    """Weighted sum of a padded image's shifts along one dimension, which loses its padding."""
    reach = weights.shape[1] - 1
    length = padded.shape[dim] - 2 * reach
    total = padded.narrow(dim, reach, length) * _per_row(weights[:, 0])
    for step in range(1, reach + 1):
        before, after = (padded.narrow(dim, reach + shift, length) for shift in (-step, step))
        total.addcmul_(before + after, _per_row(weights[:, step]))
    return total


def _new(images: Tensor, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, device=images.device, dtype=images.dtype)


def _per_row(parameters: Tensor) -> Tensor:
    return parameters[:, None, None, None]
