"""Features of backbones exchanged with timm: same weights, same class, register and patch tokens."""

import json

import pytest
import timm
import torch
from support.formats import randomise, read, shapes_of, stored, unread
from support.golden import golden_shapes

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import describe_architecture
from dinov2.hub.formats import from_official, to_official
from dinov2.models.vision_transformer import DinoVisionTransformer

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4}
LEARNED = TINY | {"img_size": 98, "patch_size": 14, "init_values": 1.0}
REGISTERS = LEARNED | {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
ROPE = TINY | {
    "patch_size": 16,
    "init_values": 1.0,
    "num_register_tokens": 4,
    "pos_embed_type": "rope",
    "pos_embed_rope_dtype": "fp32",
    "norm_layer": "layernormbf16",
    "mask_k_bias": True,
}
# our arguments; the timm model and its arguments; image sizes at which both interpolate positions by the same rule
CASES = {
    "dinov2": (LEARNED, "vit_small_patch14_dinov2", TINY | {"img_size": 98}, [(98, 98)]),
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
MAY_BE_MISSING = {"mask_token", "rope_embed.periods"}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@torch.no_grad()
def assert_same_features(ours, theirs, sizes):
    """1e-4: float32 sums in another order, through two blocks of values around 1."""
    for height, width in sizes:
        image = torch.randn(2, 3, height, width)
        features = ours.forward_features(image)
        got = [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]]
        want = theirs.forward_features(image)
        assert want.std() > 0.1
        torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)


def test_weights_of_timm_give_the_same_features_here(case):
    settings, name, model_args, sizes = case
    theirs = randomise(timm.create_model(name, num_classes=0, **model_args))
    converted = to_official(stored(theirs.state_dict()), path="w.pth")
    ours = DinoVisionTransformer(**settings).eval()
    state = read(converted.state)
    own = ours.state_dict()
    missing = {key for key in own if key not in state}
    assert all(key in MAY_BE_MISSING or key.endswith("bias_mask") for key in missing)
    ours.load_state_dict(own | state, strict=True)
    assert_same_features(ours, theirs, sizes)
    assert converted.unused == () and converted.heads == {}


def test_our_weights_give_the_same_features_in_timm(case):
    settings, name, model_args, sizes = case
    ours = randomise(DinoVisionTransformer(**settings))
    architecture = describe_architecture(ours.state_dict())
    state, config = from_official(
        stored(ours.state_dict()), target="timm", architecture=with_heads(architecture, settings["num_heads"])
    )
    assert config == json.loads(json.dumps(config))
    dynamic = {"dynamic_img_size": True} if len(sizes) > 1 else {}
    theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"], **dynamic).eval()
    theirs.load_state_dict(read(state), strict=True)
    assert_same_features(ours, theirs, sizes)


def with_heads(architecture, num_heads):
    return type(architecture)(**(vars(architecture) | {"num_heads": num_heads}))
