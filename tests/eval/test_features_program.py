"""`eval/features.py` on photographs, and the files it writes for use elsewhere."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.evaluation import MODEL, SIZES, fails_with, write_tiny_backbone
from support.images import write_photos

from dinov2.errors import ConfigError
from dinov2.eval.feature_export import save_features
from dinov2.eval.feature_files import open_feature_set
from dinov2.eval.features import main
from dinov2.models import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    write_tiny_backbone(tmp_path / "w")
    write_photos(tmp_path / "photos", 7, num_classes=2, size=(24, 20))
    return tmp_path


def arguments(folder, *more, dataset=None):
    fixed = ["--pretrained-weights", str(folder / "w"), "--output-dir", str(folder / "out"), "--num-workers", "0"]
    return [*fixed, "--dataset", dataset or f"ImageFolder:root={folder}/photos", *more, *MODEL, *SIZES]


def kept(folder):
    (path,) = (folder / "out" / "features").glob("*.safetensors")
    return open_feature_set(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".csv"])
def test_program_keeps_and_writes_features(folder, capsys, suffix):
    output = folder / "new" / f"features{suffix}"
    assert main(arguments(folder, "--pool", "cls+mean", "--output", str(output))) == 0
    lines = capsys.readouterr().out.splitlines()
    name = f"ImageFolder:root={folder}/photos"
    assert lines[0].startswith(
        f"{name}: 7 x 96 float32 (cls+mean, 0.0 MiB), 7 with a label, in {folder}/out/features, "
    )
    assert lines[1] == f"written: {output} (0.0 MiB)"
    found = kept(folder)
    if suffix == ".npz":
        with np.load(output) as file:
            values, targets, paths = file["features"], file["targets"], file["column_path"].tolist()
            assert file["class_names"].tolist() == ["class_0", "class_1"]
    elif suffix == ".safetensors":
        with safe_open(output, framework="np") as file:
            values, targets = file.get_tensor("features"), file.get_tensor("targets")
            paths = json.loads(file.metadata()["columns"])["path"]
    else:
        rows = list(csv.DictReader(output.open()))
        values = np.array([[row[f"f{i}"] for i in range(96)] for row in rows], dtype=np.float32)
        targets, paths = np.array([int(row["target"]) for row in rows]), [row["path"] for row in rows]
        assert [row["class"] for row in rows] == [Path(path).parent.name for path in paths]
    assert np.array_equal(values, found.values.numpy()) and np.array_equal(targets, found.targets)
    assert paths == found.columns["path"].tolist() and len(list(output.parent.iterdir())) == 1


def test_several_datasets_and_number_formats(folder, capsys):
    more = ["Digits:split=VAL", "evaluation.knn.resize_ratio=1", "--features-dtype", "bf16"]
    assert main(arguments(folder, *more)) == 0
    assert [line.split(": ")[1].split(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        "7 x 48 bfloat16",
        "599 x 48 bfloat16",
    ]


def test_bad_usage_is_one_sentence_and_code_2(folder, capsys):
    args = arguments(folder)
    assert fails_with(main, capsys, [*args, "--output", "f.txt"], code=2) == (
        "error: f.txt: features are written as .npz, .safetensors or .csv"
    )
    assert fails_with(main, capsys, [*args, "--output", "f.csv", "--pool", "patches"], code=2).startswith(
        "error: f.csv: a table has one row for an image"
    )
    assert fails_with(main, capsys, [*args, "--pool", "last0"], code=2).startswith(
        "error: pool 'last0': must be one of cls,"
    )
    assert fails_with(main, capsys, [*args, "--pool", "last5"], code=2) == (
        "error: pool 'last5': the backbone has only 2 blocks"
    )
    place = args.index("--dataset")
    assert fails_with(main, capsys, args[:place], code=2) == (
        "error: --dataset is not given; name the images, e.g. ImageFolder:root=photos"
    )
    both = arguments(folder, "Digits:split=VAL", "--output", "f.npz")
    assert fails_with(main, capsys, both, code=2) == "error: --output f.npz: takes one --dataset, and 2 are given"
    assert fails_with(main, capsys, arguments(folder, "--features-dir", str(folder / "w")), code=2).startswith(
        f"error: --features-dir {folder}/w: cannot be written ("
    )


def test_resnets_have_one_pool(folder, capsys):
    network = [
        "student.arch=resnet18",
        "student.embed_dim=null",
        "student.depth=null",
        "student.num_heads=null",
        "ibot.loss_weight=0",
    ]
    model = build_model("resnet18")
    torch.save(model.state_dict(), folder / "w")
    args = [*arguments(folder), *network]
    assert fails_with(main, capsys, [*args, "--pool", "cls+mean"], code=2) == (
        "error: pool 'cls+mean': a ResNet has one feature for an image, its mean over the map; use cls"
    )
    assert main(args) == 0
    assert kept(folder).values.shape == (7, 512)


def test_features_of_ones_own_are_written(tmp_path):
    values = torch.arange(6, dtype=torch.bfloat16).reshape(3, 2)
    save_features(tmp_path / "f.npz", values, [1, -1, 0], columns={"plate": np.array(["a", "b", "c"])})
    with np.load(tmp_path / "f.npz") as file:
        assert file["features"].dtype == np.float32 and file["features"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert file["targets"].tolist() == [1, -1, 0] and file["column_plate"].tolist() == ["a", "b", "c"]
    save_features(tmp_path / "f.csv", values)
    assert (tmp_path / "f.csv").read_text().splitlines() == ["target,f0,f1", "-1,0.0,1.0", "-1,2.0,3.0", "-1,4.0,5.0"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_features(tmp_path / "file" / "f.npz", values)


def test_help_tells_defaults():
    done = subprocess.run([sys.executable, ROOT / "eval" / "features.py", "--help"], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for part in ("default: cls", "default: fp32", "default: OUTPUT_DIR/features", "(default 256)", "default: teacher"):
        assert part in text
