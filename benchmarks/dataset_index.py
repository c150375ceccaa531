"""What does a folder of a million images cost: made into an index once, opened again, held by a process and 8 workers?

The names are made up, in 1000 class folders; the files of all but one folder are empty. `index` is `ImageFolder` with
its index in a cache folder, `split=train`; `list` is a Python list of (path, label), as torchvision's ImageFolder keeps
it; `bare` is a process that has imported the same and holds no dataset. Memory is PSS, of which pages that several
processes share count once. Each worker, forked as a loader's are, reads 100,000 paths and labels at random.

    python benchmarks/dataset_index.py --images 1000000 --workers 8 --repeats 20
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2.data import make_dataset

FOLDERS = 1000
READS = 100_000  # of a worker
KINDS = ("bare", "index", "list")


def make_folder(root: Path, count: int) -> None:
    """Make that many files, the first a real image."""
    for number in range(FOLDERS):
        folder = root / f"class_{number:04d}"
        folder.mkdir(parents=True)
        for image in range(number, count, FOLDERS):
            os.close(os.open(folder / f"plate_{number:04d}_image_{image:09d}_view_1.png", os.O_CREAT | os.O_WRONLY))
    for path in sorted((root / "class_0000").iterdir()):  # whichever is first in its split
        Image.new("RGB", (8, 8)).save(path)


def pss_mib(cache: str, pid: int | str = "self") -> float:
    """Proportional set size of what a process has in memory: its own pages and mapped indexes, not its libraries.

    Pages of libraries are left out, because their share depends on the other programs that run.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in rollup if line.startswith("Pss_Anon:"))
    is_index = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):  # the first line of a mapping
            is_index = cache in line
        elif is_index and line.startswith("Pss:"):
            kib += int(line.split()[1])
    return kib / 1024


def peak_rss_mib() -> float:
    """Largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_index(root: str, cache: str) -> Any:
    """The dataset."""
    return make_dataset(f"ImageFolder:root='{root}':split=train", cache_dir=cache)


def list_files(root: str) -> list[tuple[str, int]]:
    """What torchvision's ImageFolder keeps."""
    samples = []
    for label, folder in enumerate(sorted(os.scandir(root), key=lambda entry: entry.name)):
        samples += [(entry.path, label) for entry in os.scandir(folder.path)]
    return sorted(samples)


def read(held: Any, seed: int) -> int:
    """Read paths and labels at random."""
    if held is None:
        return 0
    rng = random.Random(seed)
    total = 0
    for _ in range(READS):
        index = rng.randrange(len(held))
        path, label = held[index] if isinstance(held, list) else (held.path(index), held.get_target(index))
        total += len(path) + label
    return total


def build(root: str, cache: str) -> dict[str, float]:
    """Open for the first time."""
    before_mib = peak_rss_mib()
    started = time.perf_counter()
    dataset = open_index(root, cache)
    seconds = time.perf_counter() - started
    return {"build_s": seconds, "images": len(dataset), "peak_above_bare_mib": peak_rss_mib() - before_mib}


def reopen(root: str, cache: str, repeats: int) -> dict[str, Any]:
    """Open again and again; what one process holds after reading every path."""
    before_mib = pss_mib(cache)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        dataset = open_index(root, cache)
        times.append(time.perf_counter() - started)
    opened_mib = pss_mib(cache)
    for index in range(len(dataset)):
        dataset.path(index)
    return {"open_s": times, "opened_mib": opened_mib - before_mib, "all_read_mib": pss_mib(cache) - before_mib}


def with_workers(kind: str, root: str, cache: str, workers: int) -> dict[str, float]:
    """Memory of a process, then of it and its workers together."""
    held: Any = {"bare": lambda: None, "index": lambda: open_index(root, cache), "list": lambda: list_files(root)}[
        kind
    ]()
    read(held, 0)
    alone_mib = pss_mib(cache)
    fork = multiprocessing.get_context("fork")
    have_read, may_end = fork.Barrier(workers + 1), fork.Barrier(workers + 1)

    def work(seed: int) -> None:
        read(held, seed)
        have_read.wait()
        may_end.wait()

    processes = [fork.Process(target=work, args=(seed,)) for seed in range(1, workers + 1)]
    for process in processes:
        process.start()
    have_read.wait()
    together_mib = pss_mib(cache) + sum(pss_mib(cache, process.pid) for process in processes)
    may_end.wait()
    for process in processes:
        process.join()
    return {"alone_mib": alone_mib, "together_mib": together_mib}


def in_process_of_its_own(name: str, *arguments: Any) -> dict[str, Any]:
    """Run one of the above in a fresh process."""
    command = [sys.executable, __file__, "--run", json.dumps([name, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(root: str, cache: str, *, workers: int, repeats: int) -> dict[str, Any]:
    """All measurements."""
    built = in_process_of_its_own("build", root, cache)
    opened = in_process_of_its_own("reopen", root, cache, repeats)
    memory = {kind: in_process_of_its_own("with_workers", kind, root, cache, workers) for kind in KINDS}
    size_mib = sum(path.stat().st_size for path in Path(cache).rglob("*.index")) / 2**20
    return {"built": built, "opened": opened, "memory": memory, "index_file_mib": size_mib}


def report(result: dict[str, Any], *, images: int, workers: int) -> None:
    """Print the tables."""
    built, opened, memory = result["built"], result["opened"], result["memory"]
    times = opened["open_s"]
    first, middle, third = statistics.quantiles(times)
    print(f"{images} files, {built['images']} of them in the split; index files of {result['index_file_mib']:.0f} MiB")
    print(f"made in {built['build_s']:.1f} s; at most {built['peak_above_bare_mib']:.0f} MiB above the bare process")
    spread = f"quartiles {first:.3f}-{third:.3f}, most {max(times):.3f}"
    print(f"opened again in {middle:.3f} s, median of {len(times)}; {spread}")
    print(f"one process: {opened['opened_mib']:.1f} MiB when opened, {opened['all_read_mib']:.1f} with every path read")
    print(f"\n{'PSS above bare, MiB':24}{'one process':>14}{f'with {workers} workers':>18}{'growth':>10}")
    for kind in KINDS[1:]:
        alone, together = (memory[kind][name] - memory["bare"][name] for name in ("alone_mib", "together_mib"))
        print(f"{kind:24}{alone:14.1f}{together:18.1f}{together - alone:10.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="openings")
    parser.add_argument("--folder", help="where the files are made and removed again (a new folder in the system's)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, *arguments = json.loads(args.run)
        print(json.dumps({"build": build, "reopen": reopen, "with_workers": with_workers}[name](*arguments)))
        return
    load_before = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="dataset_index_", dir=args.folder))
    try:
        make_folder(folder / "images", args.images)
        time.sleep(3)  # a folder that has just changed is gone through again
        paths = [str(folder / name) for name in ("images", "cache")]
        result = measure(*paths, workers=args.workers, repeats=args.repeats)
    finally:
        shutil.rmtree(folder)
    report(result, images=args.images, workers=args.workers)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    setting = {
        "images": args.images,
        "workers": args.workers,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(setting | result))


if __name__ == "__main__":
    main()
