"""The recipes for ViT-S/14, from real weights, through all of their stages, on images in the layout of each domain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.bbbc021 import make_bbbc021
from support.industrial_json import make_grouped_json
from support.real_images import clipart_folder, hyperspy_folder, write_histology_tiles
from support.training import losses_of, metrics_of

ROOT = Path(__file__).resolve().parents[2]
FEW_STEPS = (
    "train.OFFICIAL_EPOCH_LENGTH=1",
    "train.batch_size_per_gpu=4",
    "train.num_workers=0",
    "train.prototype_init_crops=64",
    "train.sinkhorn_queue_size=16",
    "dino.head_n_prototypes=16",
    "ibot.head_n_prototypes=16",
    "crops.global_crops_size=112",
    "crops.local_crops_size=56",
    "crops.local_crops_number=2",
    "evaluation.eval_period_iterations=10",
    "evaluation.health.num_images=16",
)

pytestmark = pytest.mark.integration


def drawings(root):
    return {"train": f"ImageFolder:root='{clipart_folder()}'"}


def micrographs(root):
    files = hyperspy_folder() / "tests" / "io" / "tiff_files"
    return {"train": f"EMFolder:root='{files}':scaling=percentile:low=0.1:high=99.9"}


def tissue(root):
    write_histology_tiles(root)
    tiles = f"Histology:csv=files.csv:label_col=label:root='{root}':stain_norm=reinhard"
    return {
        "train": tiles,
        "voting": f"{tiles}:split=train:val_fraction=0.3",
        "val": f"{tiles}:split=val:val_fraction=0.3",
    }


def cells(root):
    make_bbbc021(root, size=(256, 256))
    fields = f"BBBC021:root='{root}':scaling=plate"
    labelled = "labelled_only=true:controls=drop:split_by=image"
    return {"train": fields, "voting": f"{fields}:split=train:{labelled}", "val": f"{fields}:split=val:{labelled}"}


def plates(root):
    make_grouped_json(root, size=(160, 120))
    photographs = f"GroupedJSON:root='{root}'"
    return {
        "train": f"{photographs}:split=TRAIN",
        "voting": f"{photographs}:split=TRAIN",
        "val": f"{photographs}:split=VAL",
    }


@pytest.mark.parametrize(
    ("recipe", "images"),
    [
        ("adapt_vits14_cpu", drawings),
        ("em", micrographs),
        ("histology", tissue),
        ("bbbc021", cells),
        ("industrial_json", plates),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_trains_real_weights_through_its_stages(weights, tmp_path, recipe, images):
    strings = images(tmp_path / "images")
    options = [*FEW_STEPS, f"student.pretrained_weights={weights}", f"train.dataset_path={strings['train']}"]
    if "val" in strings:
        options += [
            f"evaluation.knn.train_dataset_path={strings['voting']}",
            f"evaluation.knn.val_dataset_path={strings['val']}",
            "evaluation.knn.image_size_px=112",
            "evaluation.knn.nb_knn=[3]",
        ]
    run = tmp_path / "run"
    command = [sys.executable, "dinov2/train/train.py", "--config-file", f"configs/train/{recipe}.yaml"]
    done = subprocess.run([*command, "--output-dir", str(run), *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.isfinite(losses_of(run)).all()
    steps = metrics_of(run)
    assert [row["stage"] for row in steps] == [1] + [2] * 9
    assert [row["backbone_lr_factor"] > 0 for row in steps] == [False] + [True] * 9
    start, best = (
        torch.load(run / name, weights_only=True)["teacher"]
        for name in ("eval/start/teacher_checkpoint.pth", "best_teacher.pth")
    )
    assert start.keys() == best.keys()
    chosen = json.loads((run / "best.json").read_text())
    assert chosen["evaluation"] in ("start", "training_9")
    name = "backbone.blocks.11.attn.qkv.weight"
    assert torch.equal(start[name], best[name]) == (chosen["evaluation"] == "start")
    assert (run / "eval" / "training_9" / "results_eval_knn.json").is_file() == ("val" in strings)
