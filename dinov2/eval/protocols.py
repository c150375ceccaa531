"""Protocol scores: each image, well or treatment is classified by those that it may be compared with.

    python eval/protocols.py --config-file F --pretrained-weights W --dataset S --output-dir D
        --protocol leave-one-group-out:column=plate [--protocol nscb] [--normalize whiten,coral:batch]

For data that come in plates, slides, patients or parts: images of one group look alike for reasons that have nothing to
do with their labels, so a group must not be scored by itself. How a protocol is written stands in
`dinov2.eval.protocol_forms`, the steps of normalisation in `dinov2.eval.profile_normalization`.

Every protocol and normalisation has scores under a prefix of its own, and a table `predictions_protocols_PREFIX.csv`
with the profile most similar to each.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dinov2.errors import ConfigError
from dinov2.eval.options import add_set_options, pool_of, refuse_other_sets
from dinov2.eval.profile_normalization import Step, parse_steps
from dinov2.eval.program import Inputs, Outcome, run_evaluation
from dinov2.eval.protocol_forms import Protocol, parse_protocol
from dinov2.eval.protocol_scores import Scored, details_of, score_protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One protocol with one normalisation, and the prefix of its scores."""

    prefix: str
    protocol: Protocol
    normalization: tuple[Step, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name="protocols",
        description="Accuracy where images of one plate, slide, patient or compound are not compared with each other.",
        add_options=_add_options,
        check_options=_check_options,
        pool_of=pool_of,
        fit_and_score=lambda inputs: score_variants(
            inputs, variants_of(inputs.args.protocol, inputs.args.normalize), rows="profiles"
        ),
        needs_train=False,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_profile_options(parser)
    parser.add_argument(
        "--protocol",
        action="append",
        metavar="P",
        help="what is compared with what: nsc, nscb, leave-one-group-out:column=plate, free, with key=value behind "
        "colons; may be given several times; must be given",
    )


def _check_options(args: argparse.Namespace) -> None:
    refuse_other_sets(args)
    variants_of(args.protocol, args.normalize)


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all programs of profiles share."""
    add_set_options(parser)
    parser.add_argument(
        "--normalize",
        action="append",
        metavar="STEPS",
        help="steps fitted on the controls, with commas: center[:COLUMN], standardize[:COLUMN], whiten[:EPSILON], "
        "coral:COLUMN, pca:N; may be given several times, also as none, to compare; default: none",
    )


def variants_of(protocols: Sequence[str | Protocol] | None, normalizations: Sequence[str] | None) -> list[Variant]:
    """Pair every protocol with every normalisation.

    Args:
        protocols: as they stand on the command line, or read already.
        normalizations: as they stand on the command line; None: none.

    Raises:
        ConfigError: one is wrong, none is given, or two are the same.
    """
    if not protocols:
        raise ConfigError("--protocol is not given; name one, e.g. leave-one-group-out:column=plate")
    variants = []
    for protocol in protocols:
        text = protocol if isinstance(protocol, str) else protocol.name
        form = parse_protocol(protocol) if isinstance(protocol, str) else protocol
        for steps in normalizations or ["none"]:
            prefix = re.sub(r"\W+", "_", text if steps == "none" else f"{text}_{steps}").strip("_")
            variants.append(Variant(prefix, form, parse_steps(steps)))
    prefixes = [variant.prefix for variant in variants]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise ConfigError(f"two protocols or normalisations are called {prefix}; give each once")
    return variants


def score_variants(inputs: Inputs, variants: Sequence[Variant], *, rows: str) -> Outcome:
    """Score all variants; called by all ranks.

    Args:
        inputs: features of the images are `val`.
        variants: at least one.
        rows: what the profiles are, plural, for the screen.
    """
    scored: dict[str, Scored] = {}
    for variant in variants:
        scored[variant.prefix] = score_protocol(
            inputs.val, variant.protocol, normalization=variant.normalization, device=inputs.env.device
        )
    notes = [] if inputs.is_reference else [note for one in scored.values() for note in one.notes]
    for note in dict.fromkeys(notes):
        logger.warning("%s", note)
    named = {}
    for prefix, one in scored.items():
        if one.num_wholes < len(one.profiles):
            named[f"{prefix}_whole_top1_pct"] = one.accuracy_pct()  # `top1_pct` is that of the parts
        for column in one.protocol.exclude:
            values = [accuracy for _, accuracy in one.accuracy_by(column).values()]
            named[f"{prefix}_mean_per_{column}_pct"] = sum(values) / len(values)
    return Outcome(
        predictions=None,
        further={prefix: one.predictions(rows=rows) for prefix, one in scored.items()},
        named_scores=named,
        table=format_table(scored, variants),
        details={
            "protocols": {
                variant.prefix: {
                    **details_of(scored[variant.prefix]),
                    "normalization": ",".join(map(str, variant.normalization)) or "none",
                }
                for variant in variants
            }
        },
    )


def format_table(scored: Mapping[str, Scored], variants: Sequence[Variant]) -> str:
    """Lay the accuracies out for the screen, one line for each variant."""
    width = max(len(variant.prefix) for variant in variants)
    lines = [
        f"{'protocol':>{width}}  {'profiles':>8}  {'labels':>6}  {'left out':>8}  {'top-1 %':>8}  mean per group %",
    ]
    for prefix, one in scored.items():
        means = []
        for column in one.protocol.exclude:
            values = [accuracy for _, accuracy in one.accuracy_by(column).values()]
            means.append(f"{column} {sum(values) / len(values):.2f} ({len(values)})")
        lines.append(
            f"{prefix:>{width}}  {one.num_wholes:>8}  {len(one.class_names):>6}  {len(one.left_out):>8}  "
            f"{one.accuracy_pct():>8.2f}  {', '.join(means)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
