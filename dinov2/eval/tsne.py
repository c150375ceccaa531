"""Features of a dataset in the plane: a t-SNE scatter, coloured by label or by a column such as group or plate.

    python eval/tsne.py --config-file F --pretrained-weights W --dataset S [--colour-by plate] --output tsne.png

t-SNE keeps neighbours together; distances between far points, sizes and densities of clouds mean little. Features are
taken from --features-dir where they are kept.

n images, D features. Source: van der Maaten and Hinton 2008, JMLR 9; scikit-learn's `TSNE`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dinov2 import distributed
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.health_views import choose_images
from dinov2.eval.options import (
    add_features_options,
    config_from_options,
    get_backbone_parser,
    make_output_dir,
    parse_options,
)
from dinov2.eval.picture_images import as_dataset_string
from dinov2.eval.picture_program import require_png
from dinov2.eval.pooling import POOLS, parse_pool
from dinov2.eval.scatter import draw_scatter
from dinov2.logging import run_program, setup_logging

_NUM_COMPONENTS = 50  # kept before t-SNE
_FEWEST = 4
_PERPLEXITY = 30.0
_MOST_IMAGES = 5000
_NO_LABEL = "no label"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def visualize_features_tsne(
    features: Any,
    path: str | Path,
    *,
    colour_by: str | Sequence[Any] | np.ndarray | None = None,
    num_images: int = _MOST_IMAGES,
    perplexity: float = _PERPLEXITY,
    seed: int = 0,
    name: str = "",
) -> np.ndarray:
    """Draw features as a t-SNE scatter.

    Args:
        features: a `FeatureSet`, or an array or tensor [n, D].
        path: PNG file to write; its folder is made if needed.
        colour_by: of a `FeatureSet`: label, or a column of its metadata; of an array: a value for each row, [n]. None:
            labels of a `FeatureSet` that has some, else one colour.
        num_images: drawn at most, chosen by a hash of their places; the title says so.
        perplexity: about how many neighbours of an image count; at most a third of the images.
        seed: of the optimisation.
        name: of the features, for the title; empty: that of the set.

    Returns:
        Points [m, 2] of the images drawn, in the order of the features.

    Raises:
        ConfigError: there is no such column, or the picture cannot be written.
        DatasetError: there are fewer than 4 images, or all features are equal.
    """
    path = Path(path).expanduser()
    values, column, column_name = _columns(features, colour_by)
    title = name or getattr(features, "name", "") or "features"
    rows = choose_images(len(values), at_most=num_images)
    points = tsne_points(values[torch.from_numpy(rows)], perplexity=perplexity, seed=seed)
    count = f"{len(rows)} images" if len(rows) == len(values) else f"{len(rows)} of {len(values)} images, by hash"
    used = bounded_perplexity(perplexity, num_images=len(rows))
    title = f"{title}\nt-SNE of {count}, perplexity {used:g}, seed {seed}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = None if column is None else column[rows]
        draw_scatter(path, points, column=chosen, title=title, column_name=column_name)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another") from error
    return points


def tsne_points(values: torch.Tensor, *, perplexity: float = _PERPLEXITY, seed: int = 0) -> np.ndarray:
    """Place features in the plane: scaled to length 1, as k-NN compares them, reduced to 50 components, t-SNE.

    Args:
        values: [n, D], left unchanged.
        perplexity: lowered to a third of n where it is larger.
        seed: same seed, same points on the same machine.

    Returns:
        [n, 2] float32.

    Raises:
        DatasetError: there are fewer than 4 images, or all features are equal.

    Cost: about 20 s for 5000 images on a CPU.
    """
    if len(values) < _FEWEST:
        raise DatasetError(f"t-SNE needs at least {_FEWEST} images and there are {len(values)}")
    unit = torch.nn.functional.normalize(values.float(), dim=1).numpy()
    if np.ptp(unit, axis=0).max() < 1e-6:
        raise DatasetError("all features are equal: the backbone has collapsed, and there is nothing to draw")
    num_components = min(_NUM_COMPONENTS, *unit.shape)
    reduced = PCA(num_components, svd_solver="full", random_state=seed).fit_transform(unit)
    used = bounded_perplexity(perplexity, num_images=len(values))
    return TSNE(2, perplexity=used, init="pca", learning_rate="auto", random_state=seed).fit_transform(reduced)


def bounded_perplexity(perplexity: float, *, num_images: int) -> float:
    """Return the perplexity that is used: at most a third of the other images, whose distances it weighs."""
    return min(float(perplexity), (num_images - 1) / 3)


def _columns(features: Any, colour_by: Any) -> tuple[torch.Tensor, np.ndarray | None, str]:
    """Take the values [n, D], the column that gives colours, and its name."""
    if not isinstance(features, FeatureSet):
        values = torch.as_tensor(features)
        if values.ndim != 2:
            raise ValueError(f"features are [n, D], not {list(values.shape)}")
        if isinstance(colour_by, str) or (colour_by is not None and len(colour_by) != len(values)):
            raise ValueError(f"colour_by={colour_by!r}: must be one value for each of the {len(values)} rows")
        return values, None if colour_by is None else np.asarray(colour_by), ""
    if features.values.ndim != 2:
        raise ConfigError(f"--pool {features.pool}: t-SNE takes one vector for each image; choose cls, mean or lastN")
    if colour_by is None and (features.targets >= 0).any():
        colour_by = "label"
    if colour_by is None:
        return features.values, None, ""
    return features.values, _column(features, colour_by), str(colour_by)


def _column(features: FeatureSet, name: str) -> np.ndarray:
    if name == "label":
        if not (features.targets >= 0).any():
            raise ConfigError(f"--colour-by label: {features.name} has no labels")
        names = np.array([*(features.class_names or map(str, range(features.targets.max() + 1))), _NO_LABEL])
        return names[features.targets]  # -1 is the last
    if name not in features.columns:
        known = ", ".join(["label", *features.columns])
        raise ConfigError(f"--colour-by {name}: {features.name} has no such column; it has: {known}")
    return np.asarray(features.columns[name])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_backbone_parser("tsne.py", description="t-SNE scatter of the features of a dataset's images.")
    parser.add_argument("--dataset", metavar="S", help="images: a folder, or a dataset string")
    parser.add_argument(
        "--colour-by",
        "--color-by",
        metavar="COLUMN",
        help="label, or a column of the dataset: group, plate, ...; default: label, if there are some",
    )
    parser.add_argument("--pool", default="cls", metavar="P", help=f"{POOLS}; default: cls")
    parser.add_argument(
        "--num-images",
        type=int,
        default=_MOST_IMAGES,
        metavar="N",
        help=f"drawn at most, chosen by a hash; default: {_MOST_IMAGES}, about 20 s",
    )
    parser.add_argument(
        "--perplexity",
        type=float,
        default=_PERPLEXITY,
        metavar="P",
        help="about how many neighbours of an image count, > 1; at most a third of the images; default: 30",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the optimisation, >= 0; default: 0")
    parser.add_argument("--output", metavar="PNG", help="picture; default: OUTPUT_DIR/tsne.png")
    add_features_options(parser)
    args = parse_options(parser, argv)
    if not args.dataset:
        raise ConfigError("--dataset is not given; name a folder of images, or a dataset string")
    if args.num_images < _FEWEST:
        raise ConfigError(f"--num-images {args.num_images}: must be at least {_FEWEST}")
    if not args.perplexity > 1:
        raise ConfigError(f"--perplexity {args.perplexity:g}: must be above 1")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed {args.seed}: must be 0 to {2**32 - 1}")
    args.output = Path(args.output or Path(args.output_dir) / "tsne.png")
    require_png(args.output)
    if parse_pool(args.pool).has_patches:
        raise ConfigError(f"--pool {args.pool}: t-SNE takes one vector for each image; choose cls, mean or lastN")
    return args


def _run(argv: Sequence[str] | None) -> int:
    args = _parse(argv)
    cfg = config_from_options(args)
    env = distributed.init(cfg.compute_precision.device)
    try:
        distributed.on_main_first(make_output_dir, args.output_dir)
        setup_logging(args.output_dir, rank=env.rank)
        features = cached_features(
            cfg,
            weights=args.pretrained_weights,
            checkpoint_key=args.checkpoint_key,
            dataset=as_dataset_string(args.dataset),
            pool=args.pool,
            dtype=args.features_dtype,
            features_dir=args.features_dir or Path(args.output_dir) / "features",
            device=env.device,
            show_progress=True,
        )
        distributed.on_main_first(_draw, args, features)
        return 0
    finally:
        distributed.shutdown()


def _draw(args: argparse.Namespace, features: FeatureSet) -> None:
    points = visualize_features_tsne(
        features,
        args.output,
        colour_by=args.colour_by,
        num_images=args.num_images,
        perplexity=args.perplexity,
        seed=args.seed,
        name=f"{args.pretrained_weights} on {features.name}",
    )
    print(f"written: {args.output}, {len(points)} of {len(features)} images of {features.name}")


if __name__ == "__main__":
    sys.exit(main())
