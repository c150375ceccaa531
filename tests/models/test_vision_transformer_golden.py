"""Features of the vision transformer against stored numbers of the official code and against timm."""

import pytest
import timm
import torch
from support.golden import load_golden, state_dict_of

from dinov2.models import DinoVisionTransformer, build_model

V2 = {"img_size": 98, "patch_size": 14}
V3 = {"img_size": 64, "patch_size": 16, "pos_embed_type": "rope", "pos_embed_rope_dtype": "fp32"}
VARIANTS = {
    "vit_v2_plain": V2,
    "vit_v2_reg4_antialias": V2 | {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "vit_v2_swiglufused": V2 | {"ffn_layer": "swiglufused"},
    "vit_v3_plain": V3,
    "vit_v3_storage_maskk_untied": V3
    | {"num_register_tokens": 4, "mask_k_bias": True, "untie_cls_and_patch_norms": True},
    "vit_v3_swiglu64_rms": V3
    | {
        "num_register_tokens": 2,
        "ffn_layer": "swiglu64",
        "norm_layer": "rmsnorm",
        "pos_embed_rope_normalize_coords": "max",
        "qkv_bias": False,
    },
}


@pytest.fixture(params=VARIANTS)
def case(request):
    """Load a tiny model with the official weights; return it with the stored arrays as tensors."""
    return load_case(request.param)


@pytest.fixture(params=[name for name in VARIANTS if name.startswith("vit_v2")])
def case_v2(request):
    return load_case(request.param)


def load_case(name):
    golden = load_golden(name)
    model = DinoVisionTransformer(
        embed_dim=48,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
        init_values=1.0,
        **VARIANTS[name],
    )
    model.load_state_dict(state_dict_of(golden, "w/"), strict=True)
    return model.eval(), {key: torch.from_numpy(array) for key, array in golden.items()}


def assert_close(got, want):
    """Compare at 1e-5 of the largest value: float32 sums in another order."""
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale)


def assert_features(features, golden, number):
    registers = f"reg{number}" if f"reg{number}" in golden else f"storage{number}"
    assert_close(features["x_norm_clstoken"], golden[f"cls{number}"])
    assert_close(features["x_norm_regtokens"], golden[registers])
    assert_close(features["x_norm_patchtokens"], golden[f"patch{number}"])


@torch.no_grad()
def test_features_of_square_masked_and_of_oblong_images(case):
    model, golden = case
    assert_features(model(golden["x0"], masks=golden["masks0"], is_training=True), golden, 0)
    assert_features(model.forward_features(golden["x1"]), golden, 1)
    assert_close(model(golden["x1"]), golden["cls1"])


@torch.no_grad()
def test_features_of_both_sizes_in_one_pass(case):
    model, golden = case
    outputs = model([golden["x0"], golden["x1"]], masks=[golden["masks0"], None], is_training=True)
    for number, features in enumerate(outputs):
        assert_features(features, golden, number)


@torch.no_grad()
def test_positions(case_v2):
    model, golden = case_v2
    assert_close(model.interpolate_pos_encoding(7, 7), golden["pos0"])
    assert_close(model.interpolate_pos_encoding(10, 5), golden["pos1"])


@torch.no_grad()
def test_intermediate_layers(case_v2):
    model, golden = case_v2
    pairs = model.get_intermediate_layers(golden["x0"], n=2, return_class_token=True)
    for i, (patches, cls_token) in enumerate(pairs):
        assert_close(patches, golden["inter_patch_last2"][i])
        assert_close(cls_token, golden["inter_cls_last2"][i])


@pytest.mark.parametrize("num_registers", [0, 4])
@torch.no_grad()
def test_features_equal_those_of_timm(num_registers):
    torch.manual_seed(0)
    ours = build_model("vit_small", patch_size=14, img_size=98, init_values=1.0, num_register_tokens=num_registers)
    for parameter in ours.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    name = "vit_small_patch14_reg4_dinov2" if num_registers else "vit_small_patch14_dinov2"
    theirs = timm.create_model(name, img_size=98)
    state = ours.state_dict()
    del state["mask_token"]
    if num_registers:  # timm keeps the class token with its position added, and positions of patches alone
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 98, 98)
    features = ours.eval().forward_features(x)
    got = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1
    )
    torch.testing.assert_close(got, theirs.eval().forward_features(x), rtol=1e-4, atol=1e-4)
