"""Heads that start from the training images instead of from noise.

A random head maps all images close together: its prototypes share them out by chance, and the first gradients that
reach a pretrained backbone are noise. Here the MLP starts as a projection to the main axes of the backbone's own
features, centred and half whitened, and the prototypes as centres of the images' clusters there.

Half whitening divides an axis by the root of its standard deviation: unscaled, the first few axes would decide alone;
fully whitened, noise would count as much. What it is worth stands in benchmarks/small_batches_cpu_202611.md.

Shapes: n crops, P patches of each, N inputs of a head, D features of the backbone, d of the bottleneck, K prototypes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2.data import DataAugmentationDINO
from dinov2.data.random_streams import derive_seed, shuffled
from dinov2.data.samples import TrainingSamples
from dinov2.distributed import is_main_process
from dinov2.errors import DatasetError
from dinov2.eval.extraction import IMAGES_OF_A_PASS, extract_features
from dinov2.layers.dino_head import DINOHead
from dinov2.train.spherical_kmeans import spherical_kmeans
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

VIEWS_OF_AN_IMAGE = 4  # crops of one image that are looked at, at most
PATCHES_OF_A_CROP = 8  # whose features are clustered; neighbouring patches are too alike to need all
_FEATURES_OF_A_CENTRE = 4  # fewer make a centre a copy of an image
_ROUNDING = 1e-9  # share of the largest variance
_ROWS_AT_ONCE = 1024
_SAMPLE = 1024
_STREAM = 8  # of derive_seed


class FirstCrops(Dataset[tuple[Tensor, None]]):
    """Finished global crops of training images in a random order, each image once before any comes a second time.

    Args:
        samples: of the training images.
        num_crops: at most; fewer where `VIEWS_OF_AN_IMAGE` of each image are not so many.
    """

    def __init__(self, samples: TrainingSamples, num_crops: int) -> None:
        self.samples = samples
        self.order = shuffled(len(samples.dataset), samples.seed)
        self.num_crops = min(num_crops, VIEWS_OF_AN_IMAGE * len(self.order))

    def __len__(self) -> int:
        return self.num_crops

    def __getitem__(self, position: int) -> tuple[Tensor, None]:
        """Return a crop [C, H, W] float32, and no target."""
        augmentation = self.samples.augmentation
        sample = self.samples[position, int(self.order[position % len(self.order)])]
        first = {"global_crops": sample.crops["global_crops"][:1], "local_crops": []}
        finished = augmentation.finish(augmentation.stack([first]), torch.tensor([sample.seed]))
        return finished["collated_global_crops"][0], None


@dataclass(frozen=True)
class HeadFeatures:
    """What the heads get from the backbone, equal on all ranks, on the CPU."""

    cls: Tensor  # [n, D] float32
    patches: Tensor  # [n * P, D]; P = 0 for a backbone whose patches no head sees


def start_heads(
    model: SSLMetaArch,
    heads: Sequence[str],
    dataset: Any,
    *,
    augmentation: DataAugmentationDINO,
    num_crops: int,
    seed: int,
    num_workers: int,
    device: torch.device,
    on_bad_image: Literal["error", "skip"],
) -> None:
    """Start heads from the training images; all ranks together, with the same result on any number of them.

    Args:
        model: with its first weights; student and teacher get the same new heads.
        heads: their names, dino_head or ibot_head.
        dataset: training images.
        augmentation: of the training.
        num_crops: to look at, at most.
        seed: train.seed.
        num_workers: loader processes of one rank.
        device: of this rank.
        on_bad_image: error, or skip: another image takes its place.

    Raises:
        DatasetError: an image cannot be read, or the backbone sees no difference between them.
    """
    own_seed = derive_seed(seed, _STREAM)
    crops = FirstCrops(TrainingSamples(dataset, augmentation, seed=own_seed, on_bad_image=on_bad_image), num_crops)
    has_patch_loss = "ibot_head" in model.student or model.ibot_loss_weight > 0
    values, _ = extract_features(
        _Tokens(model.teacher["backbone"], num_patches=PATCHES_OF_A_CROP * has_patch_loss, seed=own_seed),
        crops,
        batch_size=IMAGES_OF_A_PASS,
        num_workers=num_workers,
        device=device,
        dtype=model.autocast_dtype,
    )
    num_features = model.student["backbone"].embed_dim
    features = HeadFeatures(
        values[:, :num_features], values[:, num_features:].unflatten(1, (-1, num_features)).flatten(0, 1)
    )
    for name in heads:
        inputs = _inputs(name, features, has_patch_head="ibot_head" in model.student)
        generator = torch.Generator().manual_seed(own_seed)

        def change(head: DINOHead, inputs: Tensor = inputs, generator: torch.Generator = generator) -> None:
            start_head(head, inputs, generator=generator, device=device)

        model.change_head(name, change)
        if is_main_process():
            logger.info("%s starts from %d features of %d crops", name, len(inputs), len(crops))


def _inputs(name: str, features: HeadFeatures, *, has_patch_head: bool) -> Tensor:
    """Choose what a head gets: one that serves both kinds of tokens gets as many patches as class tokens."""
    if name == "ibot_head":
        return features.patches
    if has_patch_head or not len(features.patches):
        return features.cls
    return torch.cat([features.cls, features.patches[::PATCHES_OF_A_CROP]])


def start_head(head: DINOHead, inputs: Tensor, *, generator: torch.Generator, device: torch.device) -> None:
    """Start a head, which is on the CPU, from features [N, D] like those that it will get.

    Raises:
        DatasetError: the features do not differ.
    """
    mean = inputs.mean(dim=0)
    axes = main_axes(inputs - mean)[: head.num_projected]
    if not len(axes):
        raise DatasetError(
            f"prototype_init=kmeans: the backbone sees no difference between {len(inputs)} crops of the training "
            f"images; look at them, for they are empty or all the same"
        )
    head.start_as_projection(axes, mean, generator=generator)
    with torch.no_grad():
        points = torch.cat([F.normalize(head.mlp(part), dim=1) for part in inputs.split(_ROWS_AT_ONCE)])
    num_prototypes = len(head.last_layer.prototypes())
    head.last_layer.start_from(prototypes_from(points, num_prototypes, generator=generator, device=device))


def main_axes(centred: Tensor) -> Tensor:
    """Return the main axes of centred features [N, D], longest spread first, half whitened, [at most D, D] float32.

    An axis is a direction divided by the root of the standard deviation along it. Axes along which there is nothing but
    rounding are left out.
    """
    exact = centred.double()
    variances, directions = torch.linalg.eigh(exact.T @ exact / len(exact))  # rising; directions in columns
    variances, directions = variances.flip(0), directions.flip(1).T
    is_real = (variances > variances[0] * _ROUNDING) & (variances > torch.finfo(torch.float32).tiny)
    return (directions[is_real] * variances[is_real].pow(-0.25).unsqueeze(1)).float()


def prototypes_from(points: Tensor, num_prototypes: int, *, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return prototypes [K, d] of length 1 for unit features [N, d]: centres of clusters and, if K is large, copies.

    There are at most N / 4 centres. The other prototypes are features drawn at random, each moved in a random direction
    about as far as its nearest neighbour is.
    """
    num_centres = min(num_prototypes, max(1, len(points) // _FEATURES_OF_A_CENTRE))
    centres = spherical_kmeans(points, num_centres, generator=generator, device=device)
    num_copies = num_prototypes - num_centres
    if num_copies:
        drawn = points[torch.randint(len(points), (num_copies,), generator=generator)]
        noise = F.normalize(torch.randn(drawn.shape, generator=generator), dim=1)
        copies = F.normalize(drawn + _typical_distance(points) * noise, dim=1)
        centres = torch.cat([centres, copies])
        logger.info(
            "prototypes=%d are more than a %dth of the features=%d: %d are centres of clusters, %d copies of features "
            "with noise; fewer prototypes, or more train.prototype_init_crops, would do them better",
            num_prototypes,
            _FEATURES_OF_A_CENTRE,
            len(points),
            num_centres,
            num_copies,
        )
    return centres


def _typical_distance(points: Tensor) -> float:
    """Mean distance of some unit features to the nearest of them."""
    some = points[:_SAMPLE]
    cosines = (some @ some.T).fill_diagonal_(-1).amax(dim=1)
    return (2 - 2 * cosines).clamp_min(0).sqrt().mean().item()


class _Tokens(nn.Module):
    """The class token of each image and, behind it, some of its patches, [B, (1 + P) * D].

    Args:
        backbone: called as in training.
        num_patches: P, >= 0; fewer where an image has fewer.
        seed: the patches of an image depend on it and on the image's place in a pass, so on no number of ranks.
    """

    def __init__(self, backbone: nn.Module, *, num_patches: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_patches = num_patches
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images, is_training=True)
        if not self.num_patches:
            return tokens["x_norm_clstoken"]
        patches = tokens["x_norm_patchtokens"]  # [B, N, D]
        keys = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(self.seed))
        chosen = keys.argsort(dim=1)[:, : self.num_patches].to(patches.device)
        rows = torch.arange(len(patches), device=patches.device).unsqueeze(1)
        return torch.cat([tokens["x_norm_clstoken"].unsqueeze(1), patches[rows, chosen]], dim=1).flatten(1)
