"""Features of backbones exchanged with timm: same weights, same class, register and patch tokens."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.backbones import LEARNED, REGISTERS, ROPE, TINY, assert_same_tokens, load_converted
from support.formats import randomise, read, shapes_of, stored, unread
from support.golden import golden_shapes

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import describe_architecture
from dinov2.hub.formats import from_official, to_official
from dinov2.models.vision_transformer import DinoVisionTransformer

# our arguments; the timm model and its arguments; image sizes at which both interpolate positions by the same rule:
# all for registers and RoPE, its own for positions without registers, which timm smooths and scales without offset
CASES = {
    "dinov2": (LEARNED, "vit_small_patch14_dinov2", TINY | {"img_size": 98}, [(98, 98)]),
    "dino": (
        LEARNED | {"init_values": None},
        "vit_small_patch16_224",
        TINY | {"img_size": 98, "patch_size": 14},
        [(98, 98)],
    ),
    "dinov2 registers": (
        REGISTERS,
        "vit_small_patch14_reg4_dinov2",
        TINY | {"img_size": 98, "dynamic_img_size": True},
        [(98, 98), (70, 70), (140, 56), (126, 210)],
    ),
    "dinov2 swiglu": (
        LEARNED | {"ffn_layer": "swiglufused"},
        "vit_giant_patch14_dinov2",
        TINY | {"img_size": 98},
        [(98, 98)],
    ),
    "dinov3": (ROPE, "vit_small_patch16_dinov3_qkvb", TINY, [(64, 64), (96, 48), (32, 160)]),
    "dinov3 without bias": (
        ROPE | {"qkv_bias": False, "mask_k_bias": False},
        "vit_small_patch16_dinov3",
        TINY,
        [(64, 64), (96, 48)],
    ),
    "dinov3 swiglu": (
        ROPE | {"ffn_layer": "swiglu", "mlp_ratio": 3},
        "vit_small_plus_patch16_dinov3_qkvb",
        TINY | {"mlp_ratio": 2},
        [(64, 64), (48, 80)],
    ),
}
RELEASED = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",
}
NOT_IN_TIMM = {"mask_token", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias"}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_weights_of_timm_give_the_same_features_here(case):
    settings, name, model_args, sizes = case
    theirs = randomise(timm.create_model(name, num_classes=0, **model_args))
    converted = to_official(stored(theirs.state_dict()), path="w.pth")
    ours = load_converted(DinoVisionTransformer(**settings), read(converted.state))
    assert_same_tokens(ours, theirs.forward_features, sizes)
    assert converted.unused == () and converted.heads == {}


def test_our_weights_give_the_same_features_in_timm(case):
    settings, _, _, sizes = case
    ours = randomise(DinoVisionTransformer(**settings))
    state, config = export(ours)
    dynamic = {"dynamic_img_size": True} if len(sizes) > 1 else {}
    theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"], **dynamic).eval()
    theirs.load_state_dict(read(state), strict=True)
    assert_same_tokens(ours, theirs.forward_features, sizes)


def test_timm_reads_a_folder_of_our_weights(case, tmp_path):
    settings, _, _, sizes = case
    ours = randomise(DinoVisionTransformer(**settings))
    state, config = export(ours)
    save_file(read(state), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_tokens(ours, theirs.forward_features, sizes[:1] if settings.get("pos_embed_type") != "rope" else sizes)


def export(ours):
    architecture = replace(describe_architecture(ours.state_dict()), num_heads=TINY["num_heads"])
    return from_official(stored(ours.state_dict()), target="timm", architecture=architecture)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_match_timms_by_name_and_shape_both_ways(name):
    official = golden_shapes(name)
    with torch.device("meta"):
        theirs = shapes_of(timm.create_model(RELEASED[name], num_classes=0).state_dict())
    converted = to_official(unread(theirs), path="w.pth")
    want = {key: shape for key, shape in official.items() if key not in NOT_IN_TIMM and not key.endswith("bias_mask")}
    assert shapes_of(converted.state) == want
    architecture = describe_architecture(unread(official))
    state = zeros(official) if name.startswith("dinov3") else unread(official)  # RoPE and key biases are looked at
    state, config = from_official(state, target="timm", architecture=architecture)
    assert shapes_of(state) == theirs
    assert config["architecture"] == RELEASED[name]
    with torch.device("meta"):
        made = timm.create_model(RELEASED[name], num_classes=0, **config["model_args"]).state_dict()
    assert shapes_of(made) == theirs


def zeros(shapes):
    state = stored({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    num = shapes["rope_embed.periods"][0]
    return state | stored({"rope_embed.periods": 100 ** (torch.arange(num) / num)})


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_constants_that_timm_leaves_out_of_dinov3_are_implied(name):
    theirs = timm.create_model(name, num_classes=0, **TINY)
    converted = to_official(stored(theirs.state_dict()), path="w.pth")
    bias, mask = (f"blocks.1.attn.qkv.{kind}" for kind in ("bias", "bias_mask"))
    assert converted.implied[mask].read().view(3, 48).tolist() == [[1] * 48, [0] * 48, [1] * 48]
    assert (bias in converted.implied) == (bias not in converted.state) == (not name.endswith("qkvb"))
    assert not converted.implied.get(bias, converted.state.get(bias)).read().any()


def test_a_key_bias_has_no_place_in_timms_dinov3():
    ours = randomise(DinoVisionTransformer(**ROPE | {"mask_k_bias": False}))
    with pytest.raises(CheckpointError) as caught:
        export(ours)
    assert str(caught.value) == "its keys have a bias, for which timm's DINOv3 has no place; export it as hf or dinov2"


def test_another_base_of_rope_is_handed_on():
    ours = randomise(DinoVisionTransformer(**ROPE | {"pos_embed_rope_base": 1000.0}))
    state, config = export(ours)
    assert config["model_args"]["rope_temperature"] == 1000.0
    theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    theirs.load_state_dict(read(state), strict=True)
    assert_same_tokens(ours, theirs.forward_features, [(64, 64)])


def test_a_classifier_of_timm_is_left_unused():
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=3, img_size=98, **TINY)
    converted = to_official(stored(theirs.state_dict()), path="w.pth")
    assert converted.unused == ("head.weight", "head.bias")
    assert "head.weight" not in converted.state


def test_resnets_keep_their_names_in_timm():
    theirs = timm.create_model("resnet18", num_classes=3).state_dict()
    converted = to_official(stored(theirs), path="w.pth")
    assert (converted.naming, converted.unused) == ("torchvision ResNet", ("fc.weight", "fc.bias"))
    state, config = from_official(converted.state, target="timm", architecture=describe_architecture(converted.state))
    timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).load_state_dict(read(state))
