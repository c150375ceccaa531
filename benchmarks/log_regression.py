"""How much faster is logistic regression for 10 values of C at once than scikit-learn's one after the other?

Features are synthetic but as a vision transformer's: variances that fall as a power law along hidden axes, a mean far
from 0, classes that overlap. scikit-learn's L-BFGS runs with its default tolerance, on float64 and on float32 features,
and with the parents' tolerance on some values of C only, because that takes minutes. So that the accuracy that the time
buys can be seen, each fit's excess is its objective over the smallest that any solver found, and its score, on as many
further images, is held against that of our own fit in float64 at a tolerance of 1e-12.

Solvers take turns, `--repeats` times; seconds are medians. CPU seconds are those of all threads: where other programs
share the machine, they say more than the clock.

    python benchmarks/log_regression.py [--images 20000] [--features 768] [--classes 10] [--num-cs 10] [--threads 2]
                                        [--repeats 3] [--tight-cs 4] [--newton]
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Reference
from threadpoolctl import threadpool_limits
from torch.nn.functional import cross_entropy

from dinov2.eval.logistic import TOLERANCE as OUR_TOLERANCE
from dinov2.eval.logistic import LogisticRegression

ROOT = Path(__file__).resolve().parent.parent
POWERS = (-6, 5)  # of ten: the parents' range of C
MAX_ITER = 1000  # of scikit-learn's, as the parents'
TOLERANCE, TIGHT = 1e-4, 1e-12  # of scikit-learn's gradient: its default, and the parents'
NEWTON_TOLERANCE = 1e-8  # of scikit-learn's solver that needs no more than a few steps
REFERENCE, OURS = "reference", "ours, float32"
REFERENCE_TOLERANCE = 1e-12  # of our own


@dataclass
class Runs:
    """What one solver did."""

    cs: list[float]
    solve: Callable[[], list]  # (weight, bias, rounds) for each C
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    fits: list = field(default_factory=list)

    def run(self) -> None:
        """Fit all C once."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.fits = self.solve()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)


def make_features(num_images: int, *, num_features: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Draw training features [n, D], their classes [n], and as many for testing."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, num_features + 1) ** -0.5
    axes = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    centres = 0.15 * rng.standard_normal((num_classes, num_features)) * deviations
    mean = rng.standard_normal(num_features)
    found = []
    for _ in range(2):
        classes = rng.integers(0, num_classes, num_images)
        spread = rng.standard_normal((num_images, num_features)) * deviations
        values = (spread + centres[classes]) @ axes * np.sqrt(num_features / (deviations**2).sum()) + mean
        found += [torch.from_numpy(values.astype(np.float32)), torch.from_numpy(classes)]
    return tuple(found)


def objective(values: torch.Tensor, classes: torch.Tensor, c: float, *, weight: np.ndarray, bias: np.ndarray) -> float:
    """Of one image, in nats."""
    logits = values.double() @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    return (cross_entropy(logits, classes) + (weight**2).sum() / (2 * c * len(values))).item()


def ours(
    train: torch.Tensor, classes: torch.Tensor, cs: list[float], *, dtype: torch.dtype, tolerance: float = OUR_TOLERANCE
) -> list:
    """Fit all C together."""
    num_classes = int(classes.max()) + 1
    regression = LogisticRegression(train, classes, num_classes=num_classes, dtype=dtype, device=torch.device("cpu"))
    fits = regression.fit(cs, max_rounds=MAX_ITER, tolerance=tolerance)
    return [(fit.weight.numpy(), fit.bias.numpy(), fit.num_rounds) for fit in fits]


def theirs(
    values: np.ndarray, classes: torch.Tensor, cs: list[float], *, tolerance: float, solver: str = "lbfgs"
) -> list:
    """Fit each C with scikit-learn, in the type of the features."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in cs:
            fit = Reference(C=c, max_iter=MAX_ITER, tol=tolerance, solver=solver).fit(values, classes.numpy())
            found.append((fit.coef_.astype(np.float64), fit.intercept_.astype(np.float64), int(fit.n_iter_[0])))
    return found


def main() -> None:
    """Measure and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20000, help="training images; default: 20000")
    parser.add_argument("--features", type=int, default=768, help="of an image; default: 768")
    parser.add_argument("--classes", type=int, default=10, help="at least 3; default: 10")
    parser.add_argument("--num-cs", type=int, default=10, help="values of C from 1e-6 to 1e5; default: 10")
    parser.add_argument("--threads", type=int, default=2, help="of every solver; default: 2")
    parser.add_argument("--repeats", type=int, default=3, help="of ours and of scikit-learn's default; default: 3")
    parser.add_argument("--tight-cs", type=int, default=4, help="values of C with scikit-learn's 1e-12; default: 4")
    parser.add_argument(
        "--newton", action="store_true", help="also scikit-learn's exact solver; minutes a C above some 200 features"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Run every solver, and report."""
    data = make_features(args.images, num_features=args.features, num_classes=args.classes)
    train, classes = data[:2]
    wide, narrow = train.double().numpy(), train.numpy()
    cs = (10 ** torch.linspace(*POWERS, args.num_cs, dtype=torch.float64)).tolist()
    tight_cs = [cs[place] for place in np.linspace(0, len(cs) - 1, args.tight_cs).round().astype(int)]
    runs = {
        OURS: Runs(cs, lambda: ours(train, classes, cs, dtype=torch.float32)),
        "scikit-learn, float64": Runs(cs, lambda: theirs(wide, classes, cs, tolerance=TOLERANCE)),
        "scikit-learn, float32": Runs(cs, lambda: theirs(narrow, classes, cs, tolerance=TOLERANCE)),
    }
    once = {
        "ours, float64": Runs(cs, lambda: ours(train, classes, cs, dtype=torch.float64)),
        REFERENCE: Runs(cs, lambda: ours(train, classes, cs, dtype=torch.float64, tolerance=REFERENCE_TOLERANCE)),
    }
    if tight_cs:
        once["scikit-learn, float64, 1e-12"] = Runs(tight_cs, lambda: theirs(wide, classes, tight_cs, tolerance=TIGHT))
    if args.newton:
        newton = Runs(cs, lambda: theirs(wide, classes, cs, tolerance=NEWTON_TOLERANCE, solver="newton-cholesky"))
        once["scikit-learn, float64, Newton"] = newton
    ours(train[:500], classes[:500], cs[:2], dtype=torch.float32)  # warm up
    theirs(narrow[:500], classes[:500], cs[:2], tolerance=TOLERANCE)
    for name, solver in [*runs.items()] * args.repeats + [*once.items()]:
        solver.run()
        print(f"{name}: {solver.seconds[-1]:.1f} s, {solver.cpu_seconds[-1]:.1f} CPU s", file=sys.stderr, flush=True)
    report(runs | once, cs, data=data, args=args)


def report(runs: dict[str, Runs], cs: list[float], *, data: tuple[torch.Tensor, ...], args: argparse.Namespace) -> None:
    """Print what each solver reached for each C, and the times."""
    train, classes, test, test_classes = data
    test_values, answers = test.double().numpy(), test_classes.numpy()
    objectives, scores = {}, {}
    for name, solver in runs.items():
        for c, (weight, bias, _) in zip(solver.cs, solver.fits, strict=True):
            objectives[name, c] = objective(train, classes, c, weight=weight, bias=bias)
            scores[name, c] = 100 * np.mean((test_values @ weight.T + bias).argmax(1) == answers)
    best = {c: min(value for (_, other), value in objectives.items() if other == c) for c in cs}
    result = {}
    for name, solver in runs.items():
        print(f"{name}: {np.median(solver.seconds):.1f} s, {np.median(solver.cpu_seconds):.1f} CPU s")
        for c, (_, _, rounds) in zip(solver.cs, solver.fits, strict=True):
            excess = objectives[name, c] / best[c] - 1
            print(f"  C={c:8.1e}  rounds {rounds:>5}  excess {excess:8.1e}  test top-1 % {scores[name, c]:7.3f}")
        clocks = [np.median(solver.seconds), np.median(solver.cpu_seconds)]
        base = [np.median(runs[OURS].seconds), np.median(runs[OURS].cpu_seconds)]
        result[name] = {
            "num_cs": len(solver.cs),
            "seconds": [round(value, 2) for value in solver.seconds],
            "cpu_seconds": [round(value, 2) for value in solver.cpu_seconds],
            "times_ours": [round(float(value), 2) for value in np.divide(clocks, base)],  # by clock, by CPU seconds
            "max_excess": float(f"{max(objectives[name, c] / best[c] - 1 for c in solver.cs):.2e}"),
            "max_score_difference": round(max(abs(scores[name, c] - scores[REFERENCE, c]) for c in solver.cs), 3),
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    about = {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "commit": commit.strip()}
    print(json.dumps({"solvers": result, **vars(args), "load": os.getloadavg(), **about}))


if __name__ == "__main__":
    main()
