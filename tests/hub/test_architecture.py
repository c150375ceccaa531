"""Architectures read from names and shapes: of every official backbone, and of small ones with each option."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchvision
from support.shapes import official_shapes

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import describe_architecture, describe_head
from dinov2.models import DinoVisionTransformer

SHAPES = official_shapes()
BACKBONES = [name for name in SHAPES if "head" not in name]
WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24), "h": (1280, 32, 20)}


@pytest.mark.parametrize("name", BACKBONES)
def test_official_backbones(name):
    found = describe_architecture(SHAPES[name])
    family, kind = name.split("_")[:2]
    assert found.family == family
    assert (found.embed_dim, found.depth, found.num_heads) == WIDTHS.get(kind[3], (4096, 40, 32))
    assert found.patch_size == (14 if family == "dinov2" else 16) and found.in_chans == 3
    assert found.num_registers == (4 if "_reg" in name or family == "dinov3" else 0)
    assert found.image_size == (518 if family == "dinov2" else None)
    assert found.layerscale and found.proj_bias and found.ffn_bias
    assert found.qkv_bias == (name != "dinov3_vit7b16")
    assert found.mask_k_bias == (family == "dinov3" and name != "dinov3_vit7b16")
    assert found.untie_global_and_local_cls_norm == (name == "dinov3_vit7b16")
    gated = "plus" in name or "7b" in name
    assert found.ffn_layer == ("swiglufused" if "vitg" in name else "swiglu" if gated else "mlp")
    assert found.num_parameters == sum(
        math.prod(tensor.shape)
        for key, tensor in SHAPES[name].items()
        if "bias_mask" not in key and "periods" not in key
    )


def test_settings_of_official_backbones():
    found = describe_architecture(SHAPES["dinov2_vits14_reg"]).settings()
    assert found["student.arch"] == "vit_small" and found["student.patch_size"] == 14
    assert found["student.num_register_tokens"] == 4 and found["student.pos_embed_type"] == "learned"
    assert found["student.interpolate_antialias"] is True and found["student.interpolate_offset"] == 0.0
    assert "student.ffn_ratio" not in found and "student.num_heads" not in found
    found = describe_architecture(SHAPES["dinov3_vits16plus"]).settings()
    assert found["student.ffn_layer"] == "swiglu" and found["student.ffn_ratio"] == 6.0
    assert found["student.pos_embed_type"] == "rope" and found["student.norm_layer"] == "layernormbf16"
    assert "student.interpolate_offset" not in found
    assert describe_architecture(SHAPES["dinov2_vitg14"]).settings()["student.arch"] == "vit_giant2"


def test_a_size_without_a_name():
    state = DinoVisionTransformer(
        img_size=32, patch_size=8, in_chans=1, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, qkv_bias=False
    ).state_dict()
    found = describe_architecture(state)
    assert (found.family, found.arch, found.num_heads, found.image_size) == ("dinov2", None, None, 32)
    settings = found.settings()
    assert settings["student.embed_dim"] == 48 and settings["student.depth"] == 2
    assert settings["student.ffn_ratio"] == 2.0 and settings["student.in_chans"] == 1
    assert settings["student.layerscale"] is None and settings["student.qkv_bias"] is False


def test_rotary_periods_tell_the_heads():
    state = {name: tensor for name, tensor in SHAPES["dinov3_vits16"].items()}
    state["rope_embed.periods"] = SimpleNamespace(shape=(8,))
    assert describe_architecture(state).settings()["student.num_heads"] == 12


def test_dino_v1_has_no_mask_token_registers_or_layerscale():
    state = DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3).state_dict()
    del state["mask_token"]
    assert describe_architecture(state).family == "dinov1"


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets(arch):
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)(weights=None)
    network.fc = torch.nn.Identity()
    found = describe_architecture(network.state_dict())
    assert (found.family, found.arch) == ("resnet", arch)
    assert found.embed_dim == (512 if arch in ("resnet18", "resnet34") else 2048)
    assert found.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.settings() == {"student.arch": arch, "student.in_chans": 3, "ibot.loss_weight": 0}


def test_what_is_no_backbone_is_said():
    with pytest.raises(CheckpointError) as caught:
        describe_architecture({"fc.weight": torch.ones(2, 2)})
    assert str(caught.value) == (
        "is not a whole backbone, it has no cls_token (vision transformer) and no conv1.weight with "
        "layer1.0.conv1.weight (ResNet); its first tensor is fc.weight"
    )
    state = {"conv1.weight": torch.ones(64, 3, 7, 7)} | {
        f"layer{stage}.0.conv1.weight": torch.ones(1) for stage in (1, 2, 3, 4)
    }
    with pytest.raises(CheckpointError) as caught:
        describe_architecture(state)
    assert str(caught.value) == (
        "is a ResNet with 1, 1, 1, 1 blocks in its stages, which is none of "
        "resnet18, resnet34, resnet50, resnet101, resnet152"
    )


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_heads(family):
    head = describe_head(SHAPES[f"{family}_head(in_dim=384,out_dim=65536)"])
    assert (head.in_dim, head.hidden_dim, head.num_layers) == (384, 2048, 3)
    assert (head.bottleneck_dim, head.num_prototypes) == (256, 65536)
    assert head.weight_norm == (family == "dinov2")
    assert describe_head({"norm.weight": torch.ones(3)}) is None


def test_positions_that_are_missing_are_not_taken_for_rotary_ones():
    state = {name: tensor for name, tensor in SHAPES["dinov2_vits14_reg"].items() if name != "pos_embed"}
    with pytest.raises(CheckpointError) as caught:
        describe_architecture(state)
    assert str(caught.value) == (
        "is not a whole backbone, it has no pos_embed (DINOv2) and neither rope_embed.periods nor storage_tokens "
        "(DINOv3)"
    )
    state = {name: tensor for name, tensor in SHAPES["dinov3_vits16"].items() if name != "rope_embed.periods"}
    assert describe_architecture(state).has_rope
