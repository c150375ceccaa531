"""Logistic regression on frozen features, its strength C chosen on images that are not reported.

    python eval/log_regression.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S
                                  --output-dir D [--test-dataset S] [key=value ...]

As in the parents: features as they are, L2 penalty, 45 values of C from 1e-6 to 1e5, at most 1000 rounds; the chosen C
is then fitted again on all that is not reported. Different from them: what chooses is a fifth of the training set by
the hash of groups, not a random tenth; and the solver, see `dinov2.eval.logistic`.

All values of C are fitted in few groups, dealt to the ranks; a group does not depend on their number. So the scores do
not depend on the number of processes, nor on the order of the files: a fit ends about a ten-millionth of
its objective from the minimum, where hardly an image is left that changes its class.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_first
from dinov2.errors import ConfigError
from dinov2.eval.classifier_sets import METRICS, ClassifierSets, join, make_classifier_sets, predict, right_pct
from dinov2.eval.linear_head import HeadDescription, from_fit
from dinov2.eval.logistic import LogisticFit, LogisticRegression, group_cs
from dinov2.eval.options import add_pool_option, pool_of
from dinov2.eval.program import Inputs, Outcome, run_evaluation

logger = logging.getLogger(__name__)

NAME = "log_regression"
C_POWERS = (-6.0, 5.0, 45)  # first and last power of ten, and how many values in even steps
MAX_ROUNDS = 1000
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name=NAME,
        description="Logistic regression on the features of a frozen backbone.",
        pool_of=pool_of,
        fit_and_score=_fit_and_score,
        add_options=_add_options,
        check_options=_check_options,
    )


def default_cs() -> list[float]:
    """Return the parents' values of C."""
    first, last, count = C_POWERS
    return (10 ** torch.linspace(first, last, count, dtype=torch.float64)).tolist()


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_pool_option(parser)
    parser.add_argument(
        "--c-values",
        nargs="+",
        type=float,
        metavar="C",
        help="strengths to choose from, > 0, larger is weaker; one: nothing is chosen; default: 45 from 1e-6 to 1e5",
    )
    parser.add_argument(
        "--finetune-dataset-str",
        metavar="S",
        help="the parents' name for images to choose C on: --val-dataset is then what --test-dataset is else",
    )
    parser.add_argument(
        "--metric-type",
        choices=METRICS,
        default=METRICS[0],
        help="what chooses C; the second counts each class alike; default: mean_accuracy",
    )
    parser.add_argument(
        "--max-train-iters",
        type=int,
        default=MAX_ROUNDS,
        metavar="N",
        help=f"evaluations of the objective for each C, at most; default: {MAX_ROUNDS}",
    )
    parser.add_argument(
        "--train-dtype",
        choices=tuple(_DTYPES),
        default="float32",
        help="numbers of the passes over the features; float64 takes twice the time; default: float32",
    )


def _check_options(args: argparse.Namespace) -> None:
    cs = args.c_values
    if cs is not None and not all(0 < c < float("inf") for c in cs):
        raise ConfigError(f"--c-values {' '.join(f'{c:g}' for c in cs)}: each must be above 0 and finite")
    if args.max_train_iters < 1:
        raise ConfigError(f"--max-train-iters {args.max_train_iters}: must be at least 1")
    if args.finetune_dataset_str and args.test_dataset:
        raise ConfigError("--finetune-dataset-str and --test-dataset say the same in two ways; give one of them")
    if args.finetune_dataset_str:
        args.val_dataset, args.test_dataset = args.finetune_dataset_str, args.val_dataset


def _fit_and_score(inputs: Inputs) -> Outcome:
    args = inputs.args
    cs = sorted(set(args.c_values or default_cs()))
    sets = make_classifier_sets(
        inputs.train, inputs.val, inputs.test, has_choice=len(cs) > 1, logs_notes=not inputs.is_reference
    )
    settings = {"max_rounds": args.max_train_iters, "dtype": _DTYPES[args.train_dtype], "device": inputs.env.device}
    sweep = _sweep(sets, cs, metric=args.metric_type, **settings) if len(cs) > 1 else []
    best = max(sweep, key=lambda entry: entry["choosing_pct"])["c"] if sweep else cs[0]  # the smallest of equals
    if args.max_train_iters > 1:
        _warn_of_unfinished([entry["c"] for entry in sweep if not entry["has_converged"]], args.max_train_iters)
    fit = on_main_first(lambda: _fit(sets, best, **settings))
    description = HeadDescription(
        class_names=sets.class_names,
        pool=inputs.train.pool,
        weights=inputs.weights,
        checkpoint_key=inputs.checkpoint_key,
        train_dataset=inputs.train.name,
    )
    head = from_fit(fit.weight, fit.bias, description)
    if inputs.env.rank == 0 and not inputs.is_reference:
        head.save(inputs.output_dir / f"classifier_{NAME}.safetensors")
    return Outcome(
        predictions=sets.predictions(fit.logits(sets.report.values())),
        table=_format_table(sets, sweep, fit),
        details={
            "best_c": best,
            "chosen_on": sets.description if sweep else "nothing: one value of C is given",
            "metric_type": args.metric_type,
            "has_converged": fit.has_converged,
            "sweep": sweep,
            "train_dtype": args.train_dtype,
        },
    )


def _sweep(
    sets: ClassifierSets, cs: Sequence[float], *, metric: str, max_rounds: int, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """Fit every C and score it on the images that choose; the same on every rank, by rising C."""
    groups = group_cs(cs, num_classes=sets.num_classes)[get_rank() :: get_world_size()]
    entries = []
    if groups:
        values, targets = join([sets.fit])
        regression = LogisticRegression(values, targets, num_classes=sets.num_classes, dtype=dtype, device=device)
        choosing, answers = sets.choose.values(), sets.choose.targets
        for fit in [fit for group in groups for fit in regression.fit(group, max_rounds=max_rounds)]:
            entries.append(
                {
                    "c": fit.c,
                    "choosing_pct": right_pct(predict(fit.logits(choosing)), answers, metric=metric),
                    "num_rounds": fit.num_rounds,
                    "has_converged": fit.has_converged,
                }
            )
    return sorted((entry for part in all_gather_objects(entries) for entry in part), key=lambda entry: entry["c"])


def _fit(sets: ClassifierSets, c: float, *, max_rounds: int, dtype: torch.dtype, device: torch.device) -> LogisticFit:
    """Fit one C on everything that is not reported."""
    values, targets = join([sets.train, sets.choose] if sets.has_test else [sets.train])
    regression = LogisticRegression(values, targets, num_classes=sets.num_classes, dtype=dtype, device=device)
    return regression.fit([c], max_rounds=max_rounds)[0]


def _warn_of_unfinished(cs: Sequence[float], max_rounds: int) -> None:
    if cs and get_rank() == 0:
        logger.warning(
            "logistic regression: %d values of C, from %.3g to %.3g, had not converged after %d rounds; their scores "
            "are those of an unfinished fit; raise --max-train-iters",
            len(cs),
            min(cs),
            max(cs),
            max_rounds,
        )


def _format_table(sets: ClassifierSets, sweep: Sequence[dict], fit: LogisticFit) -> str:
    lines = [f"logistic regression on {len(sets.train)} training images, {sets.num_classes} classes, C={fit.c:.3g}"]
    if sweep:
        score = next(entry["choosing_pct"] for entry in sweep if entry["c"] == fit.c)
        lines.append(f"C chosen of {len(sweep)} by {score:.2f} % on {sets.description}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
