"""iBOT masks: block masking of one image, and which images of a global batch are masked how much.

Source: block masking of BEiT, arXiv:2106.08254; its use and numbers as in the parents' `MaskingGenerator` and collate.
"""

import math
import random

import numpy as np

from dinov2.data.random_streams import derive_seed, shuffled

_NUM_ATTEMPTS = 10  # to place one block; then the mask stays as it is
_PLAN_STREAM = 1  # of derive_seed; 0 is the samples'


class MaskingGenerator:
    """Mask rectangles of patches until a wanted number of patches is masked.

    Args:
        input_size: patches down and across; one number for both.
        num_masking_patches: patches to mask if a call does not say, >= 0.
        min_num_patches: smallest area of a block, patches.
        max_num_patches: largest area of a block, patches; None: as many as are still to mask.
        min_aspect: smallest height / width of a block, above 0.
        max_aspect: largest; None: 1 / min_aspect.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int = 0,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = max_num_patches
        self.log_aspect_range = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __call__(self, num_masking_patches: int | None = None, *, rng: random.Random) -> np.ndarray:
        """Draw a mask.

        Args:
            num_masking_patches: patches to mask. Never more are masked; fewer, when no block fits any more.
            rng: the only source of randomness.

        Returns:
            [height, width] bool, True where masked.
        """
        wanted = self.num_masking_patches if num_masking_patches is None else num_masking_patches
        mask = np.zeros((self.height, self.width), dtype=bool)
        num_masked = 0
        while num_masked < wanted:
            largest = min(wanted - num_masked, self.max_num_patches or wanted)
            added = self._add_block(mask, largest, rng)
            if not added:
                break
            num_masked += added
        return mask

    def _add_block(self, mask: np.ndarray, largest: int, rng: random.Random) -> int:
        """Mask one more block with at most `largest` new patches; returns how many are new, 0 if none fitted."""
        for _ in range(_NUM_ATTEMPTS):
            area = rng.uniform(self.min_num_patches, largest)
            aspect = math.exp(rng.uniform(*self.log_aspect_range))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top, left = rng.randint(0, self.height - height), rng.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= largest:
                block[:] = True
                return added
        return 0


class MaskPlan:
    """Which crops of a global batch are masked, and which share of each.

    A share `probability` of the crops is masked. Their ratios are spread evenly over the range: the n-th masked crop
    draws its ratio from the n-th of as many equal parts, in random order.

    Args:
        seed: train.seed.
        global_batch_size: images of one step over all ranks.
        num_crops: global crops of an image.
        probability: share of the crops that are masked, 0..1.
        ratio_min_max: smallest and largest share of masked patches, 0..1.
    """

    def __init__(
        self,
        seed: int,
        global_batch_size: int,
        *,
        num_crops: int = 2,
        probability: float = 0.5,
        ratio_min_max: tuple[float, float] = (0.1, 0.5),
    ) -> None:
        self.seed = seed
        self.shape = (num_crops, global_batch_size)
        self.num_masked = int(num_crops * global_batch_size * probability)
        self.ratio_min_max = ratio_min_max

    def ratios(self, step: int) -> np.ndarray:
        """Share of patches to mask of each crop in global batch `step`: [num_crops, global_batch_size], 0 = none."""
        seed = derive_seed(self.seed, _PLAN_STREAM, step)
        edges = np.linspace(*self.ratio_min_max, self.num_masked + 1)
        rng = random.Random(seed)
        ratios = np.zeros(self.shape)
        order = shuffled(ratios.size, seed)[: self.num_masked]
        ratios.reshape(-1)[order] = [rng.uniform(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
        return ratios
