"""How much faster is logistic regression for 10 values of C at once than scikit-learn's one after the other?

Features are synthetic but as a vision transformer's: variances that fall as a power law along hidden axes, a mean far
from 0, classes that overlap. Both solvers get the same float64 features. scikit-learn's runs with its default tolerance
and with the parents', so that the accuracy that its time buys can be seen: the excess is the objective over the
smallest that any solver found. Scores are those of as many further images.

    python benchmarks/log_regression.py [--images 20000] [--features 768] [--classes 10] [--num-cs 10] [--threads N]
"""

import argparse
import json
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Reference
from torch.nn.functional import cross_entropy

from dinov2.eval.logistic import LogisticRegression

ROOT = Path(__file__).resolve().parent.parent
POWERS = (-6, 5)  # of ten: the parents' range of C
DTYPES = (torch.float64, torch.float32)  # of ours
MAX_ITER = 1000  # of scikit-learn's, as the parents'
TOLERANCES = (1e-4, 1e-12)  # of scikit-learn's gradient: its default, and the parents'


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


def ours(train: torch.Tensor, classes: torch.Tensor, cs: list[float], *, dtype: torch.dtype) -> tuple[float, list]:
    """Seconds, and (weight, bias, rounds) for each C."""
    start = time.perf_counter()
    num_classes = int(classes.max()) + 1
    regression = LogisticRegression(train, classes, num_classes=num_classes, dtype=dtype, device=torch.device("cpu"))
    fits = regression.fit(cs, max_rounds=MAX_ITER)
    return time.perf_counter() - start, [(fit.weight.numpy(), fit.bias.numpy(), fit.num_rounds) for fit in fits]


def theirs(train: torch.Tensor, classes: torch.Tensor, cs: list[float], *, tolerance: float) -> tuple[float, list]:
    """The same of scikit-learn."""
    values, targets = train.double().numpy(), classes.numpy()
    start = time.perf_counter()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in cs:
            fit = Reference(C=c, max_iter=MAX_ITER, tol=tolerance).fit(values, targets)
            found.append((fit.coef_, fit.intercept_, int(fit.n_iter_[0])))
    return time.perf_counter() - start, found


def main() -> None:
    """Measure and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20000, help="training images; default: 20000")
    parser.add_argument("--features", type=int, default=768, help="of an image; default: 768")
    parser.add_argument("--classes", type=int, default=10, help="default: 10")
    parser.add_argument("--num-cs", type=int, default=10, help="values of C from 1e-6 to 1e5; default: 10")
    parser.add_argument("--threads", type=int, help="of PyTorch and BLAS; default: all cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train, classes, test, test_classes = make_features(
        args.images, num_features=args.features, num_classes=args.classes
    )
    cs = (10 ** torch.linspace(*POWERS, args.num_cs, dtype=torch.float64)).tolist()
    ours(train[:500], classes[:500], cs[:2], dtype=torch.float64)  # warm up
    runs = {f"ours, {dtype}".replace("torch.", ""): ours(train, classes, cs, dtype=dtype) for dtype in DTYPES}
    runs |= {f"scikit-learn, tol={tol:g}": theirs(train, classes, cs, tolerance=tol) for tol in TOLERANCES}
    report(runs, cs, data=(train, classes, test, test_classes), args=args)


def report(runs: dict, cs: list[float], *, data: tuple[torch.Tensor, ...], args: argparse.Namespace) -> None:
    """Print what each solver reached for each C, and the times."""
    train, classes, test, test_classes = data
    objectives = {
        name: [objective(train, classes, c, weight=w, bias=b) for c, (w, b, _) in zip(cs, fits, strict=True)]
        for name, (_, fits) in runs.items()
    }
    scores = {
        name: [100 * np.mean((test.double().numpy() @ w.T + b).argmax(1) == test_classes.numpy()) for w, b, _ in fits]
        for name, (_, fits) in runs.items()
    }
    best = np.min(list(objectives.values()), axis=0)
    for name, (seconds, fits) in runs.items():
        print(f"{name}: {seconds:.1f} s")
        for place, c in enumerate(cs):
            excess = objectives[name][place] / best[place] - 1
            score = scores[name][place]
            print(f"  C={c:8.1e}  rounds {fits[place][2]:>5}  excess {excess:8.1e}  test top-1 % {score:6.2f}")
    base = next(iter(runs))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "seconds": {name: round(seconds, 2) for name, (seconds, _) in runs.items()},
        "times_faster": {name: round(seconds / runs[base][0], 1) for name, (seconds, _) in runs.items()},
        "max_score_difference": {
            name: round(float(np.abs(np.subtract(scores[name], scores[base])).max()), 3) for name in runs
        },
        "images": args.images,
        "features": args.features,
        "classes": args.classes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "commit": commit.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
