"""What does a training step save where parts of the backbone are frozen, or low-rank updates learn in their place?

Baseline: the same step with everything learning. All numbers are counted, not timed, so they are the same on any
machine: FLOPs of matrix products and attention by PyTorch; bytes that are kept for the backward pass; bytes of the
optimiser's averages and of gradients.

    python benchmarks/frozen_parts.py --batch-size 2
"""

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_step import VALUES, make_batch

from dinov2.configs import load_config
from dinov2.train.build import build_optimizer
from dinov2.train.param_groups import apply_schedules
from dinov2.train.parts import num_trained
from dinov2.train.ssl_meta_arch import SSLMetaArch

HALF = {"vit_tiny": 5, "vit_small": 5, "vit_base": 5, "vit_large": 11}  # last block of the lower half
WEIGHTS = "student.pretrained_weights=not-read.pth"  # lora.rank asks for a name; the values do not matter here


def variants(arch: str) -> dict[str, tuple[list[str], bool]]:
    """Settings of each variant, and whether the backbone is in its frozen time."""
    lower = f"blocks:0-{HALF[arch]}"
    return {
        "all learns": ([], False),
        "backbone frozen": ([], True),
        f"freeze embeddings, {lower}": ([f"optim.freeze=[embeddings, {lower}]"], False),
        f"freeze {lower}": ([f"optim.freeze=[{lower}]"], False),
        "lora.rank=8": ([WEIGHTS, "lora.rank=8"], False),
        f"lora.rank=8, freeze embeddings, {lower}": (
            [WEIGHTS, "lora.rank=8", f"optim.freeze=[embeddings, {lower}]"],
            False,
        ),
    }


def count(args: argparse.Namespace, overrides: list[str], *, freeze_backbone: bool) -> dict[str, Any]:
    """Build a model, take one step and count what it costs."""
    cfg = load_config(
        None,
        [
            f"student.arch={args.arch}",
            "student.drop_path_rate=0",
            f"dino.head_n_prototypes={args.prototypes}",
            *overrides,
        ],
    )
    model = SSLMetaArch(cfg)
    model.init_weights(seed=0)
    optimizer = build_optimizer(cfg, model)
    apply_schedules(optimizer, VALUES)
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other tensor gets its address
        return tensor

    batch = make_batch(args.batch_size, device=torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        model.forward_backward(batch, teacher_temp=VALUES.teacher_temp, freeze_backbone=freeze_backbone)
    optimizer.step()
    averages = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "kept_for_backward_mib": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20,
        "averages_and_gradients_mib": sum(tensor.nbytes for tensor in (*averages, *gradients)) / 2**20,
        "backbone_trained_m": 0.0 if freeze_backbone else num_trained(model.student["backbone"]) / 1e6,
    }


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small", choices=list(HALF))
    parser.add_argument("--batch-size", type=int, default=2, help="images")
    parser.add_argument("--prototypes", type=int, default=4096)
    args = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, **vars(args)}
    print(f"{'':48}{'GFLOP':>8}{'kept MiB':>10}{'averages, gradients MiB':>25}{'backbone trained M':>20}")
    for name, (overrides, freeze_backbone) in variants(args.arch).items():
        row = result[name] = count(args, overrides, freeze_backbone=freeze_backbone)
        print(
            f"{name:48}{row['gflop']:8.0f}{row['kept_for_backward_mib']:10.0f}"
            f"{row['averages_and_gradients_mib']:25.0f}{row['backbone_trained_m']:20.2f}",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
