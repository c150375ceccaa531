"""From samples to a batch: crops stacked, iBOT masks drawn and turned into the indices that the losses use.

Shapes: B images on this rank, G = 2 global crops, L local crops, N patches, M masked patches.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.masking import MaskingGenerator, MaskPlan
from dinov2.data.random_streams import derive_seed
from dinov2.data.samples import Sample

_MASK_STREAM = 3  # of derive_seed over a sample's seed


class MaskedCollate:
    """Make the batch of one rank from its samples.

    A sample's masks depend on its place in the stream only: the ratio by the plan of its global batch, the blocks by
    its own seed.

    Args:
        augmentation: knows how crops are stacked.
        mask_generator: draws the blocks.
        mask_plan: of the global batches.
    """

    def __init__(
        self, augmentation: DataAugmentationDINO, *, mask_generator: MaskingGenerator, mask_plan: MaskPlan
    ) -> None:
        self.augmentation = augmentation
        self.mask_generator = mask_generator
        self.mask_plan = mask_plan

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            collated_global_crops [G * B, C, H, W] and collated_local_crops [L * B, C, h, w], uint8 or uint16,
            crop-major; seeds [B], int64; collated_masks [G * B, N], bool; mask_indices_list [M], int64, places in the
            flattened masks; masks_weight [M], float32, 1 / (masked patches of that crop); n_masked_patches, M;
            skipped, paths of images that could not be read and were replaced.
        """
        masks = self._masks(samples)
        indices = masks.flatten().nonzero()[:, 0]
        weights = (1 / masks.sum(1).clamp(min=1).float())[:, None].expand_as(masks)[masks]
        return {
            **self.augmentation.stack([sample.crops for sample in samples]),
            "seeds": torch.tensor([sample.seed for sample in samples]),
            "collated_masks": masks,
            "mask_indices_list": indices,
            "masks_weight": weights,
            "n_masked_patches": len(indices),
            "skipped": [path for sample in samples for path in sample.skipped],
        }

    def _masks(self, samples: list[Sample]) -> Tensor:
        """Masks of all global crops: [G * B, N]."""
        num_patches = self.mask_generator.height * self.mask_generator.width
        num_crops, global_batch_size = self.mask_plan.shape
        steps = {sample.position // global_batch_size for sample in samples}
        ratios = {step: self.mask_plan.ratios(step) for step in steps}
        masks = np.zeros((num_crops, len(samples), num_patches), dtype=bool)
        for row, sample in enumerate(samples):
            step, place = divmod(sample.position, global_batch_size)
            for crop in range(num_crops):
                rng = random.Random(derive_seed(sample.seed, _MASK_STREAM, crop))
                wanted = int(num_patches * ratios[step][crop, place])
                masks[crop, row] = self.mask_generator(wanted, rng=rng).ravel()
        return torch.from_numpy(masks.reshape(-1, num_patches))
