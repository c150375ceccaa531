"""Signs by which one sees in each step whether a run is healthy: of its images, its features and its targets.

| sign | says | healthy | trouble |
| --- | --- | --- | --- |
| `blank_pct` | global crops of a single colour, in percent | near 0 | 100: there is nothing to learn from |
| `copies_pct` | global crops that another image of the batch has, too, in percent | near 0 | 100: one image |
| `image_separation` | how far images lie apart, beside two crops of one image | above 1 | 1: not told apart |
| `feature_std` | how far unit features spread over the sphere | steady | towards 0: the features collapse |
| `prototype_usage` | share of the prototypes that the images of the batch are assigned to | steady | towards 1 / K |
| `teacher_entropy` | how undecided the targets are, nats | steady, below log K | 0 or log K |
| `target_information` | what targets say of an image, nats | steady | 0: all images have the same |

All are of the teacher, on whole crops, but for `student_feature_std`: the student's, on masked ones. Those of images
and features are means over ranks of each rank's batch.

Shapes: B images on this rank, 2 global crops, D features, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.distributed import all_reduce_mean
from dinov2.loss.assignments import Assignments

_BLANK_RANGE = 0.05  # of normalised values: about three of 256 levels, so that compression does not hide a blank image
_MOST_PX = 64  # of a side on which images are compared, so that large batches take little memory
# Of pixels: what differs is a thirtieth of what varies, as after compression. A part under a fixed camera varies more.
_COPY_CORRELATION = 0.999


def signs_of_crops(crops: Tensor) -> dict[str, Tensor]:
    """Measure global crops, normalised images [2 * B, C, H, W], crop-major; see `blank_images` and `copied_images`.

    What is added to a blank crop (jitter, blur, solarisation) leaves it blank. Copies of one image have other crops, as
    a rule: those among the images of a folder are found by looking at whole images.
    """
    return {
        "blank_pct": 100 * blank_images(crops).float().mean(),
        "copies_pct": 100 * copied_images(crops.chunk(2)[0]).float().mean(),
    }


def blank_images(images: Tensor) -> Tensor:
    """Tell which of the images [n, C, H, W] are of a single colour, [n] bool."""
    lowest, highest = images.flatten(2).aminmax(dim=2)  # [n, C]
    return (highest - lowest < _BLANK_RANGE).all(dim=1)


def copied_images(images: Tensor) -> Tensor:
    """Tell which of the images [n, C, H, W] are there twice, pixel by pixel, up to compression and contrast, [n] bool.

    Blank images, which have no pattern to compare, are none of them.
    """
    sides = [min(side, _MOST_PX) for side in images.shape[2:]]
    pixels = F.adaptive_avg_pool2d(images.float(), sides).flatten(1)
    with torch.autocast(images.device.type, enabled=False):
        pixels = F.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)
        correlations = (pixels @ pixels.T).fill_diagonal_(0)  # [n, n]
    return (correlations.amax(dim=1) > _COPY_CORRELATION) & ~blank_images(images)


def signs_of_features(cls: Tensor) -> dict[str, Tensor]:
    """Measure class tokens [2 * B, D], crop-major: their length, their spread and how far images lie apart.

    Separation is the ratio of variances of a one-way analysis of variance over unit features, an image being a group of
    two crops. It is about 1 if the crops of a batch could as well be of one image: of copies, or of a texture that is
    the same everywhere; 0 where all features are the same. A rank with one image gives none.
    """
    cls = cls.float()
    unit = F.normalize(cls, dim=-1)
    signs = {
        "cls_norm": cls.norm(dim=-1).mean(),
        "feature_std": _spread(unit),
    }
    first, second = unit.chunk(2)
    if len(first) > 1:
        within = (first - second).square().sum(dim=1).mean() / 2
        between = 2 * ((first + second) / 2).var(dim=0).sum()
        signs["image_separation"] = between / within.clamp_min(torch.finfo(within.dtype).tiny)
    return signs


def signs_of_student(cls: Tensor) -> dict[str, Tensor]:
    """Measure the student's class tokens [2 * B, D]: it collapses first, the teacher follows."""
    return {"student_feature_std": _spread(F.normalize(cls.detach().float(), dim=-1))}


def _spread(unit: Tensor) -> Tensor:
    return unit.std(dim=0, correction=0).square().sum().sqrt()


def signs_of_targets(assignments: Assignments) -> dict[str, Tensor]:
    """Measure assignments of N rows to K prototypes.

    Returns:
        `teacher_entropy`: mean entropy of a row in nats; log K is uniform, 0 is one prototype each.
        `prototype_usage`: exp of the entropy of the mean row of all ranks, as a share of K; N rows that have one
            prototype each use at most N / K.
        `target_information`: entropy of that mean row less the mean entropy of a row, nats, which is how much a target
            tells of which image it is for; 0 if all are alike, whether undecided or of one prototype.

    Cost: an all-reduce of K floats.
    """
    rows = assignments.dense()
    of_all = torch.special.entr(all_reduce_mean(rows.mean(dim=0))).sum()
    of_one = torch.special.entr(rows).sum(dim=-1).mean()
    return {
        "teacher_entropy": of_one,
        "prototype_usage": of_all.exp() / rows.shape[1],
        "target_information": of_all - of_one,
    }
