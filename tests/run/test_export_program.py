"""`run/export.py`: options, sentences and exit codes; what is written is tested in tests/hub/test_export.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.models import build_model
from dinov2.run.export import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = ["crops.global_crops_size=16", "crops.local_crops_size=8"]
ROPE = ["student.pos_embed_type=rope", "student.norm_layer=layernormbf16"]


@pytest.fixture
def weights(tmp_path):
    return save(tmp_path / "w.pth")


def save(path, **settings):
    settings = {"depth": 2, "embed_dim": 48, "patch_size": 4, "img_size": 16, "init_values": 1e-5} | settings
    torch.save(build_model("vit_tiny", **settings).state_dict(), path)
    return path


def run(capsys, weights, output, *more, target="hf"):
    argv = ["--pretrained-weights", weights, "--output", output, "--format", target, *more]
    code = main([str(text) for text in argv])
    captured = capsys.readouterr()
    return code, captured.out.strip(), (captured.err.splitlines() or [""])[-1]


def test_an_export_is_told_in_one_line(tmp_path, weights):
    argv = ["--pretrained-weights", weights, "--format", "safetensors", "--output", tmp_path / "o.safetensors"]
    done = subprocess.run([sys.executable, ROOT / "run" / "export.py", *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{tmp_path}/o.safetensors: official names, 35 tensors, 0.06 M values; "
        f'load it with: safetensors.torch.load_file("{tmp_path}/o.safetensors")\n'
    )


def test_the_config_gives_the_heads(tmp_path, weights, capsys):
    code, out, err = run(capsys, weights, tmp_path / "hf")
    assert code == 1 and err == (
        f"error: {weights}: its number of attention heads does not show in its tensors at a width of 48; "
        "give --config-file"
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        "student: {arch: vit_tiny, depth: 2, embed_dim: 48, patch_size: 4}\n"
        "crops: {global_crops_size: 16, local_crops_size: 8}\n"
    )
    code, out, err = run(capsys, weights, tmp_path / "hf", "--config-file", config)
    assert code == 0 and out.endswith(f'load it with: transformers.AutoModel.from_pretrained("{tmp_path}/hf")'), err
    code, out, err = run(capsys, weights, tmp_path / "hf", "--config-file", config)
    assert code == 2 and err == f"error: --output {tmp_path}/hf: exists; choose another, or pass --overwrite"
    assert run(capsys, weights, tmp_path / "hf", "--config-file", config, "--overwrite")[0] == 0


def test_a_config_of_another_backbone_is_refused(tmp_path, weights, capsys):
    code, _, err = run(capsys, weights, tmp_path / "hf", *MODEL, *SIZES, "student.depth=3")
    assert code == 1 and err == f"error: {weights}: it has 2 blocks but the model has 3; set student.depth=2"
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "student.norm_layer=layernorm",
            "student.norm_layer=layernorm: models of hf have layernormbf16, so that features would differ; "
            "export it as dinov2 or safetensors",
        ),
        (
            "student.pos_embed_rope_normalize_coords=max",
            "student.pos_embed_rope_normalize_coords=max: models of hf have separate, so that features would differ; "
            "export it as dinov2 or safetensors",
        ),
    ],
)
def test_rules_that_the_library_does_not_have(tmp_path, capsys, key, sentence):
    path = save(tmp_path / "v3.pth", pos_embed_type="rope")
    code, _, err = run(capsys, path, tmp_path / "hf", *MODEL, *SIZES, *ROPE, key)
    assert (code, err) == (2, f"error: {sentence}")
    assert run(capsys, path, tmp_path / "out.pth", *MODEL, *SIZES, *ROPE, key, target="dinov2")[0] == 0


def test_bad_usage_gives_code_2(tmp_path, weights, capsys):
    assert main(["--format", "hf"]) == 2
    assert "--pretrained-weights, --output" in capsys.readouterr().err
    code, _, err = run(capsys, weights, tmp_path / "o", target="onnx")
    assert code == 2 and "invalid choice: 'onnx'" in err
    code, _, err = run(capsys, weights, tmp_path / "out.bin", target="dinov2")
    assert (code, err) == (2, f"error: --output {tmp_path}/out.bin: a file in the format dinov2 ends in .pth or .pt")


def test_weights_that_cannot_be_read_give_code_1(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "none.pth", tmp_path / "out.pth", target="dinov2")
    assert (code, err) == (1, f"error: {tmp_path}/none.pth: no such file of weights")
