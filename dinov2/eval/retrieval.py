"""Retrieval: the most similar images of every image, and how often they have its label.

    python eval/retrieval.py --config-file F --pretrained-weights W --dataset S --output-dir D [--exclude-group plate]
    python eval/retrieval.py ... --train-dataset GALLERY --val-dataset QUERIES

One set against itself, or queries against a gallery. With --exclude-group, images of the query's own part, slide or
plate are not searched: they are near for reasons that have nothing to do with the label. Without labels there are hits
and no scores. What recall at k, mAP and R-precision are, exactly, stands in `dinov2.eval.retrieval_scores`.

Files: `results_eval_retrieval.json`, `hits_retrieval.csv` (a line a hit), `retrieval.png` (some queries with hits).
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import numpy as np

from dinov2.checkpoint_format import write_text
from dinov2.errors import ConfigError
from dinov2.eval.build import open_eval_dataset
from dinov2.eval.columns import TARGET
from dinov2.eval.options import add_set_options, pool_of, refuse_other_sets
from dinov2.eval.predictions import Measurements
from dinov2.eval.program import Inputs, Outcome, run_evaluation
from dinov2.eval.results import table_text
from dinov2.eval.retrieval_scores import Retrieved, retrieve
from dinov2.eval.retrieval_sheet import path_of, write_sheet

logger = logging.getLogger(__name__)

HITS_NAME, SHEET_NAME = "hits_retrieval.csv", "retrieval.png"
_NUM_SHOWN = 8  # hits of a query on the sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name="retrieval",
        description="Most similar images of every image: recall at k, mAP, and a sheet of queries and hits.",
        add_options=_add_options,
        check_options=_check_options,
        pool_of=pool_of,
        fit_and_score=_fit_and_score,
        needs_train=False,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_set_options(parser)
    parser.add_argument(
        "--exclude-group",
        metavar="COLUMNS",
        help="columns of the metadata, with commas: images with an equal value in one are not compared, e.g. group, "
        "plate; default: none",
    )
    parser.add_argument(
        "--label", default=TARGET, metavar="COLUMN", help="what makes a hit right; default: the labels of the dataset"
    )
    parser.add_argument("--ks", default="1,5,10", metavar="K,K", help="of recall at k, with commas; default: 1,5,10")
    parser.add_argument(
        "--num-hits", type=int, default=10, metavar="N", help=f"hits of each query in {HITS_NAME}; default: 10"
    )
    parser.add_argument(
        "--num-sheet-queries", type=int, default=10, metavar="N", help=f"rows of {SHEET_NAME}; 0: none; default: 10"
    )


def _check_options(args: argparse.Namespace) -> None:
    refuse_other_sets(args, may_train=True)
    _ks(args)
    _excluded(args)
    if args.num_hits < 1:
        raise ConfigError(f"--num-hits {args.num_hits}: must be at least 1")
    if args.num_sheet_queries < 0:
        raise ConfigError(f"--num-sheet-queries {args.num_sheet_queries}: must be at least 0")


def _ks(args: argparse.Namespace) -> list[int]:
    try:
        ks = sorted({int(text) for text in args.ks.split(",")})
    except ValueError:
        ks = []
    if not ks or ks[0] < 1:
        raise ConfigError(f"--ks {args.ks}: must be whole numbers of at least 1 with commas, e.g. 1,5,10")
    return ks


def _excluded(args: argparse.Namespace) -> list[str]:
    columns = [] if args.exclude_group is None else [name.strip() for name in args.exclude_group.split(",")]
    if not all(columns):
        raise ConfigError(f"--exclude-group {args.exclude_group!r}: a name is empty; write e.g. plate or slide,patient")
    return columns


def _fit_and_score(inputs: Inputs) -> Outcome:
    args, ks = inputs.args, _ks(inputs.args)
    is_one = inputs.train.name == inputs.val.name
    retrieved = retrieve(
        inputs.val,
        inputs.val if is_one else inputs.train,
        label=args.label,
        exclude=_excluded(args),
        num_hits=args.num_hits,
        device=inputs.env.device,
    )
    if not inputs.is_reference:
        for note in retrieved.notes:
            logger.warning("%s", note)
        if inputs.env.rank == 0:
            write_text(inputs.output_dir / HITS_NAME, hits_as_csv(retrieved))
            if args.num_sheet_queries:
                _write_sheet(inputs, retrieved)
    has_labels = retrieved.query_labels is not None
    return Outcome(
        predictions=None,
        measurements=_measurements(retrieved, ks) if has_labels else None,
        named_scores={name: score for name, score in retrieved.scores(ks).items() if name not in retrieved.values(ks)},
        table=format_table(retrieved, ks),
        details={
            "n_queries": len(retrieved.queries),
            "n_queries_scored": int(retrieved.has_relevant.sum()),
            "n_gallery": len(retrieved.gallery),
            "label": args.label,
            "exclude_group": _excluded(args),
            "notes": list(retrieved.notes),
        },
    )


def _measurements(retrieved: Retrieved, ks: Sequence[int]) -> Measurements:
    queries = retrieved.queries
    return Measurements(
        name=queries.name,
        values=retrieved.values(ks),
        places=queries.places,
        groups=queries.group_numbers(),
        paths=None if "path" not in queries.columns else np.asarray(queries.columns["path"]).astype(str),
        rows="queries",
    )


def _write_sheet(inputs: Inputs, retrieved: Retrieved) -> None:
    """Open the images again, as they are stored, and draw some."""
    queries, gallery = (
        open_eval_dataset(inputs.cfg, features.name).dataset for features in (retrieved.queries, retrieved.gallery)
    )
    write_sheet(
        retrieved,
        inputs.output_dir / SHEET_NAME,
        queries=queries,
        gallery=gallery,
        num_queries=inputs.args.num_sheet_queries,
        num_shown=min(inputs.args.num_hits, _NUM_SHOWN),
        heading=f"{retrieved.queries.name}, features of {inputs.weights}",
    )


def format_table(retrieved: Retrieved, ks: Sequence[int]) -> str:
    """Say what was searched, and the score that has no interval; the skeleton adds the others."""
    num_scored = int(retrieved.has_relevant.sum())
    lines = [f"retrieval of {len(retrieved.queries)} queries in a gallery of {len(retrieved.gallery)}"]
    if retrieved.query_labels is not None:
        lines[0] += f", {num_scored} of them scored"
        lines.append(f"map_mean_per_class_pct           {retrieved.scores(ks)['map_mean_per_class_pct']:>6.2f}")
    return "\n".join(lines)


def hits_as_csv(retrieved: Retrieved) -> str:
    """Write a line for each hit of each query."""
    lines = []
    is_right = retrieved.is_relevant()
    has_labels = retrieved.query_labels is not None
    paths = [path_of(retrieved.gallery, row) for row in range(len(retrieved.gallery))]
    for query, hits in enumerate(retrieved.hits):
        own = [path_of(retrieved.queries, query), retrieved.query_labels[query] if has_labels else ""]
        for rank, hit in enumerate(hits[hits >= 0]):
            label = retrieved.gallery_labels[hit] if has_labels else ""
            similarity = f"{retrieved.similarities[query, rank]:.6f}"
            right = int(is_right[query, rank]) if has_labels else ""
            lines.append([*own, rank + 1, paths[hit], label, similarity, right])
    return table_text(["query", "query_label", "rank", "hit", "hit_label", "similarity", "right"], lines)


if __name__ == "__main__":
    sys.exit(main())
