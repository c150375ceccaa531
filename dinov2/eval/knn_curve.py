"""How k-NN accuracy and the label-free measures went over the training of a run, or of several side by side.

    python eval/knn_curve.py runs/first [runs/second ...] --output knn_curve.png

Read from the evaluations in `<run>/eval/` (before the first step, and after steps since) and from
`<run>/training_metrics.json`; works while the run goes on.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.picture_program import require_png
from dinov2.logging import run_program
from dinov2.logging.curves import Curve, draw_curves, draw_panels, title_of
from dinov2.logging.history import METRICS_NAME, History

_MEASURES = ("rankme", "effective_rank", "uniformity", "alignment", "nn_overlap_with_start_pct")
_FILES = ("results_eval_knn.json", "results_eval_health.json")
_START = "start"
_AFTER = re.compile(r"training_(\d+)")
_MOST_RUNS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def read_scores(run: str | Path) -> dict[str, dict[int, float]]:
    """Read the k-NN scores and label-free measures of a run.

    Args:
        run: folder of the run.

    Returns:
        Name of the score to its values by number of steps done, rising; 0 is before the first step.

    Raises:
        DatasetError: the run has no evaluations, or a file of them cannot be read.
    """
    run = Path(run).expanduser()
    found: dict[str, dict[int, float]] = {}
    if (run / METRICS_NAME).is_file():
        history = History.load(run)
        for name in filter(_is_shown, history.names()):
            iterations, values = history.get_metric(name)
            found[name] = dict(zip((iterations + 1).tolist(), values.tolist(), strict=True))
    for folder in sorted((run / "eval").glob("*/")):
        match = _AFTER.fullmatch(folder.name)
        if folder.name != _START and match is None:
            continue
        step = 0 if match is None else int(match[1]) + 1
        for name, value in _read_results(folder).items():
            found.setdefault(name, {})[step] = value
    if not found:
        raise DatasetError(
            f"{run}: holds no evaluations of a run; name a folder with {METRICS_NAME} or eval/, of a training with "
            "evaluation.eval_period_iterations above 0"
        )
    accuracies = sorted((name for name in found if name.startswith("knn")), key=lambda name: (len(name), name))
    order = [*accuracies, *_MEASURES]
    return {name: dict(sorted(found[name].items())) for name in order if name in found}


def plot_knn_curve(runs: Sequence[str | Path], png_path: str | Path) -> list[dict[str, dict[int, float]]]:
    """Draw k-NN accuracy and label-free measures over the steps of training.

    Args:
        runs: folders; of one, scores that belong together share a panel; of several, each score has a panel with a
            line for each run.
        png_path: picture to write; its folder is made if needed.

    Returns:
        The scores of each run, see `read_scores`.

    Raises:
        DatasetError: a run has no evaluations.
        ConfigError: the picture cannot be written.
    """
    png_path = Path(png_path).expanduser()
    scores = [read_scores(run) for run in runs]
    try:
        png_path.parent.mkdir(parents=True, exist_ok=True)
        if len(runs) == 1:
            draw_curves({name: _curve(values) for name, values in scores[0].items()}, png_path)
        else:
            draw_panels(_panels([Path(run) for run in runs], scores), png_path)
    except OSError as error:
        raise ConfigError(f"--output {png_path}: cannot be written ({error.strerror}); choose another") from error
    return scores


def format_scores(scores: Mapping[str, Mapping[int, float]]) -> str:
    """Lay the scores of a run out for the screen, a line for each evaluation."""
    steps = sorted({step for values in scores.values() for step in values})
    widths = {name: max(len(name), 10) for name in scores}
    lines = [" ".join([f"{'step':>9}", *(f"{name:>{width}}" for name, width in widths.items())])]
    for step in steps:
        cells = [
            f"{scores[name][step]:>{width}.2f}" if step in scores[name] else " " * (width - 1) + "-"
            for name, width in widths.items()
        ]
        lines.append(" ".join([f"{step or 'start':>9}", *cells]))
    return "\n".join(lines)


def _is_shown(name: str) -> bool:
    return name.startswith("knn") or name in _MEASURES


def _read_results(folder: Path) -> dict[str, float]:
    """Read the scores of one evaluation."""
    scores: dict[str, float] = {}
    for path in (folder / name for name in _FILES):
        if not path.is_file():
            continue
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot be read as results of an evaluation ({error})") from error
        scores |= {name: value for name, value in results.items() if _is_shown(name) and isinstance(value, int | float)}
    return scores


def _curve(values: Mapping[int, float]) -> Curve:
    return np.array(list(values)), np.array(list(values.values()), dtype=float)


def _panels(runs: Sequence[Path], scores: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[str, Curve]]:
    """Give each score a panel with a line for each run that has it."""
    names = dict.fromkeys(name for values in scores for name in values)
    short = [run.resolve().name for run in runs]
    shown = short if len(set(short)) == len(short) else [str(run) for run in runs]
    return {
        title_of(name): {
            label: _curve(values[name]) for label, values in zip(shown, scores, strict=True) if name in values
        }
        for name in names
    }


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="knn_curve.py", description="k-NN accuracy and label-free measures over the training of runs, as curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training; several are compared")
    parser.add_argument("--output", metavar="PNG", help="picture; default: knn_curve.png in the first run's folder")
    args = parser.parse_args(argv)
    if len(args.runs) > _MOST_RUNS or len({Path(run).resolve() for run in args.runs}) < len(args.runs):
        raise ConfigError(f"{' '.join(args.runs)}: must be at most {_MOST_RUNS} runs, each once")
    output = Path(args.output or Path(args.runs[0]) / "knn_curve.png")
    require_png(output)
    scores = plot_knn_curve(args.runs, output)
    for run, values in zip(args.runs, scores, strict=True):
        print(f"{run}\n{format_scores(values)}\n")
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
