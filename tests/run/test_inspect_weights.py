"""`run/inspect_weights.py`: what a file is, which settings it needs, whether it fits; sentences and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov2.fsdp import FSDPCheckpointer
from dinov2.layers.dino_head import DINOHead
from dinov2.models import build_model
from dinov2.run.export import main as export
from dinov2.run.inspect_weights import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = ["crops.global_crops_size=16", "crops.local_crops_size=8"]


def backbone(**settings):
    settings = {"depth": 2, "embed_dim": 48, "patch_size": 4, "img_size": 16, "init_values": 1e-5} | settings
    return build_model("vit_tiny", **settings)


def save(path, model, *, key="teacher", **more):
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({key: state, **more}, path)
    return str(path)


def run(capsys, *argv):
    """Return the exit code, the table as {fact: text}, and the last line of errors."""
    capsys.readouterr()  # what came before
    code = main([str(text) for text in argv])
    captured = capsys.readouterr()
    rows = dict(line.split("  ", 1) for line in captured.out.splitlines() if "  " in line)
    return code, {name: text.strip() for name, text in rows.items()}, (captured.err.splitlines() or [""])[-1]


def test_a_file_is_described_without_a_config(tmp_path, capsys):
    path = save(tmp_path / "w.pth", backbone(num_register_tokens=4), iteration=3)
    code, rows, err = run(capsys, path)
    assert (code, err) == (0, "")
    assert rows == {
        "file": path,
        "kind": "PyTorch file",
        "networks": "teacher (36 tensors)",
        "other entries": "iteration",
        "names of": "DINOv2",
        "number formats": "float32",
        "architecture": "no named size (dinov2): 2 blocks, 48 features",
        "images": "3 channels, patches of 4 px",
        "registers": "4",
        "positions": "17 learned (images of 16 px)",
        "feed-forward": "mlp, 192 wide",
        "norms": "layernorm",
        "has": "layerscale, qkv_bias, proj_bias, ffn_bias",
        "parameters": "0.06 M",
        "settings, if not the defaults": (
            "student.arch=vit_small student.embed_dim=48 student.depth=2 student.patch_size=4 "
            "student.num_register_tokens=4 student.interpolate_antialias=true student.interpolate_offset=0"
        ),
    }


def test_a_fitting_config_is_told_what_would_be_loaded(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "student: {arch: vit_tiny, depth: 2, embed_dim: 48, patch_size: 4, in_chans: 1}\n"
        "crops: {global_crops_size: 16, local_crops_size: 8}\n"
    )
    path = save(tmp_path / "w.pth", backbone(img_size=32))
    code, rows, err = run(capsys, path, "--config-file", config)
    assert (code, err) == (0, "")
    assert {name: rows[name] for name in list(rows)[list(rows).index("config") :]} == {
        "config": str(config),
        "fits": "yes",
        "would be loaded": "35 tensors, 0.06 M values",
        "converted": "0",
        "resized": "2 tensors, 1584 values: patch_embed.proj.weight (3 -> 1 channels), pos_embed (8x8 -> 4x4 patches)",
        "left at initial values": "0",
        "unused": "0",
    }


def test_a_config_that_does_not_fit_gives_the_sentence_and_code_1(tmp_path, capsys):
    path = save(tmp_path / "w.pth", backbone(num_register_tokens=4))
    code, rows, err = run(capsys, path, *MODEL, *SIZES)
    sentence = (
        "it has 4 register tokens but the model has 0; set student.num_register_tokens=4, "
        "and student.interpolate_antialias=true student.interpolate_offset=0"
    )
    assert code == 1 and rows["fits"] == f"no: {sentence}" and err == f"error: {path}: {sentence}"
    assert rows["config"] == "defaults and the keys given"
    code, rows, _ = run(capsys, path, *MODEL, *SIZES, "student.allow_partial_weights=true")
    assert code == 0 and rows["fits"] == "yes" and rows["unused"] == "1 tensor, 192 values: register_tokens"


def test_json_has_all_of_it(tmp_path, capsys):
    head = DINOHead(48, 32, hidden_dim=16, bottleneck_dim=8)
    state = {f"backbone.{name}": tensor for name, tensor in backbone().state_dict().items()}
    state |= {f"dino_head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save({"teacher": state, "student": state}, tmp_path / "w.pth")
    assert main([str(tmp_path / "w.pth"), "--json", *MODEL, *SIZES]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["network"] == "teacher" and list(found["networks"]) == ["teacher", "student"]
    assert found["architecture"]["embed_dim"] == 48 and found["architecture"]["family"] == "dinov2"
    assert found["heads"]["dino_head"]["num_prototypes"] == 32
    assert found["fits"] is True and len(found["load"]["loaded"]) == 35
    assert found["settings"]["student.patch_size"] == 4
    assert main([str(tmp_path / "w.pth"), "--json", *MODEL, *SIZES, "student.depth=3"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["load"] is None
    assert found["problem"] == f"{tmp_path}/w.pth: it has 2 blocks but the model has 3; set student.depth=2"


def test_a_dinov3_backbone(tmp_path, capsys):
    model = backbone(pos_embed_type="rope", num_register_tokens=2, mask_k_bias=True, norm_layer="layernormbf16")
    _, rows, _ = run(capsys, save(tmp_path / "w.pth", model))
    assert rows["architecture"] == "no named size (dinov3): 2 blocks, 48 features, 3 heads"
    assert rows["positions"] == "rotary" and rows["names of"] == "DINOv3"
    assert "student.pos_embed_type=rope student.norm_layer=layernormbf16" in rows["settings, if not the defaults"]
    code, rows, err = run(capsys, tmp_path / "w.pth", *MODEL, *SIZES)
    assert code == 1 and "(or defaults=dinov3)" in err


def test_a_checkpoint_of_a_run(tmp_path, capsys):
    networks = {name: torch.nn.ModuleDict({"backbone": backbone()}) for name in ("student", "teacher")}
    checkpointer = FSDPCheckpointer(torch.nn.ModuleDict(networks), str(tmp_path), sharding_strategy="NO_SHARD")
    checkpointer.save("model_0000003", iteration=3)
    code, rows, err = run(capsys, tmp_path / "model_0000003.rank_{rank}.pth", *MODEL, *SIZES)
    assert (code, err, rows["fits"]) == (0, "", "yes")
    assert rows["kind"] == "training checkpoint (1 rank)"
    assert rows["networks"] == "teacher (35 tensors), student (35 tensors); taken: teacher"
    output = str(tmp_path / "out.safetensors")
    arguments = ["--pretrained-weights", str(tmp_path / "model_0000003"), "--output", output, "--checkpoint-key"]
    assert export([*arguments, "student", "--format", "safetensors"]) == 0
    expected = networks["student"]["backbone"].state_dict()
    written = load_file(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_resnet(tmp_path, capsys):
    with torch.device("meta"):
        model = build_model("resnet18")
    model.to_empty(device="cpu")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    code, rows, _ = run(capsys, tmp_path / "w.pth")
    assert code == 0 and rows["architecture"] == "resnet18 (resnet): 8 blocks, 512 features"
    settings = "student.arch=resnet18 ibot.loss_weight=0"
    assert rows["images"] == "3 channels" and rows["settings, if not the defaults"] == settings
    assert run(capsys, tmp_path / "w.pth", *settings.split())[0] == 0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"patch_size": 14, "img_size": 28}, "student.patch_size=14 crops.local_crops_size=98"),
        (
            {"patch_size": 16, "pos_embed_type": "rope", "num_register_tokens": 4, "norm_layer": "layernormbf16"},
            "student.num_register_tokens=4 student.pos_embed_type=rope student.norm_layer=layernormbf16 "
            "student.pos_embed_rope_dtype=fp32",
        ),
    ],
)
def test_the_settings_as_they_are_printed_make_a_config_that_fits(tmp_path, capsys, model, expected):
    path = save(tmp_path / "w.pth", backbone(num_heads=3, **({"pos_embed_rope_dtype": "fp32"} | model)))
    _, rows, _ = run(capsys, path)
    settings = rows["settings, if not the defaults"]
    assert settings.endswith(expected)
    code, rows, err = run(capsys, path, *settings.split(), "student.num_heads=3")
    assert (code, err, rows["fits"]) == (0, "", "yes")
    assert rows["settings, if not the config's"] == "none"  # heads are not told by learned positions


def test_the_settings_that_are_shown_make_the_file_fit(tmp_path, capsys):
    model = backbone(num_register_tokens=3, ffn_layer="swiglufused", qkv_bias=False, in_chans=5, mlp_ratio=2.0)
    path = save(tmp_path / "w.pth", model)
    _, rows, _ = run(capsys, path)
    settings = rows["settings, if not the defaults"].split()
    code, rows, err = run(capsys, path, *settings, *SIZES)
    assert (code, rows["fits"], rows["resized"]) == (0, "yes", "0"), err


def test_numbers_of_another_size_are_taken_back(tmp_path, capsys):
    with torch.device("meta"):
        model = build_model("vit_small", patch_size=4, img_size=16, init_values=1e-5)
    path = save(tmp_path / "w.pth", model.to_empty(device="cpu"))
    code, rows, err = run(capsys, path, *MODEL, *SIZES)
    assert code == 1 and err == (
        f"error: {path}: its embedding has 384 features but the model's has 48; "
        "set student.arch=vit_small student.embed_dim=null student.depth=null student.num_heads=null"
    )
    settings = rows["settings, if not the config's"]
    assert settings == "student.arch=vit_small student.depth=null student.embed_dim=null"
    assert run(capsys, path, *MODEL, *SIZES, *settings.split())[0] == 0


def test_part_of_a_backbone(tmp_path, capsys):
    state = {name: tensor for name, tensor in backbone().state_dict().items() if "blocks" not in name}
    torch.save(state, tmp_path / "w.pth")
    code, rows, _ = run(capsys, tmp_path / "w.pth")
    assert code == 0 and rows["architecture"] == (
        "unknown: it is not a whole backbone, it has no blocks.0.attn.qkv.weight (vision transformer) and no "
        "conv1.weight with layer1.0.conv1.weight (ResNet); its first tensor is cls_token"
    )
    code, rows, err = run(capsys, tmp_path / "w.pth", *MODEL, *SIZES)
    assert code == 1 and "it holds 7 of the model's 35 tensors" in err


def test_files_that_cannot_be_read_give_code_1(tmp_path, capsys):
    assert run(capsys, tmp_path / "none.pth")[::2] == (1, f"error: {tmp_path}/none.pth: no such file of weights")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>")
    code, _, err = run(capsys, tmp_path / "page.pth")
    assert code == 1 and err.startswith(f"error: {tmp_path}/page.pth: is a web page, not weights")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"model": backbone().state_dict(), "args": Malicious(str(tmp_path / "executed"))}, tmp_path / "w.pth")
    code, _, err = run(capsys, tmp_path / "w.pth")
    assert code == 1 and "which are refused because reading them can run code" in err
    assert not (tmp_path / "executed").exists()


def test_bad_usage_gives_code_2(tmp_path, capsys):
    path = save(tmp_path / "w.pth", backbone())
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, path, "student.archh=vit_tiny")
    assert code == 2 and err.startswith("error: unknown key student.archh")
    code, _, err = run(capsys, path, "--config-file", tmp_path / "none.yaml")
    assert code == 2 and "none.yaml" in err
    assert run(capsys, path, "--checkpoint-key", "student")[::2] == (
        1,
        f"error: {path}: has no 'student' but has 'teacher'; take that one with --checkpoint-key teacher",
    )


@pytest.mark.parametrize("program", ["inspect_weights.py", "export.py"])
def test_programs_start_and_tell_defaults(program):
    done = subprocess.run([sys.executable, ROOT / "run" / program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "default: teacher" in " ".join(done.stdout.split()), done.stderr
