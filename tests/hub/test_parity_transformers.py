"""Features of backbones exchanged with Hugging Face: same weights, same class, register and patch tokens."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import LEARNED, REGISTERS, ROPE, TINY, assert_same_tokens, load_converted
from support.formats import randomise, read, shapes_of, stored, unread
from support.golden import golden_shapes

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import describe_architecture
from dinov2.hub.formats import from_official, to_official
from dinov2.models.vision_transformer import DinoVisionTransformer

HF_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HF_LEARNED = HF_TINY | {"image_size": 98, "patch_size": 14}
HF_ROPE = HF_TINY | {"intermediate_size": 192, "num_register_tokens": 4}
BY_SIZE = {"interpolate_offset": 0.0}  # how transformers interpolates; the official rule adds 0.1 patches
# our arguments; the class, its config and arguments; image sizes at which both interpolate by the same rule
CASES = {
    "dinov2": (LEARNED, "Dinov2", HF_LEARNED, [(98, 98)]),
    "dinov2 without offset": (LEARNED | BY_SIZE, "Dinov2", HF_LEARNED, [(98, 98), (70, 70), (140, 56)]),
    "dinov2 swiglu": (
        LEARNED | {"ffn_layer": "swiglufused"},
        "Dinov2",
        HF_LEARNED | {"use_swiglu_ffn": True},
        [(98, 98)],
    ),
    "dinov2 registers": (REGISTERS, "Dinov2WithRegisters", HF_LEARNED, [(98, 98), (70, 70), (140, 56), (126, 210)]),
    "dinov3": (ROPE, "DINOv3ViT", HF_ROPE, [(64, 64), (96, 48), (32, 160)]),
    "dinov3 key bias": (ROPE | {"mask_k_bias": False}, "DINOv3ViT", HF_ROPE | {"key_bias": True}, [(96, 48)]),
    "dinov3 without bias": (
        ROPE | {"qkv_bias": False, "mask_k_bias": False, "proj_bias": False, "ffn_bias": False},
        "DINOv3ViT",
        HF_ROPE | {"query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False},
        [(64, 64)],
    ),
    "dinov3 without registers": (
        ROPE | {"num_register_tokens": 0},
        "DINOv3ViT",
        HF_ROPE | {"num_register_tokens": 0},
        [(64, 32)],
    ),
    "dinov3 swiglu": (
        ROPE | {"ffn_layer": "swiglu", "mlp_ratio": 3},
        "DINOv3ViT",
        HF_ROPE | {"intermediate_size": 96, "use_gated_mlp": True, "hidden_act": "silu"},
        [(64, 64), (48, 80)],
    ),
}
RELEASED = {
    "dinov2_vits14": "Hugging Face Dinov2Model",
    "dinov2_vitg14": "Hugging Face Dinov2Model",
    "dinov2_vitb14_reg": "Hugging Face Dinov2WithRegisters",
    "dinov2_vitg14_reg": "Hugging Face Dinov2WithRegisters",
    "dinov3_vits16": "Hugging Face DINOv3ViT",
    "dinov3_vits16plus": "Hugging Face DINOv3ViT",
    "dinov3_vith16plus": "Hugging Face DINOv3ViT",
    "dinov3_vit7b16": "Hugging Face DINOv3ViT",
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def make(kind, **config):
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))


def tokens(model, **kwargs):
    return lambda image: model(image, **kwargs).last_hidden_state


@pytest.mark.parametrize("names", ["in memory", "as published"])
def test_weights_of_transformers_give_the_same_features_here(case, names, tmp_path):
    settings, kind, config, sizes = case
    theirs = randomise(make(kind, **config))
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict() if names == "in memory" else load_file(tmp_path / "model.safetensors")
    converted = to_official(stored(state), path="w.pth")
    ours = load_converted(DinoVisionTransformer(**settings), read(converted.state))
    assert_same_tokens(ours, tokens(theirs), sizes)
    title = {"Dinov2": "Dinov2Model"}.get(kind, kind)
    assert (converted.naming, converted.unused) == (f"Hugging Face {title}", ())


def test_our_weights_give_the_same_features_in_transformers(case, tmp_path):
    settings, kind, _, sizes = case
    ours = randomise(DinoVisionTransformer(**settings))
    state, config = export(ours)
    save_file(read(state), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == f"{kind}Model"
    assert not any(info.values()), info
    assert_same_tokens(ours, tokens(theirs.eval()), sizes)
    masked = torch.zeros(1, 16 if kind == "DINOv3ViT" else 49, dtype=torch.bool)
    masked[:, 3] = True
    image = torch.randn(1, 3, *(64, 64) if kind == "DINOv3ViT" else (98, 98))
    got = ours.forward_features(image, masked)["x_norm_clstoken"]
    torch.testing.assert_close(got, tokens(theirs, bool_masked_pos=masked)(image)[:, 0], rtol=1e-4, atol=1e-4)


def export(ours):
    architecture = replace(describe_architecture(ours.state_dict()), num_heads=TINY["num_heads"])
    return from_official(stored(ours.state_dict()), target="hf", architecture=architecture)


@pytest.mark.parametrize("names", ["in memory", "as published"])
def test_weights_of_dino_give_the_same_features_here(names, tmp_path):
    theirs = randomise(make("ViT", **HF_LEARNED, intermediate_size=192, layer_norm_eps=1e-6))
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict() if names == "in memory" else load_file(tmp_path / "model.safetensors")
    converted = to_official(stored(state), path="w.pth")
    settings = LEARNED | BY_SIZE | {"init_values": None}
    ours = load_converted(DinoVisionTransformer(**settings), read(converted.state))
    assert_same_tokens(ours, tokens(theirs, interpolate_pos_encoding=True), [(98, 98), (70, 70), (140, 56)])
    assert converted.naming == "Hugging Face ViTModel"
    assert set(converted.unused) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_backbone_without_layer_scale_and_biases_goes_out_with_neutral_ones(tmp_path):
    bare = {"init_values": None, "proj_bias": False, "ffn_bias": False, "qkv_bias": False}
    ours = randomise(DinoVisionTransformer(**LEARNED | bare))
    state, config = export(ours)
    save_file(read(state), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tokens(ours, tokens(theirs.eval()), [(98, 98)])


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_match_those_of_transformers_by_name_and_shape_both_ways(name):
    official = golden_shapes(name)
    architecture = describe_architecture(unread(official))
    state = zeros(official) if name.startswith("dinov3") else unread(official)  # RoPE and key biases are looked at
    published, config = from_official(state, target="hf", architecture=architecture)
    with torch.device("meta"):
        kind = config["architectures"][0]
        theirs = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**config))
    for state in (unread(shapes_of(theirs.state_dict())), published):
        converted = to_official(state, path="w.pth")
        assert converted.naming == RELEASED[name]
        absent = ("local_cls_norm.weight", "local_cls_norm.bias", "rope_embed.periods")
        want = {key: shape for key, shape in official.items() if key not in absent and not key.endswith("bias_mask")}
        assert shapes_of(converted.state) == want


def zeros(shapes):
    state = stored({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    num = shapes["rope_embed.periods"][0]
    return state | stored({"rope_embed.periods": 100 ** (torch.arange(num) / num)})


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "ViT"])
def test_the_trunk_of_a_classifier_is_found(kind):
    config = getattr(transformers, f"{kind}Config")(**HF_LEARNED)
    theirs = getattr(transformers, f"{kind}ForImageClassification")(config).state_dict()
    converted = to_official(stored(theirs), path="w.pth")
    assert converted.unused == ("classifier.weight", "classifier.bias")
    assert describe_architecture(converted.state).depth == 2


def test_what_hugging_face_cannot_hold_is_refused():
    untied = randomise(DinoVisionTransformer(**ROPE | {"untie_cls_and_patch_norms": True}))
    assert refusal(untied) == (
        "has a norm of its own for the class token, which Hugging Face's models do not have; export it as dinov2"
    )
    rms = DinoVisionTransformer(**ROPE | {"norm_layer": "rmsnorm"})
    assert refusal(rms) == "has RMSNorm, which Hugging Face's models do not have; export it as dinov2"
    odd = DinoVisionTransformer(**LEARNED | {"mlp_ratio": 2.5})
    assert refusal(odd) == (
        "its feed-forward part has 120 features at a width of 48, which no whole mlp_ratio of Hugging Face's Dinov2 "
        "gives; export it as timm or dinov2"
    )
    periods = {"pos_embed_rope_base": None, "pos_embed_rope_min_period": 0.5, "pos_embed_rope_max_period": 90.0}
    assert refusal(DinoVisionTransformer(**ROPE | periods)) == (
        "its RoPE periods run from 0.5 to 90 and follow from no base, as timm and Hugging Face need; "
        "export it as dinov2"
    )


def refusal(model):
    with pytest.raises(CheckpointError) as caught:
        export(model)
    return str(caught.value)
