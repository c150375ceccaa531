"""`DataAugmentationDINO` in two halves: crops and flips of one image on a worker, the rest batched on the device.

Shapes: B images, G = 2 global crops, L local crops, C channels. Crop-major: all first crops, then all second ones.
Source: recipe and order of DINOv2's class of this name, which took it from BYOL (arXiv:2006.07733).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dinov2.data import photometric
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.random_crops import CropBox, cut_crops, draw_box, image_size
from dinov2.data.random_streams import uniforms
from dinov2.errors import DatasetError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_NUM_GLOBAL_CROPS = 2
_JITTERS = (
    photometric.adjust_brightness,
    photometric.adjust_contrast,
    photometric.adjust_saturation,
    photometric.adjust_hue,
)
_NUM_COLOURLESS = 2  # of them act on any number of channels
_ORDERS = torch.tensor(list(permutations(range(len(_JITTERS)))))  # [24, 4]
_CPU_CHUNK_VALUES = 1 << 20  # values finished at a time on a CPU: 4 MiB, which caches hold


class DataAugmentationDINO:
    """Two global and some local crops of an image, with colour jitter, grey, blur and solarisation.

    `crop` is the first half, `finish` the second. A call with one image does both and gives the parents' dict.

    Args:
        global_crops_scale: smallest and largest share of the image's area.
        local_crops_scale: the same for local crops.
        local_crops_number: local crops of an image.
        global_crops_size: side of a finished crop, px.
        local_crops_size: the same for local crops.
        gram_teacher_crops_size: the global crops once more in this size, px, for a Gram teacher; None: not.
        gram_teacher_no_distortions: these without colour jitter, grey, blur and solarisation; else with those of the
            global crops, sigmas of the blur in proportion to the size.
        in_chans: channels; saturation, hue and grey act on 3 only.
        blur_probability: for the first global, second global and local crops, as `solarize_probability`.
        mean: of each channel, fraction of full scale; None: ImageNet's for 3 channels, else 0.5.
        std: None: ImageNet's for 3 channels, else 0.25.
        The others are the keys of the config's section `augmentation`, with their units.
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        gram_teacher_crops_size: int | None = None,
        gram_teacher_no_distortions: bool = False,
        in_chans: int = 3,
        horizontal_flip_probability: float = 0.5,
        vertical_flip_probability: float = 0.0,
        color_jitter_probability: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grayscale_probability: float = 0.2,
        blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0),
        solarize_threshold: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.global_crops_scale = global_crops_scale
        self.local_crops_scale = local_crops_scale
        self.local_crops_number = local_crops_number
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.gram_teacher_crops_size = gram_teacher_crops_size
        self.gram_teacher_no_distortions = gram_teacher_no_distortions
        self.in_chans = in_chans
        self.flips = (horizontal_flip_probability, vertical_flip_probability)
        self.color_jitter_probability = color_jitter_probability
        self.jitter_ranges = torch.tensor(
            [
                [max(0.0, 1 - brightness), 1 + brightness],
                [max(0.0, 1 - contrast), 1 + contrast],
                [max(0.0, 1 - saturation), 1 + saturation],
                [-hue, hue],
            ]
        )
        self.grayscale_probability = grayscale_probability
        self.blur_probability = blur_probability
        self.blur_sigma = blur_sigma
        self.solarize_probability = solarize_probability
        self.solarize_threshold = solarize_threshold
        self.mean, self.std = normalization(in_chans, mean=mean, std=std)

    def crop(self, image: ImageSource | Image.Image | Tensor, seed: int) -> dict[str, list[Tensor]]:
        """First half: cut, resize and flip.

        Args:
            image: see `cut_crops`.
            seed: of this sample; everything random follows from it.

        Returns:
            `global_crops`, 2 tensors [C, H, W], and `local_crops`, L tensors; uint8 or uint16, as the image. With
            `gram_teacher_crops_size` also `gram_teacher_crops`, 2 tensors: the same parts of the image in that size.

        Raises:
            DatasetError: the image cannot be decoded, or has another number of channels.
        """
        rng = random.Random(seed)
        height, width = image_size(image)

        def draw(scale: tuple[float, float], size: int) -> CropBox:
            return draw_box(height, width, scale=scale, size=size, flips=self.flips, rng=rng)

        boxes = [draw(self.global_crops_scale, self.global_crops_size) for _ in range(_NUM_GLOBAL_CROPS)]
        boxes += [draw(self.local_crops_scale, self.local_crops_size) for _ in range(self.local_crops_number)]
        num_ordinary = len(boxes)
        if self.gram_teacher_crops_size is not None:
            boxes += [replace(box, size=self.gram_teacher_crops_size) for box in boxes[:_NUM_GLOBAL_CROPS]]
        crops = cut_crops(image, boxes)
        require_channels(len(crops[0]), self.in_chans)
        parts = {"global_crops": crops[:_NUM_GLOBAL_CROPS], "local_crops": crops[_NUM_GLOBAL_CROPS:num_ordinary]}
        return parts | ({"gram_teacher_crops": crops[num_ordinary:]} if len(crops) > num_ordinary else {})

    def stack(self, samples: list[dict[str, list[Tensor]]]) -> dict[str, Tensor]:
        """Put the crops of B samples together.

        Returns:
            `collated_global_crops` [G * B, C, H, W] and `collated_local_crops` [L * B, C, h, w], crop-major; of
            samples that have them also `collated_gram_teacher_crops` [G * B, C, ., .].

        Raises:
            DatasetError: some images have 8 bits and others 16.
        """
        kinds = {str(crops["global_crops"][0].dtype).removeprefix("torch.") for crops in samples}
        if len(kinds) > 1:
            raise DatasetError(f"images of different kinds of pixels in one batch: {', '.join(sorted(kinds))}")
        stacked = {
            f"collated_{name}": torch.stack([crops[name][number] for number in range(count) for crops in samples])
            for name, count in ((name, len(crops)) for name, crops in samples[0].items())
            if count
        }
        size = self.local_crops_size
        no_crops = stacked["collated_global_crops"].new_empty((0, self.in_chans, size, size))
        return {"collated_local_crops": no_crops} | stacked

    @torch.no_grad()
    def finish(self, crops: dict[str, Any], seeds: Tensor) -> dict[str, Any]:
        """Second half: colour jitter, grey, blur, solarisation, normalisation, in the parents' order.

        Args:
            crops: of B samples, `collated_global_crops` [G * B, C, H, W] and `collated_local_crops` [L * B, C, h, w],
                uint8 or uint16, crop-major, on any device; perhaps `collated_gram_teacher_crops`. Other entries are
                passed through.
            seeds: of the samples, [B] int64; on the CPU, where they come from the loader, nothing waits for the device.

        Returns:
            The same dict with finished crops in float32. Those of a sample do not depend on the others of the batch.
        """
        finished = dict(crops)
        num_global = len(crops["collated_global_crops"]) // len(seeds)
        finished["collated_global_crops"] = self._finish(crops["collated_global_crops"], seeds, first_crop=0)
        finished["collated_local_crops"] = self._finish(crops["collated_local_crops"], seeds, first_crop=num_global)
        if (of_gram := crops.get("collated_gram_teacher_crops")) is not None:
            finished["collated_gram_teacher_crops"] = self._finish(
                of_gram,
                seeds,
                first_crop=0,
                is_plain=self.gram_teacher_no_distortions,
                scale=self.gram_teacher_crops_size / self.global_crops_size,
            )
        return finished

    def __call__(self, image: ImageSource | Image.Image | Tensor, seed: int | None = None) -> dict[str, Any]:
        """Both halves on one image; without a seed, one from Python's `random`."""
        seed = random.getrandbits(63) if seed is None else seed
        crops = self.crop(image, seed)
        finished = self.finish(self.stack([crops]), torch.tensor([seed]))
        global_crops = list(finished["collated_global_crops"])
        of_gram = finished.get("collated_gram_teacher_crops")
        return {
            "global_crops": global_crops,
            "global_crops_teacher": global_crops,
            "local_crops": list(finished["collated_local_crops"]),
            "offsets": (),
        } | ({} if of_gram is None else {"gram_teacher_crops": list(of_gram)})

    def draw(self, seeds: Tensor, crop_numbers: Tensor) -> "PhotometricDraws":
        """Draw what `finish` does to crops.

        Args:
            seeds: of the crops' samples, [B] int64.
            crop_numbers: [B], 0 and 1 for the global crops of a sample, from 2 on for its local ones.

        Returns:
            Each row from its seed and crop number alone; on the CPU.
        """
        draws = uniforms(seeds.cpu(), crop_numbers.cpu(), count=6 + len(_JITTERS))
        jitter, order, grey, blur, sigma, solar = draws[:, :6].unbind(1)
        kind = crop_numbers.cpu().clamp(max=_NUM_GLOBAL_CROPS)  # 0, 1: first and second global crop, 2: local
        low, high = self.jitter_ranges.unbind(1)
        return PhotometricDraws(
            jittered=jitter < self.color_jitter_probability,
            order=_ORDERS[(order * len(_ORDERS)).long()],
            factors=draws[:, 6:] * (high - low) + low,
            greyed=grey < self.grayscale_probability,
            blurred=blur < torch.tensor(self.blur_probability)[kind],
            sigmas=sigma * (self.blur_sigma[1] - self.blur_sigma[0]) + self.blur_sigma[0],
            solarized=solar < torch.tensor(self.solarize_probability)[kind],
        )

    def _finish(
        self, crops: Tensor, seeds: Tensor, *, first_crop: int, is_plain: bool = False, scale: float = 1.0
    ) -> Tensor:
        """Finish crops of one size.

        Args:
            first_crop: number of the first of them among all crops of an image.
            is_plain: only normalise.
            scale: how many times larger they are than crops usually are, whose blur is given in px.
        """
        num_crops = len(crops) // len(seeds)
        crop_numbers = torch.arange(first_crop, first_crop + num_crops).repeat_interleave(len(seeds))  # [rows]
        draws = self.draw(seeds.repeat(num_crops), crop_numbers)
        draws = draws.without_any() if is_plain else replace(draws, sigmas=draws.sigmas * scale)
        blur = partial(photometric.gaussian_blur, reach_px=math.ceil(photometric.BLUR_REACH_PX * scale))
        rows_at_once = max(1, len(crops))
        if crops.device.type == "cpu":
            rows_at_once = max(1, _CPU_CHUNK_VALUES // crops[0].numel()) if len(crops) else 1
        finished = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        for start in range(0, len(crops), rows_at_once):
            rows = slice(start, start + rows_at_once)
            images = finished[rows].copy_(crops[rows]).div_(torch.iinfo(crops.dtype).max)
            self._change(images, draws.rows(rows), blur=blur)
        return finished

    def _change(self, images: Tensor, draws: "PhotometricDraws", *, blur: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Change rows [n, C, H, W] in place."""
        jitters = _JITTERS if self.in_chans == 3 else _JITTERS[:_NUM_COLOURLESS]
        for turn in range(len(_JITTERS)):
            for number, jitter in enumerate(jitters):
                chosen = draws.jittered & (draws.order[:, turn] == number)
                _apply(images, chosen, jitter, draws.factors[:, number])
        if self.in_chans == 3:
            _apply(images, draws.greyed, lambda x: photometric.to_grey(x).expand_as(x))
        _apply(images, draws.blurred, blur, draws.sigmas)
        _apply(images, draws.solarized, lambda x: photometric.solarize(x, self.solarize_threshold))
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        images.sub_(mean).div_(std)


@dataclass(frozen=True)
class PhotometricDraws:
    """What is done to each of n crops; see the config's section `augmentation` for units."""

    jittered: Tensor  # [n] bool
    order: Tensor  # [n, 4]: brightness 0, contrast 1, saturation 2, hue 3, in the order of their turns
    factors: Tensor  # [n, 4]: of brightness, contrast, saturation; turns of hue
    greyed: Tensor  # [n] bool
    blurred: Tensor  # [n] bool
    sigmas: Tensor  # [n], px
    solarized: Tensor  # [n] bool

    def without_any(self) -> "PhotometricDraws":
        """Draws for as many crops, of which none is changed."""
        names = ("jittered", "greyed", "blurred", "solarized")
        return replace(self, **{name: torch.zeros_like(getattr(self, name)) for name in names})

    def rows(self, chosen: slice) -> "PhotometricDraws":
        """Draws of some of the crops."""
        return PhotometricDraws(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def normalization(
    channels: int, *, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; ImageNet's, or 0.5 and 0.25, where none are given."""
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return tuple(mean or default[0]), tuple(std or default[1])


def _apply(images: Tensor, chosen: Tensor, change: Any, *parameters: Tensor) -> None:
    """Replace the chosen rows of `images` by `change` of them, in place; `chosen` and parameters are on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        on_device = rows.to(images.device, non_blocking=True)
        values = [parameter[rows].to(images.device, non_blocking=True) for parameter in parameters]
        images.index_copy_(0, on_device, change(images.index_select(0, on_device), *values))


def require_channels(found: int, wanted: int) -> None:
    """Raise DatasetError unless an image has the channels that the backbone takes."""
    if found != wanted:
        raise DatasetError(f"it has {found} channels, but student.in_chans={wanted}; set student.in_chans={found}")
