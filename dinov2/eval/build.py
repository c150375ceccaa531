"""Build what evaluation and training need from the config: datasets, backbone, precision."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.configs import Config
from dinov2.data import make_classification_eval_transform, make_dataset
from dinov2.data.augmentations import normalization
from dinov2.data.splits import require_disjoint_groups
from dinov2.errors import ConfigError
from dinov2.eval.extraction import ExtractionSettings
from dinov2.hub.weights import load_backbone_weights
from dinov2.models import Backbone, build_model

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class NamedDataset:
    """A dataset and the string that named it."""

    name: str
    dataset: Any


def build_datasets(cfg: Config) -> tuple[NamedDataset, NamedDataset]:
    """Open the training and the validation set of k-NN, with the deterministic transform of evaluations.

    Raises:
        ConfigError: a set is not named, or its string is wrong.
        DatasetError: its files are missing, or both sets have images of one group.
    """
    train = _open("train_dataset_path", cfg.evaluation.knn.train_dataset_path, cfg=cfg)
    val = _open("val_dataset_path", cfg.evaluation.knn.val_dataset_path, cfg=cfg)
    require_separate(train, val)
    return train, val


def build_eval_transform(cfg: Config) -> Callable[[Any], torch.Tensor]:
    """Build the deterministic preprocessing of images for evaluations."""
    return make_classification_eval_transform(**describe_preprocessing(cfg))


def describe_preprocessing(cfg: Config) -> dict[str, Any]:
    """Return the arguments of the preprocessing: all that the config says about it."""
    knn, augmentation = cfg.evaluation.knn, cfg.augmentation
    size = knn.image_size_px or cfg.crops.global_crops_size
    mean, std = normalization(cfg.student.in_chans, mean=augmentation.mean, std=augmentation.std)
    return {"resize_size": round(size * knn.resize_ratio), "crop_size": size, "mean": mean, "std": std}


def require_separate(train: NamedDataset, val: NamedDataset) -> None:
    """Warn if images are compared with themselves; refuse groups (parts, plates, slides) that are in both sets.

    Names of groups mean the same only where both sets, or parts of them in mixtures, come from one folder.
    """
    if train.name == val.name:
        logger.warning("%s is learned from and reported on: the score says nothing about other images", val.name)
        return
    for one, other in product(_parts(train), _parts(val)):
        columns = [part.metadata() if hasattr(part, "metadata") else {} for part in (one, other)]
        if _root(one) is not None and _root(one) == _root(other) and all("group" in names for names in columns):
            groups = [np.unique(names["group"]).tolist() for names in columns]
            require_disjoint_groups(*groups, names=(train.name, val.name))
    warn_of_common_images(train, val)


def warn_of_common_images(train: NamedDataset, val: NamedDataset) -> None:
    """Warn of files that both sets have; only of datasets that lie in a folder."""
    files = {file for part in _parts(val) for file in _files(part)}
    common = files.intersection(file for part in _parts(train) for file in _files(part)) if files else files
    if common:
        logger.warning(
            "%d of the %d images of %s are in %s, too: the score says little about other images; choose separate "
            "splits or folders",
            len(common),
            len(files),
            val.name,
            train.name,
        )


def _parts(named: NamedDataset) -> Sequence[Any]:
    """The datasets of a mixture, or the one."""
    return getattr(named.dataset, "parts", [named.dataset])


def _root(dataset: Any) -> str | None:
    root = getattr(dataset, "root", None)
    return None if root is None else os.path.realpath(root)


def _files(dataset: Any) -> Iterator[str]:
    """Full paths of the images of a dataset in a folder; others name their images as they like."""
    if _root(dataset) is not None and hasattr(dataset, "path"):
        yield from (os.path.abspath(dataset.path(index)) for index in range(len(dataset)))


def _open(key: str, dataset_str: str | None, *, cfg: Config) -> NamedDataset:
    option = "--" + key.removesuffix("_path").replace("_", "-")
    if not dataset_str:
        raise ConfigError(
            f"evaluation.knn.{key} ({option}) is not set; name labelled images, e.g. ImageFolder:root=photos"
        )
    return open_eval_dataset(cfg, dataset_str)


def open_eval_dataset(cfg: Config, dataset_str: str, *, transform: Callable[[Any], Any] | None = None) -> NamedDataset:
    """Open a dataset with the deterministic transform of evaluations, or with another.

    Raises:
        ConfigError: its string is wrong.
        DatasetError: its files are missing.
    """
    dataset = make_dataset(
        dataset_str,
        channels=cfg.student.in_chans,
        cache_dir=cfg.data.cache_dir or str(Path(cfg.train.output_dir) / "cache"),
        max_image_pixels=cfg.data.max_image_pixels,
        transform=transform or build_eval_transform(cfg),
    )
    return NamedDataset(dataset_str, dataset)


def build_backbone(cfg: Config, *, drop_path_rate: float = 0.0) -> Backbone:
    """Build the backbone that the config describes, initialised; with stochastic depth only where it is asked for."""
    student, network = cfg.student, describe_network(cfg)
    if student.is_resnet:
        return build_model(**network, sync_batchnorm=student.sync_batchnorm)
    return build_model(
        **network,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=student.drop_path_uniform,
    )


def describe_network(cfg: Config) -> dict[str, Any]:
    """Return the arguments of `build_model` that the features of given weights depend on."""
    student = cfg.student
    if student.is_resnet:
        return {"arch": student.arch, "in_chans": student.in_chans}
    rope = {
        f"pos_embed_rope_{name}": getattr(student, f"pos_embed_rope_{name}")
        for name in (
            "base",
            "min_period",
            "max_period",
            "normalize_coords",
            "shift_coords",
            "jitter_coords",
            "rescale_coords",
            "dtype",
        )
    }
    return {
        "arch": student.arch,
        "embed_dim": student.embed_dim,
        "depth": student.depth,
        "num_heads": student.num_heads,
        "mlp_ratio": student.ffn_ratio,
        "img_size": cfg.crops.global_crops_size,
        "patch_size": student.patch_size,
        "in_chans": student.in_chans,
        "init_values": student.layerscale,
        "ffn_layer": student.ffn_layer,
        "qkv_bias": student.qkv_bias,
        "proj_bias": student.proj_bias,
        "ffn_bias": student.ffn_bias,
        "num_register_tokens": student.num_register_tokens,
        "interpolate_antialias": student.interpolate_antialias,
        "interpolate_offset": student.interpolate_offset,
        "attention_backend": student.attention_backend,
        "norm_layer": student.norm_layer,
        "mask_k_bias": student.mask_k_bias,
        "untie_cls_and_patch_norms": student.untie_cls_and_patch_norms,
        "untie_global_and_local_cls_norm": student.untie_global_and_local_cls_norm,
        "pos_embed_type": student.pos_embed_type,
    } | rope


def load_frozen_backbone(cfg: Config, weights: str, *, checkpoint_key: str, device: torch.device) -> Backbone:
    """Build the backbone with given weights, for features only, on the device.

    Args:
        weights: a path or name that `dinov2.hub.open_weights` takes.
        checkpoint_key: network to take where the weights hold several, teacher or student.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
    """
    with torch.device("meta"):
        model = build_backbone(cfg)
    allow_partial = cfg.student.allow_partial_weights
    load_backbone_weights(model, weights, checkpoint_key=checkpoint_key, allow_partial=allow_partial)
    return model.requires_grad_(False).eval().to(device)


def compute_dtype(cfg: Config, *, device: torch.device) -> torch.dtype:
    """Resolve `compute_precision.param_dtype`; auto is bfloat16 on a GPU that has it, else float32."""
    name = cfg.compute_precision.param_dtype
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    has_bf16 = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def extraction_settings(cfg: Config, *, device: torch.device) -> ExtractionSettings:
    """Return how the config wants features to be computed."""
    return ExtractionSettings(
        device=device,
        batch_size=cfg.evaluation.knn.batch_size,
        num_workers=cfg.train.num_workers,
        dtype=compute_dtype(cfg, device=device),
        on_bad_image=cfg.train.on_bad_image,
    )
