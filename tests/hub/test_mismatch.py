"""Why weights do not fit: one sentence for each mistake, from names and shapes, on the official backbones."""

from types import SimpleNamespace

import pytest
from support.shapes import official_shapes

from dinov2.hub.mismatch import explain_head_mismatch, explain_mismatch
from dinov2.models import DinoVisionTransformer

SHAPES = official_shapes()
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1e-5}
OPTIONAL = ("mask_token", "periods", "bias_mask", "local_cls_norm.weight", "local_cls_norm.bias")


def explain(file, model):
    return explain_mismatch(model, file, may_be_missing=[name for name in model if name.endswith(OPTIONAL)])


def small(**settings):
    return DinoVisionTransformer(**(SMALL | settings)).state_dict()


@pytest.mark.parametrize("name", [name for name in SHAPES if "head" not in name])
def test_a_backbone_fits_itself(name):
    assert explain(SHAPES[name], SHAPES[name]) is None
    without = {key: tensor for key, tensor in SHAPES[name].items() if not key.endswith(OPTIONAL)}
    assert explain(without, SHAPES[name]) is None


@pytest.mark.parametrize(
    ("file", "model", "sentence"),
    [
        (
            "dinov2_vits14_reg",
            "dinov2_vits14",
            "it has 4 register tokens but the model has 0; set student.num_register_tokens=4, "
            "and student.interpolate_antialias=true student.interpolate_offset=0",
        ),
        (
            "dinov2_vits14",
            "dinov2_vits14_reg",
            "it has 0 register tokens but the model has 4; set student.num_register_tokens=0",
        ),
        (
            "dinov2_vits14",
            "dinov3_vits16",
            "it is a DINOv2 backbone (learned positions) but the model is a DINOv3 one (rotary positions); "
            "set student.pos_embed_type=learned student.norm_layer=layernorm (or defaults=dinov2), "
            "and student.num_register_tokens=0",
        ),
        (
            "dinov3_vits16",
            "dinov2_vitb14",
            "it is a DINOv3 backbone (rotary positions) but the model is a DINOv2 one (learned positions); "
            "set student.pos_embed_type=rope student.norm_layer=layernormbf16 (or defaults=dinov3), "
            "and student.arch=vit_small student.num_register_tokens=4 student.mask_k_bias=true",
        ),
        (
            "dinov2_vitl14",
            "dinov2_vits14",
            "its embedding has 1024 features but the model's has 384; set student.arch=vit_large",
        ),
        (
            "dinov2_vitg14",
            "dinov2_vitl14",
            "its embedding has 1536 features but the model's has 1024; set student.arch=vit_giant2, "
            "and student.ffn_layer=swiglufused",
        ),
        (
            "dinov3_vits16plus",
            "dinov3_vits16",
            "its blocks have the FFN 'swiglu' but the model's 'mlp'; set student.ffn_layer=swiglu student.ffn_ratio=6",
        ),
        (
            "dinov3_vitl16",
            "dinov3_vitl16plus",
            "its blocks have the FFN 'mlp' but the model's 'swiglu'; set student.ffn_layer=mlp student.ffn_ratio=4",
        ),
    ],
)
def test_official_weights_in_the_wrong_model(file, model, sentence):
    assert explain(SHAPES[file], SHAPES[model]) == sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"embed_dim": 96}, "its embedding has 96 features but the model's has 48; set student.embed_dim=96"),
        (
            {"embed_dim": 192},
            "its embedding has 192 features but the model's has 48; "
            "set student.arch=vit_tiny student.embed_dim=null student.depth=2 student.num_heads=null",
        ),
        ({"depth": 3}, "it has 3 blocks but the model has 2; set student.depth=3"),
        ({"depth": 1}, "it has 1 block but the model has 2; set student.depth=1"),
        (
            {"ffn_layer": "swiglufused"},
            "its blocks have the FFN 'swiglufused' but the model's 'mlp'; set student.ffn_layer=swiglufused",
        ),
        ({"mlp_ratio": 2.5}, "the FFN of its blocks is 120 wide but the model's is 192; set student.ffn_ratio=2.5"),
        ({"init_values": None}, "it has no LayerScale but the model has; set student.layerscale=null"),
        (
            {"qkv_bias": False},
            "it lacks biases of query, key and value, which the model has; set student.qkv_bias=false",
        ),
        (
            {"proj_bias": False},
            "it lacks biases of the attention's output, which the model has; set student.proj_bias=false",
        ),
        (
            {"ffn_bias": False},
            "it lacks biases of the feed-forward part, which the model has; set student.ffn_bias=false",
        ),
    ],
)
def test_settings_of_small_models(settings, sentence):
    assert explain(small(**settings), small()) == sentence


def test_layerscale_that_the_model_lacks():
    assert explain(small(), small(init_values=None)) == (
        "it has LayerScale but the model has none; set student.layerscale=1e-5"
    )


def test_dino_v1_is_named():
    file = small(init_values=None)
    del file["mask_token"]
    assert explain(file, small()) == (
        "it has no LayerScale but the model has; it may come from DINO (v1); set student.layerscale=null"
    )


def test_options_of_dinov3():
    plain = SHAPES["dinov3_vits16"]
    without_mask = {name: tensor for name, tensor in plain.items() if "bias_mask" not in name}
    assert explain(plain, without_mask) == (
        "it has a mask for the bias of keys (bias_mask) but the model has none; set student.mask_k_bias=true"
    )
    local = plain | {f"local_cls_norm.{name}": plain[f"norm.{name}"] for name in ("weight", "bias")}
    assert explain(local, plain) == (
        "it has an own norm for local crops (local_cls_norm) but the model has none; "
        "set student.untie_global_and_local_cls_norm=true"
    )
    untied = plain | {f"cls_norm.{name}": plain[f"norm.{name}"] for name in ("weight", "bias")}
    assert explain(plain, untied) == (
        "it lacks an own norm for the class token (cls_norm), which the model has; "
        "set student.untie_cls_and_patch_norms=false"
    )
    heads = plain | {"rope_embed.periods": SimpleNamespace(shape=(8,))}
    assert explain(heads, plain) == "it has 12 attention heads but the model has 6; set student.num_heads=12"
    rms = {name: tensor for name, tensor in plain.items() if "norm" not in name or "bias" not in name}
    assert explain(rms, plain) == "it has RMSNorm but the model LayerNorm; set student.norm_layer=rmsnorm"


def resnet(channels=64, *, bottleneck=False):
    blocks = {"layer1": 2, "layer2": 2, "layer3": 2, "layer4": 2}
    state = {"conv1.weight": SimpleNamespace(shape=(channels, 3, 7, 7))}
    for layer, count in blocks.items():
        for i in range(count):
            state[f"{layer}.{i}.conv1.weight"] = state[f"{layer}.{i}.conv2.weight"] = SimpleNamespace(shape=(512, 1, 1))
    return state


def test_resnets_and_vision_transformers():
    assert explain(resnet(), SHAPES["dinov2_vits14"]) == (
        "it is a ResNet (resnet18) but the model is a vision transformer (vit_small); set student.arch=resnet18 "
        "ibot.loss_weight=0"
    )
    assert explain(SHAPES["dinov2_vits14"], resnet()) == (
        "it is a vision transformer (vit_small) but the model is a ResNet (resnet18); set student.arch=vit_small"
    )


def test_what_fits_in_nothing_is_not_offered_in_part():
    file = {name: tensor for name, tensor in SHAPES["dinov2_vits14"].items() if name != "pos_embed"}
    assert explain(file, SHAPES["dinov2_vitb14"]) == (
        "is not a whole backbone, it has no pos_embed (DINOv2) and neither rope_embed.periods nor storage_tokens "
        "(DINOv3)"
    )
    assert explain(file, SHAPES["dinov2_vits14"]) == (
        "it holds 174 of the model's 175 tensors; missing: 1 (first: pos_embed); "
        "set student.allow_partial_weights=true to load what fits"
    )


def test_part_of_a_backbone_is_counted():
    model = SHAPES["dinov2_vits14_reg"]
    two = {name: model[name] for name in ("cls_token", "pos_embed")}
    assert explain(two, model) == (
        "it holds 2 of the model's 176 tensors; missing: 173 (first: register_tokens); "
        "set student.allow_partial_weights=true to load what fits"
    )
    most = {name: tensor for name, tensor in model.items() if name != "norm.bias"}
    assert explain(most, model) == (
        "it holds 175 of the model's 176 tensors; missing: 1 (first: norm.bias); "
        "set student.allow_partial_weights=true to load what fits"
    )
    assert explain(model | {"head.weight": model["norm.bias"]}, model) == (
        "it holds 176 of the model's 176 tensors; unknown: 1 (first: head.weight); "
        "set student.allow_partial_weights=true to load what fits"
    )


def test_a_file_with_nothing_of_the_backbone():
    assert explain({"a": SimpleNamespace(shape=(1,))}, SHAPES["dinov2_vits14"]) == (
        "is not a whole backbone, it has no cls_token (vision transformer) and no conv1.weight with "
        "layer1.0.conv1.weight (ResNet); its first tensor is a"
    )


def test_positions_that_are_no_square_grid():
    file = small() | {"pos_embed": SimpleNamespace(shape=(1, 12, 48))}
    assert explain(file, small()) == "its pos_embed has 12 positions, which are not a class token and a square grid"


def test_heads():
    v2, v3 = (SHAPES[f"{family}_head(in_dim=384,out_dim=65536)"] for family in ("dinov2", "dinov3"))
    assert explain_head_mismatch(v2, v2) is None
    assert explain_head_mismatch(v2, v3) == "it has no weight normalisation, the model has"
    small_head = v2 | {
        f"last_layer.weight_{part}": SimpleNamespace(shape=(99, n)) for part, n in (("g", 1), ("v", 256))
    }
    assert explain_head_mismatch(v2, small_head) == "it has 99 prototypes, the model 65536"
    assert explain_head_mismatch(v2, {"x": v2["mlp.0.bias"]}) == "it is not a projection head of this kind"
