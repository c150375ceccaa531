"""Features in a notebook: of single images, of any loader, into files.

    from dinov2.eval.encoder import FeatureEncoder
    encoder = FeatureEncoder(cfg, weights="teacher_checkpoint.pth")
    encoder.encode_features([Image.open("part.png")], "cls+mean")        # [1, 2 * D]

Shapes: n images, C channels, D features.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.configs import Config
from dinov2.data import make_classification_eval_transform
from dinov2.data.augmentations import normalization
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.build import build_eval_transform, compute_dtype, load_frozen_backbone
from dinov2.eval.extraction import IMAGES_OF_A_PASS, evaluation_mode, run_passes
from dinov2.eval.feature_digest import digest_of_network, digest_of_settings
from dinov2.eval.feature_export import save_features
from dinov2.eval.feature_files import DTYPES, open_feature_set, write_feature_set
from dinov2.eval.feature_set import NO_LABEL, FeatureSet
from dinov2.eval.pooling import PooledBackbone, parse_pool

__all__ = ["FeatureEncoder", "extract_features", "open_feature_set", "save_features"]

_MODES = {1: "L", 3: "RGB"}


class FeatureEncoder:
    """A frozen backbone with its preprocessing.

    Args:
        model: a backbone of this library, kept and not copied; or a config, which describes one.
        weights: for a config: a path or name that `dinov2.hub.open_weights` takes.
        checkpoint_key: for a config: network to take where the weights hold several, teacher or student.
        image_size_px: for a backbone: side of the square cut out of an image; a config has its own.
        device: where it computes; None: where the backbone is, or the CPU for a config.

    Raises:
        ConfigError: a config without weights, or weights without a config.
        CheckpointError: the weights cannot be read or do not fit.
    """

    def __init__(
        self,
        model: nn.Module | Config,
        *,
        weights: str | Path | None = None,
        checkpoint_key: str = "teacher",
        image_size_px: int = 224,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(model, Config) != (weights is not None):
            raise ConfigError("FeatureEncoder takes a config together with weights=..., or a backbone alone")
        self.weights, self.checkpoint_key = str(weights or ""), checkpoint_key
        self.dtype = torch.float32
        if isinstance(model, Config):
            self.device = torch.device(device or "cpu")
            self.backbone = load_frozen_backbone(model, str(weights), checkpoint_key=checkpoint_key, device=self.device)
            self.transform = build_eval_transform(model)
            self.dtype = compute_dtype(model, device=self.device)
            return
        self.device = torch.device(device or next(model.parameters()).device)
        self.backbone = model.to(self.device)
        mean, std = normalization(_num_channels(model), mean=None, std=None)
        size = image_size_px
        self.transform = make_classification_eval_transform(round(size * 256 / 224), size, mean, std)

    def encode_features(self, images: Any, pool: str = "cls") -> Tensor:
        """Compute the features of images.

        Args:
            images: one image, several in a list, or a batch: a Pillow image; an array [height, width],
                [height, width, C] or [n, height, width, C]; a tensor [C, height, width] or [n, C, height, width]; of
                uint8, uint16 or fractions 0..1. They are resized, cut and normalised here.
            pool: see `dinov2.eval.pooling`.

        Returns:
            Features [n, D], [n, N, D] of patches; float32, on the CPU.

        Raises:
            ConfigError: there is no such pool.
            DatasetError: an image has another number of channels than the network.
            TypeError: something is no image.
        """
        prepared = [self.transform(image) for image in self._images(images)]
        if not prepared:
            raise DatasetError("there are no images to encode")
        return self._run(PooledBackbone(self.backbone, pool), torch.stack(prepared))

    def cache_features(
        self, loader: Iterable[Any], path: str | Path, pool: str = "cls", dtype: str = "fp32"
    ) -> FeatureSet:
        """Compute the features of a loader's images and keep them in a file, which is replaced if it is there.

        What images a loader gives is not known beforehand, so these features are always computed; to use them again,
        call `open_feature_set(path)`. The programs' `cached_features` knows its dataset and tells when it has changed.

        Args:
            loader: batches (images [B, C, height, width], ready for the network; targets), as `extract_features`.
            path: `NAME.safetensors`; `NAME.json` is written beside it.
            pool: see `dinov2.eval.pooling`.
            dtype: numbers that are kept: fp32, bf16 or fp16.

        Raises:
            ConfigError: pool, type or path is wrong, or values do not fit fp16.
        """
        path = Path(path).expanduser()
        if dtype not in DTYPES or path.suffix != ".safetensors":
            raise ConfigError(f"{path} of {dtype}: features are kept as .safetensors of {', '.join(DTYPES)}")
        model = PooledBackbone(self.backbone, pool)
        parts, labels = _collect(loader, lambda images: self._run(model, images).to(DTYPES[dtype]))
        values = torch.cat(parts)
        if not bool(values.isfinite().all()):
            raise ConfigError(f"{path}: features are not finite as {dtype}; keep them as fp32, or look at the weights")
        digests = {"weights": digest_of_network(self.backbone), "format": digest_of_settings([pool, dtype])}
        features = FeatureSet(
            name="a loader",
            values=values,
            targets=np.array(labels, dtype=np.int64),
            places=np.arange(len(values)),
            pool=parse_pool(pool).name,
            weights=self.weights,
            checkpoint_key=self.checkpoint_key,
            digest=digest_of_settings(digests),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_feature_set(path, features, parts=digests, values=[values])
        return open_feature_set(path)

    def _run(self, model: nn.Module, images: Tensor) -> Tensor:
        with evaluation_mode(model), torch.no_grad():
            return run_passes(model, images, device=self.device, dtype=self.dtype)

    def _images(self, images: Any) -> list[Any]:
        """Take a batch or a list apart, into Pillow images and tensors [C, height, width]."""
        channels = _num_channels(self.backbone)
        if isinstance(images, list | tuple):
            return [image for item in images for image in self._images(item)]
        if isinstance(images, Image.Image):
            return [images if channels not in _MODES else images.convert(_MODES[channels])]
        if isinstance(images, np.ndarray):
            images = images[..., None] if images.ndim == 2 else images
            images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
        if not isinstance(images, Tensor) or images.ndim not in (3, 4):
            raise TypeError(
                f"{type(images).__name__} is no image; give Pillow images, arrays [H, W, C], tensors [C, H, W]"
            )
        batch = images if images.ndim == 4 else images[None]
        if batch.shape[1] == 1 and channels == 3:
            batch = batch.expand(-1, 3, -1, -1)
        if batch.shape[1] != channels:
            raise DatasetError(f"an image has {batch.shape[1]} channels, and the network takes {channels}")
        return list(batch)


def extract_features(
    model: nn.Module, loader: Iterable[Any], device: torch.device | str, use_head: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the features of a loader's images, in its order.

    Args:
        model: any network from images to features; a backbone of this library or of timm; or the pair of backbone and
            `dino_head` of a training run (`SSLMetaArch.teacher`). It is moved to the device, and its modes are kept.
        loader: batches (images [B, C, height, width], targets [B]), or images alone.
        device: where to compute.
        use_head: also apply the classifier of a network, or the projection head of a run.

    Returns:
        (features [n, D], float32; targets [n], int64, -1 without a label), on the CPU.

    Raises:
        TypeError: the network gives no tensor of features, or there is no head.
    """
    device = torch.device(device)
    model = model.to(device)
    forward = _Forward(model, use_head=use_head)
    with evaluation_mode(model), torch.no_grad():
        parts, labels = _collect(loader, lambda images: run_passes(forward, images, device=device, dtype=torch.float32))
    return torch.cat(parts), torch.tensor(labels, dtype=torch.int64)


class _Forward(nn.Module):
    """Images to features, with or without the head of a network."""

    def __init__(self, model: nn.Module, *, use_head: bool) -> None:
        super().__init__()
        is_pair = isinstance(model, nn.ModuleDict)
        self.backbone = model["backbone"] if is_pair else model
        self.head = model["dino_head"] if is_pair and use_head and "dino_head" in model else None
        self.stops_early = not use_head and not is_pair
        if is_pair and use_head and self.head is None:
            raise TypeError(f"use_head=True, but the modules are {', '.join(model)} and none is dino_head")

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, D]."""
        model = self.backbone
        if self.stops_early and hasattr(model, "forward_features"):
            features = model.forward_features(images)
            if isinstance(features, dict):
                features = features["x_norm_clstoken"]
            elif hasattr(model, "forward_head"):  # of timm
                features = model.forward_head(features, pre_logits=True)
        else:
            features = model(images)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{type(model).__name__} gives a {type(features).__name__}, and features are a tensor [B, D]"
            )
        return features if self.head is None else self.head(features)


def _collect(loader: Iterable[Any], compute: Any) -> tuple[list[Tensor], list[int]]:
    """Go through a loader: features of each batch, and labels of all.

    Batches are put together to whole passes, so that the loader's batch size does not matter; see
    `dinov2.eval.extraction`.
    """
    parts: list[Tensor] = []
    labels: list[int] = []
    waiting: list[Tensor] = []
    for item in loader:
        images, targets = item[:2] if isinstance(item, list | tuple) else (item, None)
        labels += [NO_LABEL] * len(images) if targets is None else [_label(target) for target in targets]
        waiting += images
        whole = len(waiting) // IMAGES_OF_A_PASS * IMAGES_OF_A_PASS
        if whole:
            parts.append(compute(torch.stack(waiting[:whole])))
            waiting = waiting[whole:]
    if waiting:
        parts.append(compute(torch.stack(waiting)))
    if not parts:
        raise DatasetError("the loader gives no images")
    return parts, labels


def _label(target: Any) -> int:
    return NO_LABEL if target is None else int(target)


def _num_channels(model: nn.Module) -> int:
    return getattr(model, "in_chans", None) or model.patch_embed.in_chans
