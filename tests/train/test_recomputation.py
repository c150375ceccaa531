"""Steps whose blocks compute results again: the same numbers as steps that keep all, for less memory."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2.configs import load_config
from dinov2.errors import ConfigError
from dinov2.layers.block import Block
from dinov2.layers.recompute import checkpointed
from tests.support.meta_arch import random_batch, tiny_arch

KEYS = {"none": [], "selective": ["train.checkpointing=true"], "full": ["train.checkpointing_full=true"]}
FAMILIES = {
    "learned positions, drop path": ["student.drop_path_rate=0.3"],
    "rope, SwiGLU, low drop path": [
        "defaults=dinov3",
        "student.drop_path_rate=0.05",
        "student.ffn_layer=swiglu64",
        "student.pos_embed_rope_jitter_coords=1.1",
    ],
    "low-rank updates": ["student.pretrained_weights=x.pth", "lora.rank=2", "lora.dropout=0.2"],
    "bf16": [],
}


def step(family: str, recomputation: str, *, freeze_backbone: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny_arch([*FAMILIES[family], *KEYS[recomputation]])
    if family == "bf16":
        model.autocast_dtype = torch.bfloat16
    torch.manual_seed(0)
    metrics = model.forward_backward(random_batch(), teacher_temp=0.07, freeze_backbone=freeze_backbone)
    after = torch.rand(1)  # the stream of random numbers goes on from where it was
    gradients = {name: param.grad for name, param in model.student.named_parameters() if param.grad is not None}
    return metrics["total_loss"], gradients | {"after": after}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_bit_for_bit(family):
    loss, gradients = step(family, "none")
    for recomputation in ("selective", "full"):
        own_loss, own = step(family, recomputation)
        assert torch.equal(own_loss, loss)
        assert own.keys() == gradients.keys()
        assert all(torch.equal(own[name], gradients[name]) for name in own)


def test_a_resting_backbone_has_nothing_to_compute_again():
    loss, gradients = step("bf16", "none", freeze_backbone=True)
    own_loss, own = step("bf16", "full", freeze_backbone=True)
    assert torch.equal(own_loss, loss) and own.keys() == gradients.keys()
    assert not any(name.startswith("backbone.") for name in own)


@pytest.mark.parametrize(("recomputation", "flops"), [("none", 1.0), ("selective", 1.0), ("full", 4 / 3)])
def test_full_recomputation_costs_a_second_forward_pass_and_selective_no_product(recomputation, flops):
    block, x = Block(32, 2, init_values=1.0), torch.randn(64, 32, requires_grad=True)
    counts = []
    for block.recomputation in ("none", recomputation):
        with FlopCounterMode(display=False) as counter:
            block(x, ((4, 16),)).sum().backward()
        counts.append(counter.get_total_flops())
    # 1 of 3 parts of the products, less where attention, which counts 2.5 times in the backward pass, and fc2 come in
    assert counts[1] / counts[0] == pytest.approx(flops, rel=0.1)


@pytest.mark.parametrize(("recomputation", "is_kept"), [("none", [1, 1]), ("selective", [1, 0]), ("full", [0, 0])])
def test_what_is_kept_for_the_backward_pass(recomputation, is_kept):
    first, second, x = nn.Linear(4, 8), nn.Linear(8, 4), torch.randn(5, 4)
    results: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        wide = first(x)
        active = torch.tanh(wide)
        results.extend(weakref.ref(result.untyped_storage()) for result in (wide, active))
        return second(active * wide)

    out = checkpointed(function, x, recomputation=recomputation)
    assert [ref() is not None for ref in results] == list(map(bool, is_kept))
    out.sum().backward()


@pytest.mark.parametrize("key", ["checkpointing", "checkpointing_full"])
def test_a_resnets_statistics_would_count_twice(key):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["student.arch=resnet18", "ibot.loss_weight=0", f"train.{key}=true"])
    assert str(caught.value) == (
        f"train.{key}=true computes blocks twice, which would count each batch twice in the statistics of "
        f"student.arch=resnet18; set train.{key}=false"
    )
