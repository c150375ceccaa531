"""What does a checkpoint cost: how long does training wait for a save, how long do writing and loading take?

State of training: student, teacher and AdamW of a ViT with two heads, built as `dinov2.train` builds it, FULL_SHARD
over 2 processes. Baselines, turn by turn in the same run: a plain copy of the same tensors into host buffers that are
used again, and `torch.distributed.checkpoint` (DCP) with the states that its `get_state_dict` collects. Every time is
that of the slower process. Before each turn the processes wait for each other, and nothing is being written.

    python benchmarks/checkpoint.py --repeats 20 --long-repeats 5
    python benchmarks/checkpoint.py --size small
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dinov2 import distributed
from dinov2.checkpoint_format import open_checkpoint
from dinov2.configs import load_config
from dinov2.fsdp.part import PartToSave
from dinov2.train.build import build_checkpointer, build_grad_scaler, build_model, build_optimizer
from dinov2.train.host_memory import keep_freed_memory

RANKS = 2
SIZES = {"base": ("vit_base", 65536), "small": ("vit_small", 4096)}
PLAIN_STAGER = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class Training:
    """What a run saves on this rank, and the ways of saving and loading it."""

    def __init__(self, cfg: Any, folder: Path) -> None:
        device = distributed.get_device()
        self.folder = folder
        self.model = build_model(cfg, device=device)
        self.model.init_weights(seed=0)
        self.optimizer = build_optimizer(cfg, self.model)
        for param in self.model.student.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        scaler = build_grad_scaler(cfg, device=device)
        options = {"optimizer": self.optimizer, "scaler": scaler, "output_dir": folder}
        self.checkpointer = build_checkpointer(cfg, self.model, **options).checkpointer
        self.checkpointer.on_complete = None

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of the state: what several ranks hold is one's alone."""
        part = PartToSave().collect(self.model, {"optimizer": self.optimizer})
        return {"/".join(keys): tensor for keys, tensor in part.tensors.items()}

    def dcp_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self) -> None:
        self.checkpointer.save("model_0000000", iteration=0, samples_seen=0, metrics={})

    def load(self) -> None:
        self.checkpointer.load(str(self.folder / "model_0000000"))

    def dcp_save(self) -> None:
        dcp.save(self.dcp_state(), checkpoint_id=self.folder / "dcp")

    def dcp_load(self) -> float:
        """Load; returns the seconds of DCP's own `load` in it."""
        state = self.dcp_state()
        started = time.perf_counter()
        dcp.load(state, checkpoint_id=self.folder / "dcp")
        seconds = time.perf_counter() - started
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return seconds

    def remove(self) -> None:
        """Remove what was written, so that it takes no memory of a tmpfs."""
        distributed.barrier()
        if distributed.is_main_process():
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        distributed.barrier()


def seconds(run: Callable[[], Any]) -> float:
    """Time one call, which all ranks begin together."""
    gc.collect()  # what the turn before has left is not this one's to clean up
    distributed.barrier()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def plain_copy_s(training: Training) -> float:
    """Copy all tensors into buffers that have been used before."""
    pairs = [(source, torch.empty_like(source)) for source in training.tensors().values()]

    def copy() -> None:
        for source, buffer in pairs:
            buffer.copy_(source)

    copy()
    return seconds(copy)


def async_save_s(training: Training, *, kept: bool = False) -> dict[str, float]:
    """DCP's `async_save`: its stall with and without the collecting of the states, and the time until it is complete.

    Args:
        training: its folder holds the files afterwards.
        kept: its stager has been used before and has its buffers already.
    """
    stager = DefaultStager(PLAIN_STAGER) if kept else None
    if stager is not None:
        stager.stage(training.dcp_state())
    uploads = []
    alone: list[float] = []

    def save() -> None:
        state = training.dcp_state()
        started = time.perf_counter()
        uploads.append(dcp.async_save(state, checkpoint_id=training.folder / "dcp", async_stager=stager))
        alone.append(time.perf_counter() - started)

    started = time.perf_counter()
    stall = seconds(save)
    getattr(uploads[0], "upload_completion", uploads[0]).result()
    complete = time.perf_counter() - started
    if stager is not None:
        stager.close()
    return {"stall": stall, "alone": alone[0], "complete": complete}


def short_turn(training: Training) -> dict[str, float]:
    """How long training waits for a save, and when it is complete."""
    result = {"stall, plain copy": plain_copy_s(training)}
    started = time.perf_counter()
    result["stall, ours"] = seconds(training.save)
    training.checkpointer.wait()
    result["complete, ours"] = time.perf_counter() - started
    training.remove()
    times = async_save_s(training)
    result["stall, async_save"] = times["stall"]
    result["stall, async_save without states"] = times["alone"]
    result["complete, async_save"] = times["complete"]
    training.remove()
    return result


def long_turn(training: Training) -> dict[str, float]:
    """Seconds of loading, and of further ways that DCP has of saving."""
    training.save()
    training.checkpointer.wait()
    result = {"load, ours": seconds(training.load)}
    training.remove()
    result["complete, DCP save"] = seconds(training.dcp_save)
    alone: list[float] = []
    result["load, DCP"] = seconds(lambda: alone.append(training.dcp_load()))
    result["load, DCP without states"] = alone[0]
    training.remove()
    times = async_save_s(training, kept=True)
    result["stall, async_save kept stager"] = times["stall"]
    result["stall, kept without states"] = times["alone"]
    training.remove()
    return result


class PeakMemory:
    """Peak of this process's anonymous resident memory while a block runs, above what it was before, MiB."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        distributed.barrier()
        self._before = self._peak = _anonymous_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = max(self._peak, _anonymous_mib()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _anonymous_mib())


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def memory(training: Training) -> dict[str, float]:
    """Peak extra memory of each operation on this rank; and both loads must bring back what was saved."""
    result = {}

    def measure(name: str, run: Callable[[], Any]) -> None:
        with PeakMemory() as peak:
            run()
        result[name] = peak.mib

    def require_loaded(load: Callable[[], Any]) -> None:
        for tensor in training.tensors().values():
            tensor.zero_()
        load()
        assert sums() == saved, "other values were loaded"

    def sums() -> dict[str, float]:
        return {name: tensor.double().sum().item() for name, tensor in training.tensors().items()}

    saved = sums()
    measure("save ours, first", lambda: (training.save(), training.checkpointer.wait()))
    measure("save ours, later", lambda: (training.save(), training.checkpointer.wait()))
    result["files of ours"] = open_checkpoint(training.folder, "model_0000000").size_bytes / 2**20
    measure("load ours", training.load)
    require_loaded(training.load)
    training.remove()
    measure("save DCP", training.dcp_save)
    measure("load DCP", training.dcp_load)
    require_loaded(training.dcp_load)
    training.remove()
    measure("async_save DCP", lambda: async_save_s(training))
    training.remove()
    return result


def slowest(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each repeat, the time of the slower rank."""
    of_ranks = distributed.all_gather_objects(rows)
    return {key: [max(rank[turn][key] for rank in of_ranks) for turn in range(len(rows))] for key in rows[0]}


def run_rank(args: argparse.Namespace) -> None:
    """What each process does; rank 0 prints the results as JSON."""
    distributed.init("cpu")
    keep_freed_memory()
    arch, prototypes = args.arch, args.prototypes
    overrides = [f"student.arch={arch}", "ibot.separate_head=true", "compute_precision.sharding_strategy=FULL_SHARD"]
    overrides += [f"{head}.head_n_prototypes={prototypes}" for head in ("dino", "ibot")]
    training = Training(load_config(None, overrides), Path(args.folder))
    num_bytes = sum(tensor.nbytes for tensor in training.tensors().values())
    result: dict[str, Any] = {"tensors": len(training.tensors())}
    result["state_bytes"] = sum(distributed.all_gather_objects(num_bytes))
    of_ranks = distributed.all_gather_objects(memory(training))  # warms up, too
    result["memory_mib"] = {key: max(rank[key] for rank in of_ranks) for key in of_ranks[0]}
    result["file_bytes"] = round(result["memory_mib"].pop("files of ours") * 2**20)
    long_turns = slowest([long_turn(training) for _ in range(args.long_repeats)])
    short_turn(training)  # makes what loading has dropped
    result["seconds"] = slowest([short_turn(training) for _ in range(args.repeats)]) | long_turns
    training.checkpointer.close()
    if distributed.is_main_process():
        print(json.dumps(result))
    distributed.shutdown()


def run_ranks(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Start the processes and return what rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max((os.cpu_count() or 1) // RANKS, 1)
    shared = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = threads
    command = [sys.executable, __file__, "--arch", args.arch, "--prototypes", str(args.prototypes), "--rank"]
    command += ["--folder", folder, "--repeats", str(args.repeats), "--long-repeats", str(args.long_repeats)]
    processes = []
    for rank in range(RANKS):
        variables = {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(subprocess.Popen(command, env=os.environ | variables, text=True, stdout=subprocess.PIPE))
    output = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process has failed")
    return json.loads(output[0].splitlines()[-1])


def report(result: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns the ratios that matter."""
    times = result["seconds"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    gb = result["state_bytes"] / 1e9
    print(f"state {gb:.2f} GB, {result['tensors']} tensors on rank 0; files {result['file_bytes'] / 1e9:.2f} GB")
    print(f"\n{'seconds':34}{'median':>9}{'quartiles':>17}{'most':>9}{'GB/s':>7}{'times':>7}")
    for name in sorted(times):
        first, middle, third = statistics.quantiles(times[name])
        print(f"{name:34}{middle:9.3f}{f'{first:.3f}-{third:.3f}':>17}{max(times[name]):9.3f}", end="")
        print(f"{gb / middle:7.2f}{len(times[name]):7}")
    print(f"\n{'peak extra memory of a process':34}{'MiB':>9}")
    for name, value in result["memory_mib"].items():
        print(f"{name:34}{value:9.0f}")
    ratios = {}
    print("\nours, ratio of the medians to that of:")
    for name in sorted(medians):
        kind, _, way = name.partition(", ")
        if way != "ours":
            ratios[name] = medians[f"{kind}, ours"] / medians[name]
            print(f"{name:34}{ratios[name]:9.2f}")
    return ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="model and heads; small: a quick try")
    parser.add_argument("--arch", help="instead of the size's, e.g. vit_large")
    parser.add_argument("--prototypes", type=int, help="of each head, instead of the size's")
    parser.add_argument("--repeats", type=int, default=20, help="of the short measurements")
    parser.add_argument("--long-repeats", type=int, default=5, help="of writing and loading, >= 2")
    parser.add_argument("--folder", default="/dev/shm", help="a new folder is made in it and removed again")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    arch, prototypes = SIZES[args.size]
    args.arch, args.prototypes = args.arch or arch, args.prototypes or prototypes
    if args.rank:
        run_rank(args)
        return
    load_before = os.getloadavg()[0]
    folder = tempfile.mkdtemp(prefix="checkpoint_", dir=args.folder)
    started = time.perf_counter()
    try:
        result = run_ranks(args, folder)
    finally:
        shutil.rmtree(folder)
    ratios = report(result)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    setting = {
        "arch": args.arch,
        "prototypes": args.prototypes,
        "ranks": RANKS,
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "took_s": round(time.perf_counter() - started),
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(setting | {"ratios": ratios} | result))


if __name__ == "__main__":
    main()
