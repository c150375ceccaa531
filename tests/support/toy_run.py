"""A toy run whose every step depends on all that a checkpoint holds, and how to compare and damage what it leaves."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from dinov2 import checkpoint_format, distributed, fsdp
from support.toy_fsdp import make_toy

STRATEGIES = ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"]


class Position:
    """Stands for the sampler: counts the samples consumed."""

    def __init__(self):
        self.consumed = 0

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]


class Run:
    """A toy run whose every step depends on all that a checkpoint holds."""

    def __init__(self, folder, *, strategy="NO_SHARD", seed=1, hybrid=None, background=False, **retention):
        self.model = torch.nn.ModuleDict({"student": make_toy(seed), "teacher": make_toy(seed + 1)})
        self.model["teacher"].requires_grad_(False)
        for toy in self.model.values():
            for module in toy.values():
                fsdp.shard(module, strategy=strategy, hybrid_shard_size=hybrid)
        norms = [p for n, p in self.model["student"].named_parameters() if "norm" in n]
        others = [p for n, p in self.model["student"].named_parameters() if "norm" not in n and p.requires_grad]
        self.optimizer = torch.optim.AdamW([{"params": norms, "weight_decay": 0.0, "name": "norm"}, {"params": others}])
        self.position = Position()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        self.checkpointer = fsdp.FSDPCheckpointer(
            self.model,
            str(folder),
            sharding_strategy=strategy,
            config_text="train:\n  seed: 0\n",
            config_digest="digest",
            global_batch_size=12,
            background=background,
            optimizer=self.optimizer,
            grad_scaler=self.scaler,
            rng=fsdp.RngState(),
            sampler=self.position,
        )
        self.periodic = fsdp.PeriodicCheckpointer(self.checkpointer, **({"period": 3} | retention))
        self.iteration = 0

    def resume(self):
        extra = self.checkpointer.resume_or_load("")
        self.iteration = extra.get("iteration", -1) + 1
        return extra

    def train(self, until):
        while self.iteration < until:
            noise = torch.rand(4, 3) + random.random() + np.random.rand() + self.position.consumed / 100
            student, teacher = self.model["student"], self.model["teacher"]
            with torch.no_grad():
                target = teacher["head"](teacher["backbone"](noise)["features"])
            loss = (student["head"](student["backbone"](noise)["features"]) - target - 1).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(*fsdp.local_tensor_pairs(teacher, student), 0.3)
                student["backbone"].centre.add_(distributed.all_reduce_mean(target.mean()))
            self.position.consumed += 4
            self.periodic.step(self.iteration, note=f"after {self.iteration}")
            self.iteration += 1
        return self

    def contents(self):
        """All that the run consists of on this rank, as tensors and numbers."""
        fsdp.reshard(self.model)
        collected = tree_map(_local, {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        collected["others"] = [self.scaler.state_dict(), self.position.state_dict(), fsdp.RngState().state_dict()]
        return checkpoint_format.to_plain(collected)


def _local(value):
    """This rank's rows of a sharded tensor; all else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def same(first, second):
    """Whether nested data are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def copy_of(contents):
    if isinstance(contents, torch.Tensor):
        return contents.clone()
    if isinstance(contents, dict):
        return {key: copy_of(value) for key, value in contents.items()}
    return [copy_of(value) for value in contents] if isinstance(contents, list) else contents


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def flip_byte(path, tensor):
    """Change one byte of a tensor inside a rank file."""
    whole = path.read_bytes()
    position = whole.index(tensor.numpy().tobytes())
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
