"""Mechanism-of-action accuracy on BBBC021 in the field's protocols: not the same compound (NSC), nor batch (NSCB).

    python eval/bbbc021.py --config-file F --pretrained-weights W --dataset BBBC021:root=bbbc021 --output-dir D
        [--normalize none --normalize whiten --normalize whiten,coral:batch]

Features of the fields of view are averaged to wells, and the median over the wells of a treatment (compound and
concentration) is its profile; with `--profiles plates` the wells of a treatment on one plate are averaged first. The
mechanism (MOA) of each treatment is that of the most similar profile (cosine) among the other compounds (NSC), and
among other compounds of other batches (NSCB; a batch is a week). DMSO is never classified nor compared; treatments
without a MOA are left out. Of the 103 treatments of BBBC021v1, 38 compounds and 12 MOAs, NSC scores all.

MOAs of one batch only can never be right in NSCB. As in the papers they are left out, as questions and as neighbours:
Cholesterol-lowering and Kinase inhibitors; 92 treatments and 10 MOAs remain. `--unanswerable count` keeps them, wrong.

Compounds of many batches: in BBBC021v1 taxol at 0.3 uM, the positive control of every plate. As in the code of Caicedo
et al., two treatments are of the same batch if they have the same set of batches, so that taxol may be compared with
treatments of any batch. `--many split` gives each batch of a treatment a profile of its own, which is compared with
other batches only; a treatment then counts with the share of its profiles that are right.

Scores: `nsc_top1_pct` and `nscb_top1_pct`, percent of the treatments (with `--many split` of their parts, and
`nscb_whole_top1_pct` of the treatments); `nsc_mean_per_compound_pct`, every compound counting alike; intervals by
resampling compounds.

Source: Ljosa et al. 2013, doi:10.1177/1087057113503553 (profiles and NSC; means of CellProfiler features: 83 %); Ando
et al. 2017, doi:10.1101/161422 (NSCB, typical-variation normalisation); Caicedo et al. 2018,
doi:10.1109/CVPR.2018.00970.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from dinov2.eval.options import pool_of, refuse_other_sets
from dinov2.eval.program import run_evaluation
from dinov2.eval.protocol_forms import NSC, NSCB, PLATES, TREATMENTS, WELLS
from dinov2.eval.protocols import Variant, add_profile_options, score_variants, variants_of

_LEVELS = {"wells": (WELLS, TREATMENTS), "plates": (WELLS, PLATES, TREATMENTS)}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name="bbbc021",
        description="Mechanism-of-action accuracy on BBBC021: treatments by the most similar one of another compound "
        "(NSC), and of another batch, too (NSCB).",
        add_options=_add_options,
        check_options=_check_options,
        pool_of=pool_of,
        fit_and_score=lambda inputs: score_variants(inputs, _variants(inputs.args), rows="treatments"),
        needs_train=False,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_profile_options(parser)
    parser.add_argument(
        "--profiles",
        choices=tuple(_LEVELS),
        default="wells",
        help="whose median is the profile of a treatment: its wells, or the means of its wells on each plate; default: "
        "wells",
    )
    parser.add_argument(
        "--many",
        choices=("same", "split"),
        default="same",
        help="treatments of many batches: the same batch as those with the same set of batches, or split into one "
        "profile a batch; default: same",
    )
    parser.add_argument(
        "--unanswerable",
        choices=("drop", "count"),
        default="drop",
        help="mechanisms that can never be right, as those of one batch in NSCB: left out, or counted as wrong; "
        "default: drop",
    )


def _check_options(args: argparse.Namespace) -> None:
    refuse_other_sets(args)
    _variants(args)


def _variants(args: argparse.Namespace) -> list[Variant]:
    protocols = [
        replace(protocol, aggregate=_LEVELS[args.profiles], many=args.many, unanswerable=args.unanswerable)
        for protocol in (NSC, NSCB)
    ]
    return variants_of(protocols, args.normalize)


if __name__ == "__main__":
    sys.exit(main())
