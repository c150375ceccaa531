"""Exports: each library reads them strictly and computes the same features; none is half-written."""

import errno
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinov2.errors import CheckpointError, ConfigError
from dinov2.hub.export import export_weights
from dinov2.hub.weights import load_backbone_weights
from dinov2.models import DinoVisionTransformer, build_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1e-5}
V3 = {"pos_embed_type": "rope", "num_register_tokens": 2, "mask_k_bias": True, "norm_layer": "layernormbf16"}
V3 |= {"pos_embed_rope_dtype": "fp32"}
KINDS = {
    "dinov2": {},
    "dinov2_reg": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "dinov2_swiglu": {"ffn_layer": "swiglufused"},
    "dinov3": V3,
    "dinov3_swiglu": V3 | {"ffn_layer": "swiglu", "mlp_ratio": 6.0},
}


def backbone(**settings):
    model = DinoVisionTransformer(**(SMALL | settings))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


@pytest.fixture
def source(tmp_path):
    def save(model, name="source.pth"):
        torch.save(
            {"teacher": {f"backbone.{key}": tensor for key, tensor in model.state_dict().items()}}, tmp_path / name
        )
        return tmp_path / name

    return save


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(model, x):
    """Return class, register and patch tokens after the final norm, [B, 1 + R + N, D]."""
    features = model(x, is_training=True)
    return torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1
    )


def assert_agree(theirs, ours):
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)  # the tolerance, float32


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_loads_a_folder(tmp_path, source, kind):
    model = backbone(**KINDS[kind])
    export = export_weights(source(model), tmp_path / "timm", target="timm", num_heads=3)
    assert export.load_with == f'timm.create_model("local-dir:{tmp_path}/timm", pretrained=True)'
    theirs = eval(export.load_with, {"timm": timm}).eval()
    assert_agree(theirs.forward_features(images()), tokens(model, images()))


@pytest.mark.parametrize("kind", ["dinov2_reg", "dinov3"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_timm_loads_a_file(tmp_path, source, kind, suffix):
    model = backbone(**KINDS[kind])
    export = export_weights(source(model), tmp_path / f"timm{suffix}", target="timm", num_heads=3)
    theirs = eval(export.load_with, {"timm": timm}).eval()
    assert_agree(theirs.forward_features(images()), tokens(model, images()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_loads_a_folder(tmp_path, source, kind):
    model = backbone(**KINDS[kind])
    export = export_weights(source(model), tmp_path / "hf", target="hf", num_heads=3)
    assert export.load_with == f'transformers.AutoModel.from_pretrained("{tmp_path}/hf")'
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert_agree(theirs.eval()(images()).last_hidden_state, tokens(model, images()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["dinov2", "safetensors"])
def test_official_names_are_the_models_own(tmp_path, source, kind, target):
    model = backbone(**KINDS[kind])
    output = tmp_path / ("out.pth" if target == "dinov2" else "out.safetensors")
    export = export_weights(source(model), output, target=target)
    written = torch.load(output, weights_only=True) if target == "dinov2" else load_file(output)
    expected = model.state_dict()
    assert set(written) == set(expected) and export.num_tensors == len(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    if target == "dinov2":
        assert list(written) == list(expected)
    else:
        with safe_open(output, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "names": "safetensors", "source": "source.pth"}
    fresh = DinoVisionTransformer(**(SMALL | KINDS[kind]))
    fresh.load_state_dict(written, strict=True)


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("kind", ["dinov2_reg", "dinov3"])
def test_a_way_through_another_library_gives_complete_official_weights(tmp_path, source, kind, library):
    model = backbone(**KINDS[kind])
    with torch.no_grad():
        model.mask_token.zero_()  # timm has none
    export_weights(source(model), tmp_path / "there", target=library, num_heads=3)
    export_weights(tmp_path / "there", tmp_path / "back.pth", target="dinov2")  # heads stand in config.json
    fresh = DinoVisionTransformer(**(SMALL | KINDS[kind])).eval()
    fresh.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    assert_agree(tokens(fresh, images()), tokens(model, images()))
    if kind == "dinov3":
        assert torch.equal(fresh.rope_embed.periods, model.rope_embed.periods)
        assert torch.equal(fresh.blocks[0].attn.qkv.bias_mask, model.blocks[0].attn.qkv.bias_mask)


@torch.no_grad()
def test_resnets(tmp_path):
    model = build_model("resnet18")
    model.init_weights(torch.Generator().manual_seed(0))
    torch.save(model.state_dict(), tmp_path / "source.pth")
    export_weights(tmp_path / "source.pth", tmp_path / "out.pth", target="dinov2")
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    assert_agree(theirs.eval()(images()), model.eval()(images()))
    export = export_weights(tmp_path / "source.pth", tmp_path / "timm", target="timm")
    assert_agree(eval(export.load_with, {"timm": timm}).eval().forward_features(images()).mean((2, 3)), model(images()))
    with pytest.raises(CheckpointError) as caught:
        export_weights(tmp_path / "source.pth", tmp_path / "hf", target="hf")
    assert str(caught.value) == (
        f"{tmp_path}/source.pth: is a ResNet, for which Hugging Face has other names; export it as timm or dinov2"
    )


def test_heads_of_an_unnamed_width_must_be_given(tmp_path, source):
    path = source(backbone())
    with pytest.raises(CheckpointError) as caught:
        export_weights(path, tmp_path / "hf", target="hf")
    assert str(caught.value) == (
        f"{path}: its number of attention heads does not show in its tensors at a width of 48; give --config-file"
    )
    assert not (tmp_path / "hf").exists()


def test_heads_for_rope_must_be_known(tmp_path, source):
    export_weights(source(backbone(**V3)), tmp_path / "timm.pth", target="timm")
    with pytest.raises(CheckpointError) as caught:
        export_weights(tmp_path / "timm.pth", tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{tmp_path}/timm.pth: its number of attention heads, which RoPE needs, is unknown; give --config-file"
    )


def test_less_or_more_than_a_backbone_is_refused(tmp_path):
    state = backbone().state_dict()
    path = tmp_path / "source.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != "norm.bias"}, path)
    with pytest.raises(CheckpointError) as caught:
        export_weights(path, tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{path}: is not exactly a backbone of {len(state)} tensors; missing: 1 (first: norm.bias)"
    )
    save_file(state | {"blocks.0.attn.extra": torch.ones(2)}, path)
    with pytest.raises(CheckpointError) as caught:
        export_weights(path, tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{path}: is not exactly a backbone of {len(state)} tensors; unknown: 1 (first: blocks.0.attn.extra)"
    )


@pytest.mark.parametrize(("output", "target"), [("out.pth", "dinov2"), ("hf", "hf"), ("timm", "timm")])
def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path, output, target):
    state = backbone().state_dict()
    state["norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "source.pth")
    with pytest.raises(CheckpointError) as caught:
        export_weights(tmp_path / "source.pth", tmp_path / output, target=target, num_heads=3)
    assert str(caught.value) == (
        f"{tmp_path}/source.pth: norm.bias holds NaN or infinity; the file is damaged, or its training had diverged"
    )
    assert os.listdir(tmp_path) == ["source.pth"]


def test_an_output_that_exists_stays_unless_told_otherwise(tmp_path, source):
    path = source(backbone())
    for output, target in (("out.pth", "dinov2"), ("hf", "hf")):
        output = tmp_path / output
        export_weights(path, output, target=target, num_heads=3)
        with pytest.raises(ConfigError) as caught:
            export_weights(path, output, target=target, num_heads=3)
        assert str(caught.value) == f"--output {output}: exists; choose another, or pass --overwrite"
        other = source(backbone(depth=3), "other.pth")
        export_weights(other, output, target=target, num_heads=3, overwrite=True)
    assert len(torch.load(tmp_path / "out.pth", weights_only=True)) == len(backbone(depth=3).state_dict())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 3
    assert sorted(os.listdir(tmp_path)) == ["hf", "other.pth", "out.pth", "source.pth"]


def test_an_empty_folder_and_one_that_is_not_there_are_filled(tmp_path, source):
    path = source(backbone())
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new" / "hf"):
        export_weights(path, output, target="hf", num_heads=3)
        assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "source.pth"]


def test_what_is_no_export_is_never_overwritten(tmp_path, source):
    path = source(backbone())
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").touch()
    for output, target, sentence in (
        (folder, "hf", "holds more than an exported model (a.png), which is not overwritten; choose another"),
        (tmp_path / "a", "hf", "is a file, which is not overwritten by a folder; choose another"),
        (tmp_path / "b.pth", "dinov2", "is a folder, which is not overwritten by a file; choose another"),
    ):
        (tmp_path / "a").touch()
        (tmp_path / "b.pth").mkdir(exist_ok=True)
        with pytest.raises(ConfigError) as caught:
            export_weights(path, output, target=target, num_heads=3, overwrite=True)
        assert str(caught.value) == f"--output {output}: {sentence}"
    assert (folder / "a.png").exists()


@pytest.mark.parametrize(
    ("output", "target", "sentence"),
    [
        ("out.safetensors", "dinov2", "a file in the format dinov2 ends in .pth or .pt"),
        ("out", "safetensors", "a file in the format safetensors ends in .safetensors"),
        ("out.bin", "hf", "the format hf is a folder; leave out .bin"),
    ],
)
def test_names_that_do_not_suit_the_format(tmp_path, output, target, sentence):
    with pytest.raises(ConfigError) as caught:
        export_weights(tmp_path / "none.pth", tmp_path / output, target=target)
    assert str(caught.value) == f"--output {tmp_path}/{output}: {sentence}"


def test_a_disk_that_is_too_full_is_noticed_before_writing(tmp_path, source, monkeypatch):
    path = source(backbone())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: FreeSpace(100_000))
    with pytest.raises(CheckpointError) as caught:
        export_weights(path, tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{tmp_path}/out.pth: cannot be written (0.3 MB are needed and 0.1 MB are free on its disk); "
        "free some space or choose another place"
    )


class FreeSpace:
    def __init__(self, free):
        self.free = free


LIMITED = """
import resource, signal, sys
from dinov2.errors import CheckpointError
from dinov2.hub.export import export_weights

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for output, target in (("out.pth", "dinov2"), ("out.safetensors", "safetensors"), ("hf", "hf")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        export_weights(sys.argv[1], f"{sys.argv[2]}/{output}", target=target, num_heads=3)
    except CheckpointError as error:
        print(error)
"""


def test_a_disk_that_fills_while_writing_leaves_nothing_behind(tmp_path, source):
    path = source(backbone())
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason = os.strerror(errno.EFBIG)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("out.pth", "out.safetensors", "hf"), strict=True):
        assert line.startswith(f"{tmp_path}/out/{name}: cannot be written (") and reason in line
        assert line.endswith("; free some space or choose another place")
    assert os.listdir(tmp_path / "out") == []


def test_an_export_loads_here_again(tmp_path, source):
    model = backbone()
    export_weights(source(model), tmp_path / "hf", target="hf", num_heads=3)
    fresh = DinoVisionTransformer(**SMALL)
    report = load_backbone_weights(fresh, tmp_path / "hf")
    assert report.missing == () and report.naming == "Hugging Face Dinov2Model"
    assert torch.equal(fresh.eval()(images()), model(images()))


def test_whole_numbers_are_refused(tmp_path):
    state = backbone().state_dict()
    torch.save(state | {"norm.weight": state["norm.weight"].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        export_weights(tmp_path / "w.pth", tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{tmp_path}/w.pth: norm.weight holds numbers of type int8, as quantised models do; "
        "give weights of float32 or bfloat16"
    )
    assert not (tmp_path / "out.pth").exists()
