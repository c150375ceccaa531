"""Take a training step without memory and arithmetic, to learn what it would cost.

Student, teacher, losses and optimiser are the real ones, on tensors that have shapes and no values (PyTorch's fake
tensors). All results of operations are followed from when they are made until they are freed, so that activations,
temporary results and gradients count as they come and go, whatever the settings.

The workspaces of libraries, and what an allocator cannot use, are not seen.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dinov2.configs import Config
from dinov2.train.build import build_optimizer
from dinov2.train.param_groups import apply_schedules
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update import clip_gradients

_NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class StepCost:
    """What a step of one process costs, in bytes, were nothing sharded."""

    flops: int  # of matrix products, convolutions and attention, of an optimiser step
    student: int  # weights
    teacher: int
    frozen: int  # networks that the student is held near
    gradients: int  # all of them
    averages: int  # of the optimiser
    working: int  # the most that is there beside weights and averages: activations, gradients, temporary results
    saved: int  # tensors of a checkpoint
    largest_unit: int  # parameters, as a number, of the largest part that is gathered at once where networks are split
    num_student: int  # parameters of the student, as a number
    num_teacher: int
    num_frozen: int

    @property
    def peak(self) -> int:
        """The most that a process needs."""
        return self.student + self.teacher + self.frozen + self.averages + self.working


def dry_step(
    cfg: Config, *, batch_size: int, dtype: torch.dtype, freeze_backbone: bool = False, is_sharded: bool = False
) -> StepCost:
    """Take one step.

    Args:
        cfg: of the run, or of one of its stages.
        batch_size: images of one process in one pass, >= 1.
        dtype: of the forward pass.
        freeze_backbone: the step belongs to the time in which the backbone rests.
        is_sharded: weights are there in `dtype` while they are used, and gradients leave once they are complete.
    """
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    followed = _Followed()
    with FakeTensorMode(allow_non_fake_inputs=True), followed:
        _give_memory(model, dtype=dtype if is_sharded else torch.float32)
        model.autocast_dtype = dtype
        optimizer = build_optimizer(cfg, model)
        values = StepValues(lr=1e-4, last_layer_lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07)
        apply_schedules(optimizer, values)
        averages = 0
        if not is_sharded:
            averages = _make_averages(optimizer, followed)
        trained = [param for param in model.student.parameters() if param.requires_grad]
        if is_sharded:
            for param in trained:
                param.register_post_accumulate_grad_hook(_drop_gradient)
        base = followed.now
        followed.start()
        passes = cfg.optim.gradient_accumulation_steps
        for _ in range(min(passes, 2)):
            model.forward_backward(
                make_batch(cfg, batch_size), teacher_temp=values.teacher_temp, freeze_backbone=freeze_backbone
            )
        flops = followed.flops * passes // min(passes, 2)
        if not is_sharded:
            clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
            optimizer.step()
            model.apply_center_updates()
            model.update_teacher(values.momentum)
    num_trained = sum(param.numel() for param in trained)
    if is_sharded:
        averages = num_trained * 4 * _averages_each(cfg)
    student, teacher, frozen = (_size(network) for network in (model.student, model.teacher, model.anchoring.networks))
    units = [
        _numel(unit)
        for network in (*model.student.values(), *model.teacher.values())
        for unit in (network.shard_units() if hasattr(network, "shard_units") else [network])
    ]
    return StepCost(
        flops=flops,
        student=student,
        teacher=teacher,
        frozen=frozen,
        gradients=num_trained * 4,
        averages=averages,
        working=followed.peak - base,
        saved=sum(tensor.numel() * _saved_size(tensor) for tensor in model.state_dict().values()) + averages,
        largest_unit=max(units),
        num_student=_numel(model.student),
        num_teacher=_numel(model.teacher),
        num_frozen=_numel(model.anchoring.networks),
    )


def make_batch(cfg: Config, batch_size: int) -> dict[str, Tensor]:
    """Make a finished batch of random crops, with as many masked patches as there are in the mean."""
    crops, channels = cfg.crops, cfg.student.in_chans
    num_global = _NUM_GLOBAL_CROPS * batch_size
    num_patches = (crops.global_crops_size // cfg.student.patch_size) ** 2
    share = cfg.ibot.mask_sample_probability * sum(cfg.ibot.mask_ratio_min_max) / 2
    num_masked = round(num_global * num_patches * share)
    sizes = {"global": (num_global, crops.global_crops_size)}
    if crops.local_crops_number:
        sizes["local"] = (crops.local_crops_number * batch_size, crops.local_crops_size)
    if cfg.gram.use_loss and crops.gram_teacher_crops_size is not None:
        sizes["gram_teacher"] = (num_global, crops.gram_teacher_crops_size)
    return {
        f"collated_{name}_crops": torch.randn(number, channels, size, size) for name, (number, size) in sizes.items()
    } | {
        "collated_masks": torch.zeros(num_global, num_patches, dtype=torch.bool),
        "mask_indices_list": torch.arange(num_masked),
        "masks_weight": torch.ones(num_masked),
        "seeds": torch.arange(batch_size),
    }


class _Followed(TorchDispatchMode):
    """Sums up the memory of all tensors that are made and are still there, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._live: dict[int, weakref.finalize] = {}

    def start(self) -> None:
        """Begin to look for the peak, and to count operations, anew."""
        self.peak, self.flops = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self._live[key]


def _give_memory(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Replace the parameters and buffers, in place, by fake ones."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                made = torch.empty(param.shape, dtype=dtype, device="cpu")
                module._parameters[name] = nn.Parameter(made, requires_grad=param.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _make_averages(optimizer: torch.optim.Optimizer, followed: _Followed) -> int:
    """Let an optimiser make what it keeps between steps; returns its bytes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = followed.now
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return followed.now - before


def _averages_each(cfg: Config) -> int:
    """Numbers that the optimiser keeps for each parameter."""
    if cfg.optim.optimizer == "sgd":
        return int(cfg.optim.sgd_momentum > 0)
    return 2


def _drop_gradient(param: Tensor) -> None:
    param.grad = None


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _size(module: nn.Module) -> int:
    """Bytes of weights and buffers, as they are kept."""
    return 4 * _numel(module) + sum(buffer.nbytes for buffer in module.buffers())


def _saved_size(tensor: Tensor) -> int:
    return 4 if tensor.is_floating_point() else tensor.element_size()
