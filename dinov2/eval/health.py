"""Health of a backbone's features without any label: how many directions they use, how evenly, how stably.

    python eval/health.py --config-file F --pretrained-weights W --dataset S --output-dir D [--compare-to W0]

What the measures are stands in `dinov2.eval.health_measures`. They look at a fixed sample of the images, chosen by a
hash of their places. With --compare-to, also which share of an image's nearest neighbours both backbones agree on.

Files: `results_eval_health.json`, `duplicates_health.csv` (pairs of images with nearly the same features, the most
similar first), `spectrum_health.png` (singular values of the centred features).
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Subset

from dinov2.checkpoint_format import write_text
from dinov2.distributed import on_every_rank, on_main_first
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.build import extraction_settings, load_frozen_backbone, open_eval_dataset
from dinov2.eval.extraction import extract_features
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.health_measures import alignment, neighbour_overlap_pct, singular_values
from dinov2.eval.health_pairs import PairMeasures, neighbours_within
from dinov2.eval.health_plots import plot_spectrum
from dinov2.eval.health_scores import Health, measure
from dinov2.eval.health_views import TwoViews, choose_images
from dinov2.eval.options import add_set_options, pool_of, refuse_other_sets
from dinov2.eval.pooling import PooledBackbone
from dinov2.eval.program import Inputs, Outcome, run_evaluation
from dinov2.eval.results import table_text

logger = logging.getLogger(__name__)

DUPLICATES_NAME, SPECTRUM_NAME = "duplicates_health.csv", "spectrum_health.png"
_MOST_PAIRS = 1000  # listed
_MANY_PAIRS = 0.01  # of all: no duplicates any more, but features that hardly differ
_ABOUT = {  # score: what it is called and how to read it, in the table
    "rankme": ("RankMe", "directions the features use"),
    "effective_rank": ("effective rank", "directions in which images differ"),
    "participation_ratio": ("participation ratio", "the same, weak directions counting less"),
    "feature_std": ("feature std", "1 = all over the sphere, 0 = collapsed"),
    "mean_cosine": ("mean cosine", "of two images; 1 = collapsed"),
    "uniformity": ("uniformity", "lower is more even, 0 = collapsed"),
    "alignment": ("alignment", "distance^2 of two crops of an image; lower is stabler"),
    "nn_overlap_pct": ("neighbours kept, %", "shared by both backbones"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name="health",
        description="Health of a frozen backbone's features, without labels.",
        pool_of=pool_of,
        fit_and_score=_fit_and_score,
        add_options=_add_options,
        check_options=_check_options,
        needs_train=False,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_set_options(parser)
    parser.add_argument(
        "--num-images",
        type=int,
        default=10_000,
        metavar="N",
        help="images to look at; 0: all, which takes time by the square of their number; default: 10000",
    )
    parser.add_argument(
        "--num-alignment-images",
        type=int,
        default=512,
        metavar="N",
        help="of these, images to see in two crops; 0: none; default: 512",
    )
    parser.add_argument(
        "--duplicate-cosine",
        type=float,
        default=0.99,
        metavar="C",
        help="least cosine of two images that are listed as near-duplicates; default: 0.99",
    )
    parser.add_argument(
        "--num-neighbours", type=int, default=10, metavar="K", help="nearest neighbours to compare; default: 10"
    )


def _check_options(args: argparse.Namespace) -> None:
    refuse_other_sets(args)
    if args.num_images != 0 and args.num_images < 2:
        raise ConfigError(f"--num-images {args.num_images}: must be at least 2, or 0 for all")
    if args.num_alignment_images < 0:
        raise ConfigError(f"--num-alignment-images {args.num_alignment_images}: must be at least 0")
    if not -1 < args.duplicate_cosine <= 1:
        raise ConfigError(f"--duplicate-cosine {args.duplicate_cosine}: must be above -1 and at most 1")
    if args.num_neighbours < 1:
        raise ConfigError(f"--num-neighbours {args.num_neighbours}: must be at least 1")


def _fit_and_score(inputs: Inputs) -> Outcome:
    args, device = inputs.args, inputs.env.device
    sample = inputs.val.take(choose_images(len(inputs.val), at_most=args.num_images))
    if len(sample) < 2:
        raise DatasetError(f"{sample.name}: has only {len(sample)} image that can be read; health needs two")
    health = measure(sample.values, device=device, duplicate_cosine=args.duplicate_cosine, max_pairs=_MOST_PAIRS)
    scores = dict(health.scores)
    num_views = min(args.num_alignment_images, len(sample))
    if num_views:
        scores["alignment"] = _alignment(inputs, sample.places[choose_images(len(sample), at_most=num_views)])
    if not inputs.is_reference:
        other = _features_of_reference(inputs, sample) if args.compare_to else None
        if other is not None:
            scores["nn_overlap_pct"] = _overlap(sample, other, k=args.num_neighbours, device=device)
        _warn_of_pairs(health.pairs, sample, cosine=args.duplicate_cosine)
        on_main_first(_write_files, inputs, health, sample, other)
    return Outcome(
        predictions=None,
        named_scores=scores,
        table=format_table(
            scores,
            sample,
            num_images=len(inputs.val),
            num_duplicates=health.pairs.num_duplicates,
            are_listed=not inputs.is_reference,
        ),
        details={
            "n_images": len(sample),
            "n_dataset": len(inputs.val),
            "n_features": sample.values.shape[1],
            "n_alignment_images": num_views,
            "n_neighbours": args.num_neighbours,
            "duplicate_cosine": args.duplicate_cosine,
            "n_duplicate_pairs": health.pairs.num_duplicates,
        },
    )


def _alignment(inputs: Inputs, places: np.ndarray) -> float:
    """Look at some images in two views; these features are not kept."""
    cfg, device = inputs.cfg, inputs.env.device
    backbone = on_every_rank(
        lambda: load_frozen_backbone(cfg, inputs.weights, checkpoint_key=inputs.checkpoint_key, device=device)
    )
    images = on_every_rank(lambda: open_eval_dataset(cfg, inputs.val.name)).dataset
    views, _ = extract_features(
        TwoViews(PooledBackbone(backbone, inputs.val.pool)),
        Subset(images, places.tolist()),
        **vars(extraction_settings(cfg, device=device)),
    )
    return alignment(*views.chunk(2, dim=1))


def _features_of_reference(inputs: Inputs, sample: FeatureSet) -> FeatureSet:
    """Return the features of the sample by the weights of --compare-to."""
    args = inputs.args
    features = cached_features(
        inputs.cfg,
        weights=args.compare_to,
        checkpoint_key=args.compare_to_checkpoint_key or args.checkpoint_key,
        dataset=inputs.val.name,
        pool=inputs.val.pool,
        dtype=args.features_dtype,
        features_dir=args.features_dir or inputs.output_dir / "features",
        device=inputs.env.device,
        show_progress=True,
    )
    return features.take(np.isin(features.places, sample.places))


def _overlap(sample: FeatureSet, other: FeatureSet, *, k: int, device: torch.device) -> float:
    k = min(k, len(sample) - 1)
    one, two = (neighbours_within(part.values, num_neighbours=k, device=device) for part in (sample, other))
    return neighbour_overlap_pct(one, two)


def _warn_of_pairs(pairs: PairMeasures, sample: FeatureSet, *, cosine: float) -> None:
    share = pairs.num_duplicates / (len(sample) * (len(sample) - 1) / 2)
    if share > _MANY_PAIRS:
        logger.warning(
            "%.1f %% of all pairs of images have a cosine of at least %g: these are no duplicates, but features that "
            "hardly differ; raise --duplicate-cosine, and see feature_std",
            100 * share,
            cosine,
        )


def _write_files(inputs: Inputs, health: Health, sample: FeatureSet, other: FeatureSet | None) -> None:
    """Write the list of duplicates and the picture; for rank 0."""
    write_text(inputs.output_dir / DUPLICATES_NAME, duplicates_as_csv(health.pairs, sample))
    spectra = {inputs.weights: health.spectrum}
    if other is not None:
        spectra[f"{other.weights} (compared to)"] = singular_values(other.values, is_centred=True).numpy()
    shown = {name: spectrum for name, spectrum in spectra.items() if spectrum[0] > 0}
    if shown:
        plot_spectrum(shown, inputs.output_dir / SPECTRUM_NAME)


def duplicates_as_csv(pairs: PairMeasures, sample: FeatureSet) -> str:
    """List the pairs by path, or by place in the dataset where it knows no paths."""
    names = np.asarray(sample.columns["path"]) if "path" in sample.columns else sample.places
    lines = [
        [names[first], names[second], f"{min(cosine, 1.0):.6f}"]
        for (first, second), cosine in zip(pairs.duplicates, pairs.cosines, strict=True)
    ]
    return table_text(["first", "second", "cosine"], lines)


def format_table(
    scores: Mapping[str, float], sample: FeatureSet, *, num_images: int, num_duplicates: int, are_listed: bool
) -> str:
    """Lay the measures out for the screen, one line each."""
    lines = [
        f"features of {len(sample)} of {num_images} images of {sample.name}, {sample.values.shape[1]} features, "
        f"pool {sample.pool}"
    ]
    lines += [f"{_ABOUT[name][0]:>20}  {score:>9.4f}  {_ABOUT[name][1]}" for name, score in scores.items()]
    where = f", see {DUPLICATES_NAME}" * are_listed
    return "\n".join([*lines, f"{'near-duplicates':>20}  {num_duplicates:>9}  pairs of images{where}"])


if __name__ == "__main__":
    sys.exit(main())
