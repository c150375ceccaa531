"""Does training from scratch on 10,000 real images give better features than the untrained network, in minutes?

Unpacks the 10,000 test images of Fashion-MNIST (MIT licence; Debian package dataset-fashion-mnist) into folders of
PNG files, one per class, trains configs/train/fashion_mnist.yaml on them without the labels, and reports over the run
how well a third of them is classified by its nearest neighbours among the rest. Baseline: the untrained network, and
the raw pixels.

    python benchmarks/fashion_mnist.py --output-dir outputs/fashion_mnist [key=value ...]
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data import make_dataset
from dinov2.train.train import main as train

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dataset-fashion-mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def fetch(cache: Path) -> tuple[Path, Path]:
    """Download and unpack the Debian package, once; returns the IDX files of images and labels."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.rglob("t10k-images-idx3-ubyte.gz")):
        subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True, capture_output=True)
        subprocess.run(["dpkg", "-x", next(cache.glob("*.deb")).name, "."], cwd=cache, check=True)
    images, labels = (next(cache.rglob(f"t10k-{kind}-ubyte.gz")) for kind in ("images-idx3", "labels-idx1"))
    return images, labels


def unpack(images: Path, labels: Path, folder: Path) -> None:
    """Write <folder>/<class>/<number>.png for each image, once."""
    if folder.is_dir():
        return
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    targets = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    unfinished = folder.with_suffix(".tmp")
    for number, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        place = unfinished / CLASSES[target]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:05d}.png")
    unfinished.rename(folder)


def pixel_accuracy(folder: Path) -> float:
    """10-NN accuracy of raw pixels under cosine distance, percent, on the same split."""
    sets = []
    for split in ("train", "val"):
        dataset = make_dataset(f"ImageFolder:root='{folder}':split={split}", channels=1)
        pixels = np.stack([np.asarray(dataset[i][0]).ravel() for i in range(len(dataset))]).astype(np.float32)
        sets.append((pixels, dataset.get_targets()))
    classifier = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(*sets[0])
    return 100 * classifier.score(*sets[1])


def main() -> int:
    """Prepare, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/fashion_mnist"))
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache" / "fashion_mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("opts", nargs="*", metavar="key=value")
    args = parser.parse_args()
    folder = args.cache_dir / "images"
    unpack(*fetch(args.cache_dir), folder)
    source = f"ImageFolder:root='{folder}'"
    started = time.perf_counter()
    code = train(
        [
            "--config-file",
            str(ROOT / "configs" / "train" / "fashion_mnist.yaml"),
            "--output-dir",
            str(args.output_dir),
            "--no-resume",
            "--overwrite",
            f"train.dataset_path={source}",
            f"evaluation.knn.train_dataset_path={source}:split=train",
            f"evaluation.knn.val_dataset_path={source}:split=val",
            f"train.seed={args.seed}",
            *args.opts,
        ]
    )
    if code:
        return code
    elapsed_s = time.perf_counter() - started
    start = json.loads((args.output_dir / "eval" / "start" / "results_eval_knn.json").read_text())
    rows = [json.loads(line) for line in (args.output_dir / "training_metrics.json").read_text().splitlines()]
    curve = [(0, start["knn_top1_pct"])]
    curve += [(row["iteration"] + 1, row["knn_top1_pct"]) for row in rows if "knn_top1_pct" in row]
    print(f"{'step':>8}{'10-NN %':>10}")
    for step, score in curve:
        print(f"{step:8d}{score:10.2f}")
    result = {
        "seed": args.seed,
        "elapsed_s": round(elapsed_s, 1),
        "start_pct": curve[0][1],
        "end_pct": curve[-1][1],
        "gain_points": curve[-1][1] - curve[0][1],
        "raw_pixels_pct": pixel_accuracy(folder),
        "curve": curve,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
