"""Image to patch tokens: one linear map of each square patch, held as a convolution as in the released weights.

Shapes: B images, C channels, N patches in row-major order, D features.
"""

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Map images [B, C, height, width] to patch tokens [B, N, D].

    Args:
        img_size: side of the images that positions are learned for, pixels; others may be passed.
        patch_size: side of a patch, pixels.
        in_chans: channels C.
        embed_dim: features D.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias uniformly within 1 / sqrt(inputs of a patch), PyTorch's rule for convolutions."""
        bound = self.proj.weight[0].numel() ** -0.5
        nn.init.uniform_(self.proj.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.proj.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return patch tokens [B, N, D]; raise ValueError if the image does not fit."""
        channels, height, width = x.shape[1:]
        if channels != self.in_chans:
            raise ValueError(f"images have {channels} channels, the model was built for in_chans={self.in_chans}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height} x {width} is not a multiple of patch_size={self.patch_size}")
        return self.proj(x).flatten(2).transpose(1, 2)
