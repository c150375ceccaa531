"""A tiny `SSLMetaArch` and batches for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.configs import Config, load_config
from dinov2.train.ssl_meta_arch import SSLMetaArch

TINY = (
    "student.arch=vit_tiny",
    "student.embed_dim=48",
    "student.depth=2",
    "student.num_heads=4",
    "student.patch_size=14",
    "student.drop_path_rate=0",
    "crops.global_crops_size=56",
    "crops.local_crops_size=28",
    "crops.local_crops_number=3",
    "dino.head_n_prototypes=64",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "ibot.head_n_prototypes=64",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    "compute_precision.device=cpu",
)


def tiny_config(overrides: Sequence[str] = ()) -> Config:
    return load_config(None, [*TINY, *overrides])


def tiny_arch(overrides: Sequence[str] = (), *, seed: int = 0) -> SSLMetaArch:
    model = SSLMetaArch(tiny_config(overrides))
    model.init_weights(seed)
    return model


def batch_of(global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Make the batch that `forward_backward` takes from crops and masks [2 * B, N]."""
    per_image = masks.sum(dim=1).clamp_min(1)
    return {
        "collated_global_crops": global_crops,
        "collated_local_crops": local_crops,
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": (1 / per_image)[masks.nonzero()[:, 0]],
    }


def random_batch(num_images: int = 4, *, num_local: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2 * num_images, 16, generator=generator) < 0.3
    masks[: num_images // 2] = False
    return batch_of(
        torch.randn(2 * num_images, 3, 56, 56, generator=generator),
        torch.randn(num_local * num_images, 3, 28, 28, generator=generator),
        masks,
    )
