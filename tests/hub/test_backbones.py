"""Released backbones: official tensors, parameter counts, overrides, and loading through torch.hub."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.golden import golden_shapes

from dinov2.errors import CheckpointError, ConfigError
from dinov2.hub import backbones
from dinov2.hub.backbones import BACKBONES, PRETRAINED, make_backbone
from dinov2.models import RESNETS

REPOSITORY = Path(__file__).parents[2]
RELEASED = [name for name in BACKBONES if name not in RESNETS]
# Millions of parameters in the model cards on the Hugging Face hub (rounded there; positions and registers count).
PUBLISHED_M = {
    "dinov2_vits14": 22.1,
    "dinov2_vitb14": 86.6,
    "dinov2_vitl14": 304,
    "dinov2_vitg14": 1136,
    "dinov3_vits16": 21.6,
    "dinov3_vits16plus": 28.7,
    "dinov3_vitb16": 85.7,
    "dinov3_vitl16": 303,
    "dinov3_vith16plus": 841,
    "dinov3_vit7b16": 6716,
}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return getattr(backbones, name)(**overrides)


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_the_released_weights(name):
    assert {key: tuple(tensor.shape) for key, tensor in on_meta(name).state_dict().items()} == golden_shapes(name)


def test_every_official_backbone_is_there():
    assert len(RELEASED) == 15
    spec = importlib.util.spec_from_file_location("hubconf", REPOSITORY / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    functions = {name for name in vars(hubconf) if name.startswith(("dinov", "resnet"))}
    assert functions == set(BACKBONES)
    assert all(getattr(hubconf, name) is getattr(backbones, name) for name in BACKBONES)


@pytest.mark.parametrize("name", PUBLISHED_M)
def test_parameter_counts_are_those_published(name):
    count = sum(parameter.numel() for parameter in on_meta(name).parameters()) / 1e6
    published = PUBLISHED_M[name]
    assert round(count, 1 if isinstance(published, float) else 0) == published


def test_settings_that_shapes_do_not_tell():
    plain, registers, v3 = (on_meta(name) for name in ("dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"))
    assert (plain.interpolate_offset, plain.interpolate_antialias) == (0.1, False)
    assert (registers.interpolate_offset, registers.interpolate_antialias) == (0.0, True)
    assert (plain.norm.eps, v3.norm.eps) == (1e-6, 1e-5)
    assert (plain.blocks[0].ls1.init_values, v3.blocks[0].ls1.init_values) == (1.0, 1e-5)
    rope = v3.rope_embed
    assert (rope.base, rope.normalize_coords, rope.dtype) == (100.0, "separate", torch.float32)
    assert (rope.shift_coords, rope.jitter_coords, rope.rescale_coords) == (None, None, 2.0)
    heads = {name: on_meta(name).num_heads for name in RELEASED if not name.endswith("_reg")}
    assert list(heads.values()) == [6, 12, 16, 24, 6, 6, 12, 16, 16, 20, 32]


def test_models_without_weights_are_initialised():
    model = make_backbone("dinov3_vits16", **TINY)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model.training


def test_overrides_are_arguments_of_the_model_under_the_names_of_both_parents():
    model = on_meta("dinov3_vits16", n_storage_tokens=2, ffn_ratio=2, layerscale_init=0.1, in_chans=1)
    assert model.storage_tokens.shape == (1, 2, 384)
    assert model.blocks[0].mlp.fc1.weight.shape == (768, 384)
    assert model.blocks[0].ls1.init_values == 0.1
    assert model.patch_embed.proj.weight.shape == (384, 1, 16, 16)
    assert on_meta("dinov2_vits14", block_chunks=4, img_size=98).pos_embed.shape == (1, 50, 384)
    assert on_meta("resnet18", in_chans=2, sync_batchnorm=True).conv1.weight.shape == (64, 2, 7, 7)


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("dinov2_vits14", {"patchsize": 7}, "dinov2_vits14() has no setting 'patchsize'; nearest: patch_size"),
        ("dinov2_vits14", {"xyz": 7}, "dinov2_vits14() has no setting 'xyz'"),
        ("resnet50", {"img_size": 7}, "resnet50() has no setting 'img_size'"),
        ("resnet50", {"arch": "resnet18"}, "resnet50() has no setting 'arch'"),
    ],
)
def test_unknown_overrides_are_named_with_the_nearest(name, overrides, sentence):
    with pytest.raises(TypeError) as error:
        getattr(backbones, name)(**overrides)
    assert str(error.value) == sentence


def test_impossible_values_and_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"^norm_layer=batch: must be one of layernorm, layernormbf16, rmsnorm$"):
        backbones.dinov2_vits14(norm_layer="batch")
    with pytest.raises(ValueError, match=r"^dinov2_vits16: is no released backbone; nearest: dinov3_vits16$"):
        make_backbone("dinov2_vits16")


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16plus", "resnet18"])
def test_weights_of_a_file_are_loaded(tmp_path, name):
    overrides = {} if name == "resnet18" else TINY
    torch.manual_seed(0)
    source = make_backbone(name, **overrides)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = make_backbone(name, weights=tmp_path / "weights.pth", **overrides)
    torch.testing.assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(1, 3, 112, 112) if name.endswith("reg") else torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.eval()(x), source.eval()(x))


def test_pretrained_takes_the_published_name(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "load_backbone_weights", lambda model, weights: asked.append(weights))
    monkeypatch.setattr(backbones, "build_model", lambda **settings: None)  # 7B takes seconds
    for name in PRETRAINED:
        getattr(backbones, name)(pretrained=True)
    backbones.dinov2_vits14(pretrained=True, weights="mine.pth")
    assert asked == [*PRETRAINED.values(), "mine.pth"]
    assert PRETRAINED["dinov2_vits14"] == "hf:facebook/dinov2-small"
    assert PRETRAINED["dinov2_vitg14_reg"] == "hf:facebook/dinov2-with-registers-giant"
    assert PRETRAINED["dinov3_vits16"] == "hf:facebook/dinov3-vits16-pretrain-lvd1689m"
    assert set(BACKBONES) - set(PRETRAINED) == {"dinov3_vitl16plus"}
    with pytest.raises(CheckpointError) as error:
        backbones.dinov3_vitl16plus(pretrained=True)
    assert str(error.value) == (
        "dinov3_vitl16plus: has no weights on the Hugging Face hub; pass weights=FILE with Meta's .pth"
    )


SCRIPT = """
import sys, torch
clone, weights = sys.argv[1:]
model = torch.hub.load(clone, "dinov2_vits14", source="local", weights=weights, embed_dim=32, depth=2, num_heads=2)
assert sys.modules["dinov2"].__path__[0].startswith(clone), sys.modules["dinov2"].__path__
print(model.cls_token.sum().item())
"""


def test_torch_hub_loads_from_a_clone_in_any_directory(tmp_path):
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(REPOSITORY / "dinov2", clone / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "hubconf.py", clone)
    source = make_backbone("dinov2_vits14", **TINY | {"img_size": 518})
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(clone), str(tmp_path / "weights.pth")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == source.cls_token.sum().item()
