"""Which parameters of a backbone learn: frozen parts, low-rank updates, and what goes through without gradient."""

import pytest
import torch
from support.meta_arch import random_batch, tiny_arch, tiny_config

from dinov2.configs import load_config
from dinov2.configs.parts import KINDS
from dinov2.errors import ConfigError
from dinov2.layers.lora import low_rank_updates
from dinov2.models import DinoVisionTransformer, ResNet
from dinov2.train.build import build_optimizer
from dinov2.train.param_groups import apply_schedules
from dinov2.train.parts import num_trained, parameters_of
from dinov2.train.schedules import StepValues

VALUES = StepValues(lr=0.01, last_layer_lr=0.01, wd=0.4, momentum=0.9, teacher_temp=0.06)
LORA = ("student.pretrained_weights=given.pth", "lora.rank=2")
RESNET = ("student.arch=resnet18", "ibot.loss_weight=0")
NO_VIT = tuple(f"student.{name}=null" for name in ("embed_dim", "depth", "num_heads"))


def vit(**options):
    return DinoVisionTransformer(embed_dim=24, depth=3, num_heads=2, init_values=1.0, img_size=32, **options)


def step(model, overrides=(), *, values=VALUES, seed=0):
    """Take one optimiser step as training does; returns the student's parameters before it, by name."""
    before = {name: param.detach().clone() for name, param in model.student.named_parameters()}
    optimizer = build_optimizer(tiny_config(overrides), model)
    apply_schedules(optimizer, values)
    frozen = values.backbone_lr_factor == 0
    model.forward_backward(random_batch(seed=seed), teacher_temp=0.06, freeze_backbone=frozen)
    optimizer.step()
    return before, optimizer


def changed(model, before):
    return {name for name, param in model.student.named_parameters() if not torch.equal(param, before[name])}


def test_each_kind_names_its_parameters():
    learned, rope = vit(num_register_tokens=2), vit(pos_embed_type="rope", num_register_tokens=2, ffn_layer="swiglu64")
    for model, registers, ffn in ((learned, "register_tokens", "fc1"), (rope, "storage_tokens", "w1")):
        found = {part: parameters_of(model, [part]) for part in KINDS if part != "pos_embed" or model is learned}
        assert found["patch_embed"] == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
        assert found["registers"] == {registers} and found["mask_token"] == {"mask_token"}
        expected = {"cls_token", "mask_token", registers} | found["patch_embed"] | found.get("pos_embed", set())
        assert found["embeddings"] == expected
        assert "blocks.1.norm2.bias" in found["norms"] and "norm.weight" in found["norms"]
        assert found["layerscale"] == {f"blocks.{i}.ls{j}.gamma" for i in range(3) for j in (1, 2)}
        assert "blocks.0.attn.proj.bias" in found["attention"] and f"blocks.2.mlp.{ffn}.weight" in found["mlp"]
        blocks = parameters_of(model, ["blocks:1-2"])
        assert blocks == {n for n, _ in model.named_parameters() if n.startswith(("blocks.1.", "blocks.2."))}
        assert parameters_of(model, ["embeddings", "blocks:0-2"]) | {"norm.weight", "norm.bias"} == {
            name for name, _ in model.named_parameters()
        }


def test_parts_of_a_resnet():
    model = ResNet("resnet18")
    assert parameters_of(model, ["patch_embed"]) == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert parameters_of(model, ["blocks:7"]) == {n for n, _ in model.named_parameters() if n.startswith("layer4.1.")}
    assert "layer2.0.downsample.1.weight" in parameters_of(model, ["norms"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parts_stay_bit_for_bit_and_all_else_learns(optimizer):
    overrides = ["optim.freeze=[patch_embed, pos_embed, norms, blocks:0]", f"optim.optimizer={optimizer}"]
    model = tiny_arch([*overrides, "student.layerscale=1"])
    before, built = step(model, overrides)
    frozen = parameters_of(model.student["backbone"], ["patch_embed", "pos_embed", "norms", "blocks:0"])
    assert changed(model, before) == before.keys() - {f"backbone.{name}" for name in frozen}
    in_groups = {name for group in built.param_groups for name in group["names"]}
    assert in_groups == before.keys() - {f"backbone.{name}" for name in frozen}


def test_what_lies_below_the_first_learning_block_needs_no_gradient():
    model = tiny_arch(["optim.freeze=[embeddings, blocks:0]"])
    seen = []
    for block in model.student["backbone"].blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.forward_backward(random_batch(), teacher_temp=0.06)
    assert [tensor.requires_grad for pair in seen for tensor in pair] == [False, False, False, True]


def test_a_frozen_backbone_takes_in_nothing_and_the_heads_learn():
    model = tiny_arch(["student.layerscale=1"])
    before, optimizer = step(model, values=StepValues(**vars(VALUES) | {"backbone_lr_factor": 0.0}))
    assert changed(model, before) == {name for name in before if not name.startswith("backbone.")}
    of_heads = {id(param) for param in model.student["dino_head"].parameters()}
    assert {id(param) for param in optimizer.state} == of_heads
    teacher = {name: tensor.clone() for name, tensor in model.teacher["backbone"].state_dict().items()}
    model.update_teacher(0.7)
    for name, tensor in model.teacher["backbone"].state_dict().items():
        assert torch.equal(tensor, teacher[name]), name


def test_the_losses_of_a_frozen_backbone_are_the_same():
    overrides = ["student.drop_path_rate=0", "student.layerscale=1"]
    losses = [
        tiny_arch(overrides).forward_backward(random_batch(), teacher_temp=0.06, freeze_backbone=frozen)
        for frozen in (False, True)
    ]
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name]), name


@pytest.mark.parametrize("freeze", [["optim.freeze=[norms]"], []], ids=["norms", "backbone"])
def test_frozen_batch_normalisation_keeps_its_statistics(freeze):
    model = tiny_arch([*RESNET, *NO_VIT, *freeze])
    backbone = model.student["backbone"]
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    model.train()
    model.forward_backward(random_batch(), teacher_temp=0.06, freeze_backbone=not freeze)
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert any(module.training for module in backbone.modules())


def test_low_rank_updates_leave_the_weights_alone():
    model = tiny_arch([*LORA, "student.layerscale=1"])
    before, _ = step(model, LORA)
    moved = {name.removeprefix("backbone.") for name in changed(model, before) if name.startswith("backbone.")}
    updates = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    norms = parameters_of(model.student["backbone"], ["norms"])
    # while B is 0, A gets no gradient, but it decays
    assert moved - norms == {f"{layer}.lora_b" for layer in updates} | {f"{layer}.lora_a" for layer in updates} | {
        "mask_token"
    }
    assert norms <= moved
    expected = sum(p.numel() for n, p in model.student["backbone"].named_parameters() if n in moved)
    assert num_trained(model.student["backbone"]) == expected


def test_whole_blocks_that_learn_get_no_updates_and_frozen_ones_keep_theirs():
    overrides = [*LORA, "lora.also_train=[blocks:1]", "lora.targets=[qkv, proj]", "optim.freeze=[attention]"]
    backbone = tiny_arch(overrides).student["backbone"]
    assert [name for name, _ in low_rank_updates(backbone)] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    learning = {name for name, param in backbone.named_parameters() if param.requires_grad}
    attention = parameters_of(backbone, ["attention"])
    assert "blocks.0.attn.qkv.lora_a" in attention
    assert learning == parameters_of(backbone, ["blocks:1"]) - attention


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["optim.freeze=[norm]"],
            "optim.freeze=['norm']: 'norm' is no part of a backbone; use patch_embed, pos_embed, cls_token, registers, "
            "mask_token, embeddings, norms, layerscale, attention, mlp, blocks:0-5 or blocks:3",
        ),
        (["optim.freeze=norms"], "optim.freeze='norms': must be a list of names"),
        (
            ["optim.freeze=[blocks:20-24]"],
            "optim.freeze=['blocks:20-24']: the backbone has no 'blocks:20-24': its blocks are 0 to 23; leave it out",
        ),
        (
            ["optim.freeze=[pos_embed]", "defaults=dinov3"],
            "optim.freeze=['pos_embed']: the backbone has no 'pos_embed': with student.pos_embed_type=rope, no "
            "positions are learned; leave it out",
        ),
        (
            ["optim.freeze=[mlp, norms]", *RESNET],
            "optim.freeze=['mlp', 'norms']: the backbone has no 'mlp': student.arch=resnet18 is no ViT; leave it out",
        ),
        (
            [*LORA, "lora.also_train=[registers]"],
            "lora.also_train=['registers']: the backbone has no 'registers': student.num_register_tokens=0; "
            "leave it out",
        ),
        (
            ["lora.rank=4"],
            "lora.rank=4 makes small changes to given weights, and none are given; name them by "
            "student.pretrained_weights, or set lora.rank=0",
        ),
        ([*LORA, *RESNET], "student.arch=resnet18 has none of lora.targets; set lora.rank=0"),
        (
            [*LORA, "lora.targets=[query]"],
            "lora.targets=['query']: must be a list of some of qkv, proj, fc1, fc2, w12, w1, w2, w3",
        ),
        (
            ["optim.freeze_backbone_epochs=99.5", "optim.unfreeze_ramp_epochs=1"],
            "optim.freeze_backbone_epochs=99.5 and unfreeze_ramp_epochs=1 go beyond the end of the run at "
            "optim.epochs=100; shorten them",
        ),
        (
            ["optim.backbone_lr_multiplier=0", "dino.loss_weight=0", "ibot.loss_weight=0"],
            "dino.loss_weight and ibot.loss_weight are both 0: while the backbone is frozen, nothing is learned; "
            "set one above 0, or optim.freeze_backbone_epochs=0",
        ),
    ],
)
def test_mistakes_are_found_when_the_config_is_read(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == sentence


def test_targets_of_another_backbone_are_refused():
    with pytest.raises(ConfigError) as caught:
        tiny_arch([*LORA, "lora.targets=[w12]"])
    assert str(caught.value) == "lora.targets=['w12']: the backbone has none of these layers; use qkv and proj"
