"""Features computed once: kept in a folder, found again as long as nothing that they depend on has changed.

The name of a file holds a digest of the weights, the dataset, the preprocessing and the number format (see
`dinov2.eval.feature_digest`), so that what has changed is simply another file; a log line says what it was. Rows are
computed in blocks, each kept as soon as it is finished: after a kill, computing goes on with the blocks that are
missing. The finished file is read through and compared with its checksum before it is used. Features of a larger pool
serve as well: `cls` is cut out of `last4+mean`, with the digest that it would have on its own.
"""

import contextlib
import fcntl
import functools
import logging
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dinov2.configs import Config
from dinov2.data.datasets.extended import image_path
from dinov2.distributed import get_rank, on_every_rank, on_main_first
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.build import (
    NamedDataset,
    describe_network,
    describe_preprocessing,
    extraction_settings,
    load_frozen_backbone,
    open_eval_dataset,
)
from dinov2.eval.feature_blocks import Job, compute_feature_files
from dinov2.eval.feature_digest import digest_of_dataset, digest_of_network, digest_of_settings
from dinov2.eval.feature_files import DTYPES, open_feature_set, read_index, why_unusable
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.pooling import PooledBackbone, parse_pool

logger = logging.getLogger(__name__)

_CHANGES = {  # part of the digest: what a log line says of it
    "weights": "the weights of {weights} have changed",
    "dataset": "its images, labels or columns have changed",
    "preprocessing": "settings of the network or of the preprocessing are different",
    "format": "the precision, the device or a version is different",
}


def cached_features(
    cfg: Config,
    *,
    weights: str,
    checkpoint_key: str,
    dataset: str,
    pool: str,
    dtype: str,
    features_dir: str | Path,
    device: torch.device,
    show_progress: bool = False,
) -> FeatureSet:
    """Find the features of a dataset in a folder, or compute them and keep them there; called by all ranks.

    Neither batch size nor workers, processes or an interruption change a byte of the files, see
    `dinov2.eval.extraction`.

    Args:
        cfg: network, preprocessing, precision, `train.num_workers`, `train.on_bad_image`, `evaluation.knn.batch_size`.
        weights: a path or name that `dinov2.hub.open_weights` takes.
        checkpoint_key: network to take where the weights hold several, teacher or student.
        dataset: dataset string; labels are kept if it has some.
        pool: see `dinov2.eval.pooling`.
        dtype: numbers that are kept: fp32, bf16 or fp16.
        features_dir: folder, made if needed; of several machines, one that all of them see.
        device: of this rank.
        show_progress: on the console.

    Returns:
        The features; the values are a map of the file, so that ranks of a machine share its pages.

    Raises:
        ConfigError: pool, type or dataset string is wrong, the folder cannot be written, or values do not fit fp16.
        DatasetError: the dataset is empty, or an image cannot be read.
        CheckpointError: the weights do not fit, or features are not finite.
    """
    parsed = parse_pool(pool)
    if dtype not in DTYPES:
        raise ConfigError(f"features of type {dtype!r}: must be one of {', '.join(DTYPES)}")
    named = on_every_rank(lambda: open_eval_dataset(cfg, dataset))
    if len(named.dataset) == 0:
        raise DatasetError(f"{dataset}: holds no images")
    model = on_every_rank(lambda: _load(cfg, weights, checkpoint_key=checkpoint_key, pool=parsed.name, device=device))
    job = Job(
        dataset=named,
        model=model,
        kept_dtype=DTYPES[dtype],
        description=f"features of {dataset}" if show_progress else None,
        **vars(extraction_settings(cfg, device=device)),
    )
    folder = Path(features_dir).expanduser()
    parts = on_main_first(_digests, cfg, job, parsed.name)
    about = FeatureSet(
        name=dataset,
        values=torch.empty(0),
        targets=np.empty(0, np.int64),
        places=np.empty(0, np.int64),
        class_names=tuple(getattr(named.dataset, "class_names", None) or ()),
        pool=parsed.name,
        weights=weights,
        checkpoint_key=checkpoint_key,
        digest=digest_of_settings(parts),
    )
    path = folder / f"{_slug(dataset)}-{parsed.name}-{about.digest[:16]}.safetensors"
    with _locked(path):
        kept = on_main_first(_find_kept, path, about, parts, functools.partial(_digests, cfg, job, parts=parts))
        if kept is None:
            compute_feature_files(job, path, about=about, parts=parts)
    found = on_every_rank(lambda: _open(kept or path)).select(about.pool)
    found = replace(found, digest=about.digest)
    on_main_first(_warn_of_missing, found, named)
    return replace(found, weights=weights, checkpoint_key=checkpoint_key)  # equal ones may have had another name


def _load(cfg: Config, weights: str, *, checkpoint_key: str, pool: str, device: torch.device) -> nn.Module:
    backbone = load_frozen_backbone(cfg, weights, checkpoint_key=checkpoint_key, device=device)
    return PooledBackbone(backbone, pool).eval()


def _digests(cfg: Config, job: Job, pool: str, parts: Mapping[str, str] | None = None) -> dict[str, str]:
    """Digest all that the features depend on; for rank 0. Of another pool, given the `parts` of one, at once."""
    numbers: list[Any] = [pool, job.kept_dtype, job.dtype, job.device.type]
    libraries = [version(name) for name in ("dinov2-adapt", "torchvision", "pillow")]  # that decode and resize
    versions = [*libraries, torch.__version__, platform.machine()]
    if parts is not None:
        return {**parts, "format": digest_of_settings([*numbers, *versions])}
    return {
        "weights": digest_of_network(job.model.backbone),
        "dataset": digest_of_dataset(job.dataset.dataset, name=job.dataset.name),
        "preprocessing": digest_of_settings([describe_preprocessing(cfg), describe_network(cfg), job.on_bad_image]),
        "format": digest_of_settings([*numbers, *versions]),
    }


def _slug(name: str) -> str:
    """Make a dataset string the start of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:60]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one program at a time compute these features: rank 0 holds a lock, on a file system that knows locks."""
    with contextlib.ExitStack() as stack:
        on_main_first(_lock, path, stack)
        yield


def _lock(path: Path, stack: contextlib.ExitStack) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(path.with_name(f".{path.stem}.lock"), "ab"))
    except OSError as error:
        raise ConfigError(
            f"--features-dir {path.parent}: cannot be written ({error.strerror}); choose another"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another program that computes the features %s", path)
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        pass


def _find_kept(
    path: Path, about: FeatureSet, parts: Mapping[str, str], parts_of_pool: Callable[[str], Mapping[str, str]]
) -> Path | None:
    """Find sound features, of this pool or a larger one; if there are none, the log tells why. For rank 0."""
    larger = () if path.exists() else _larger(path, about, parts_of_pool)
    damage = None
    for kept in (path, *larger):
        if not kept.exists():
            continue
        unusable = why_unusable(kept)
        if unusable is None:
            cut = "" if kept == path else f", the pool {about.pool} cut out"
            logger.info("features of %s are taken from %s%s", about.name, kept, cut)
            return kept
        damage = f"{kept.name} is not used: {unusable}"
    reason = damage or _what_changed(path, about, parts)
    logger.info("features of %s are computed%s", about.name, f": {reason}" if reason else "")
    return None


def _larger(path: Path, about: FeatureSet, parts_of_pool: Callable[[str], Mapping[str, str]]) -> list[Path]:
    """Find features that differ in nothing but their pool, and hold this one's as columns; the smallest first."""
    found = []
    for other in sorted(path.parent.glob(f"{_slug(about.name)}-*.safetensors")):
        try:
            index = read_index(other)
            pool = parse_pool(index["pool"])
            if pool.holds(parse_pool(about.pool)) and index["digests"] == parts_of_pool(pool.name):
                found.append((pool.num_parts, other))
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            continue
    return [other for _, other in sorted(found)]


def _what_changed(path: Path, about: FeatureSet, parts: Mapping[str, str]) -> str | None:
    """Compare with the features of this dataset that are kept, by name, and say what makes them stale."""
    best: tuple[int, Path, list[str]] | None = None
    for other in sorted(path.parent.glob(f"{_slug(about.name)}-*.safetensors")):
        try:
            index = read_index(other)
            same = [index[key] for key in ("dataset", "pool", "weights", "checkpoint_key")]
            changed = [part for part, digest in parts.items() if index["digests"][part] != digest]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same == [about.name, about.pool, about.weights, about.checkpoint_key]:
            best = min([(len(changed), other, changed), *[best] * (best is not None)], key=lambda found: found[0])
    if best is None:
        return None
    reasons = [_CHANGES[part].format(weights=about.weights) for part in best[2]]
    return f"those of {best[1].name} are not used, because {' and '.join(reasons)}"


def _open(path: Path) -> FeatureSet:
    if not path.exists():
        raise ConfigError(
            f"{path}: was written by rank 0 but is not there for rank {get_rank()}; choose a --features-dir that all "
            "machines of the job see"
        )
    return open_feature_set(path)


def _warn_of_missing(found: FeatureSet, named: NamedDataset) -> None:
    """Say which images the features lack; for rank 0."""
    missing = len(named.dataset) - len(found)
    if missing:
        first = int(np.setdiff1d(np.arange(len(named.dataset)), found.places)[0])
        logger.warning(
            "%s: %d images that cannot be read are left out; the first: %s",
            named.name,
            missing,
            image_path(named.dataset, first),
        )
