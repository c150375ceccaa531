"""How fast is a training step, how much of the machine's matrix speed is it, and what does it hold in memory?

Baseline: the same step written the plain way (`dense_step.py`), in the same run, turn by turn. Peak memory is that of
a process of its own for each. FLOPs are those of the matrix products and attention, counted by PyTorch.

    python benchmarks/train_step.py --repeats 20
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from dense_step import dense_forward_backward
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinov2.configs import load_config
from dinov2.train.build import build_optimizer
from dinov2.train.host_memory import keep_freed_memory
from dinov2.train.param_groups import apply_schedules
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update import clip_gradients

VALUES = StepValues(lr=1e-4, last_layer_lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07)


def make_batch(num_images: int, *, patch_size: int = 16, device: torch.device) -> dict[str, Tensor]:
    """Random crops; half of the global crops have 10 to 50 % of their patches masked, as in training."""
    generator = torch.Generator().manual_seed(0)
    num_patches = (224 // patch_size) ** 2
    masks = torch.zeros(2 * num_images, num_patches, dtype=torch.bool)
    for row, share in enumerate(torch.linspace(0.1, 0.5, num_images).tolist()):
        masks[2 * row, torch.randperm(num_patches, generator=generator)[: int(share * num_patches)]] = True
    batch = {
        "collated_global_crops": torch.randn(2 * num_images, 3, 224, 224, generator=generator),
        "collated_local_crops": torch.randn(8 * num_images, 3, 96, 96, generator=generator),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": (1 / masks.sum(1).clamp_min(1))[masks.nonzero()[:, 0]],
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Build one model and the two ways of training it by one step."""
    cfg = load_config(
        None,
        [
            f"student.arch={args.arch}",
            f"student.drop_path_rate={args.drop_path}",
            "train.centering=sinkhorn_knopp",
            "ibot.separate_head=true",
            f"dino.head_n_prototypes={args.prototypes}",
            f"ibot.head_n_prototypes={args.prototypes}",
        ],
    )
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training(
        device, strategy="NO_SHARD", param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32
    )
    model.init_weights(seed=0)
    optimizer = build_optimizer(cfg, model)
    apply_schedules(optimizer, VALUES)
    batch = make_batch(args.batch_size, device=device)

    def finish(loss: Tensor) -> Tensor:
        clip_gradients(model.student, max_norm=3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_teacher(VALUES.momentum)
        return loss

    def ours() -> Tensor:
        return finish(model.forward_backward(batch, teacher_temp=VALUES.teacher_temp)["total_loss"])

    def dense() -> Tensor:
        with torch.autocast(device.type, dtype=model.autocast_dtype, enabled=model.autocast_dtype != torch.float32):
            return finish(dense_forward_backward(model, batch, teacher_temp=VALUES.teacher_temp))

    return {"ours": ours, "dense": dense}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, waiting for the device before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best FLOP/s of a square matrix product, out of 20."""
    size = 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: left @ left, device) for _ in range(20))


def measure_memory(args: argparse.Namespace, variant: str, device: torch.device) -> None:
    """Run three steps of one variant and print the peak: device memory on a GPU, else resident memory."""
    step = make_steps(args, device)[variant]
    for _ in range(3):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        # Not ru_maxrss, which a new process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20)


def peak_gib(variant: str) -> float:
    """Ask a process of its own for the peak memory of a variant."""
    command = [sys.executable, *sys.argv, "--memory-of", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", help="of the forward pass: float32 or bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--default-allocator", action="store_true", help="on a CPU: without keep_freed_memory()")
    parser.add_argument("--memory-of", choices=["ours", "dense"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not args.default_allocator:
        keep_freed_memory()
    if args.memory_of:
        measure_memory(args, args.memory_of, device)
        return

    steps = make_steps(args, device)
    flops = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()  # warms up, too
        flops[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = [matmul_peak(device, getattr(torch, args.dtype))]
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    peaks.append(matmul_peak(device, getattr(torch, args.dtype)))

    peak = max(peaks)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "matmul_peak_gflops": peak / 1e9}
    result |= {key: value for key, value in vars(args).items() if key != "memory_of"}
    print(f"{'':8}{'images/s':>10}{'s/step':>9}{'min':>7}{'max':>7}{'of peak':>9}{'peak GiB':>10}")
    for name, values in times.items():
        median = statistics.median(values)
        row = {
            "images_per_s": args.batch_size / median,
            "step_s": median,
            "min_s": min(values),
            "max_s": max(values),
            "share_of_peak": flops["dense"] / median / peak,
            "gflop": flops[name] / 1e9,
            "peak_gib": peak_gib(name),
        }
        result[name] = row
        print(
            f"{name:8}{row['images_per_s']:10.2f}{median:9.3f}{min(values):7.2f}{max(values):7.2f}"
            f"{row['share_of_peak']:9.1%}{row['peak_gib']:10.2f}"
        )
    ratios = [dense / ours for ours, dense in zip(times["ours"], times["dense"], strict=True)]
    result["speed_ratio"] = statistics.median(ratios)
    result["memory_ratio"] = result["ours"]["peak_gib"] / result["dense"]["peak_gib"]
    print(f"speed: {result['speed_ratio']:.2f}x of dense (pairs); memory: {result['memory_ratio']:.2f}x")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
