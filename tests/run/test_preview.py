"""`run/preview.py`: the pictures are those of training; sentences and exit codes."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import write_photos
from support.many_channels import NAME as STACKS
from support.many_channels import write_stacks
from support.odd_images import NAME as ODD

from dinov2.configs import load_config
from dinov2.data import make_data_loader, make_dataset
from dinov2.run import preview
from dinov2.run.preview import main, preview_rows
from dinov2.train.build import build_augmentation

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=3",
    "student.patch_size=8",
    "train.batch_size_per_gpu=6",
    "train.seed=3",
)
STAGES = (
    "stages=[{name: near, epochs: 10, crops: {global_crops_size: 24}}, "
    "{name: large, epochs: 10, crops: {global_crops_size: 40}}]"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 9, num_classes=3, size=(40, 30))
    return tmp_path / "photos"


def words(row):
    return [cell.words for cell in row.cells]


def test_crops_and_masks_are_those_of_the_first_batch_of_training(photos):
    cfg = load_config(None, SMALL)
    dataset = make_dataset(f"ImageFolder:root={photos}")
    augmentation = build_augmentation(cfg)
    loader = make_data_loader(dataset, augmentation=augmentation, batch_size=6, patch_size=8, seed=3)
    batch = next(iter(loader))
    masks = batch["collated_masks"]  # [G * B, N]
    batch = augmentation.finish(batch, batch["seeds"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (augmentation.mean, augmentation.std))
    crops = (batch["collated_global_crops"] * std + mean).clamp(0, 1).mul(255).round()  # [G * B, C, H, W]
    rows = preview_rows(dataset, cfg, num_images=6)
    assert len({row.caption for row in rows}) == 6
    for place, row in enumerate(rows):
        share = 100 * masks[place].float().mean()
        assert words(row) == [
            "raw",
            "global crop 1, 32 px",
            "global crop 2, 32 px",
            f"mask: {share:.0f} % of 4 x 4 patches" if share else "mask: none",
            "3 of 3 local crops, 16 px",
        ]
        first, second, masked = (torch.from_numpy(np.array(cell.picture)).permute(2, 0, 1) for cell in row.cells[1:4])
        assert (first.float() - crops[place]).abs().max() <= 1  # rounding of .5
        assert (second.float() - crops[6 + place]).abs().max() <= 1
        changed = (masked != first).any(0).unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).any(2).flatten()
        assert torch.equal(changed, masks[place])
    assert 0 < masks[:6].any(1).sum() < 6  # some are masked, some are not


def test_the_caption_names_path_label_and_size(photos):
    dataset = make_dataset(f"ImageFolder:root={photos}:classes=class_2")
    (row,) = preview_rows(dataset, load_config(None, SMALL), num_images=1)
    assert row.caption.split("   ")[1:] == ["label class_2", "40 x 30 px, 3 x uint8"]
    assert f"{photos}/class_2/photo_000" in row.caption


def test_fewer_images_than_a_batch_are_shown_once_each(photos):
    dataset = make_dataset(f"ImageFolder:root={photos}:classes=class_2")
    assert len(preview_rows(dataset, load_config(None, SMALL), num_images=8)) == 3


def test_training_without_ibot_shows_no_mask(photos):
    cfg = load_config(None, [*SMALL, "ibot.loss_weight=0"])
    (row,) = preview_rows(make_dataset(f"ImageFolder:root={photos}"), cfg, num_images=1)
    assert not any("mask" in text for text in words(row))


def test_dark_images_of_many_channels_are_made_visible(tmp_path):
    write_stacks(tmp_path, 4)
    cfg = load_config(None, [*SMALL, "student.in_chans=5"])
    (row,) = preview_rows(make_dataset(f"{STACKS}:root={tmp_path}", channels=5), cfg, num_images=1)
    assert words(row)[:2] == ["raw, first 3 channels, stretched", "its 5 channels"]
    assert row.caption.endswith("48 x 40 px, 5 x uint16")
    brightness = np.asarray(row.cells[0].picture).reshape(-1, 3)
    assert (brightness.min(0) == 0).all() and (brightness.max(0) == 255).all()


@pytest.mark.parametrize(("number", "mode"), [(1, "L"), (2, "RGB")])
def test_one_and_two_channels_are_shown(number, mode):
    cfg = load_config(None, [*SMALL, f"student.in_chans={number}"])
    dataset = make_dataset(f"{ODD}:kinds=u16", channels=number)
    (row,) = preview_rows(dataset, cfg, num_images=1)
    assert row.cells[0].picture.mode == mode
    if number == 2:
        assert not np.asarray(row.cells[0].picture)[..., 2].any()
        assert words(row)[1] == "its 2 channels"


def test_the_stain_is_shown_before_and_after(tmp_path):
    write_photos(tmp_path, 2, num_classes=1)
    dataset = make_dataset(f"Histology:root={tmp_path}:stain_norm=reinhard+Histology:root={tmp_path}")
    rows = preview_rows(dataset, load_config(None, SMALL), num_images=4)
    normalised = [row for row in rows if words(row)[1] == "stain-normalised"]
    assert len(normalised) == 2
    for row in normalised:
        before, after = (np.asarray(cell.picture, dtype=float) for cell in row.cells[:2])
        assert before.shape == after.shape and abs(before - after).mean() > 2


def test_of_a_huge_image_the_middle_is_shown():
    cfg = load_config(None, [*SMALL, "student.in_chans=1"])
    (row,) = preview_rows(make_dataset(f"{ODD}:kinds=huge", channels=1), cfg, num_images=1)
    assert row.cells[0].picture.size == (4000, 4096)
    assert words(row)[0] == "middle of raw"
    assert row.caption.endswith("4000 x 5000 px, 1 x uint8")


def test_an_unreadable_image_has_its_reason_in_place_of_pictures(tmp_path, photos, capsys):
    (photos / "class_0" / "broken.jpg").write_bytes(b"no image")
    dataset = make_dataset(f"ImageFolder:root={photos}")
    rows = preview_rows(dataset, load_config(None, SMALL), num_images=10)
    (bad,) = (row for row in rows if row.alarm)
    assert bad.alarm == f"image 0 ({photos}/class_0/broken.jpg) cannot be read: not an image of a known format"
    assert len(rows) == 10 and bad.cells == ()
    assert all(len(row.cells) == 5 for row in rows if row is not bad)


def test_the_sheet_is_written_and_depends_on_the_seed(tmp_path, photos, capsys):
    pictures = []
    for number, seed in enumerate(([], ["--seed", "3"], ["--seed", "4"])):
        output = tmp_path / "made" / f"{number}.png"
        argv = ["--dataset", f"ImageFolder:root={photos}", "--output", str(output), "--num-images", "2"]
        assert main([*argv, *seed, *SMALL]) == 0
        assert capsys.readouterr().out == f"written: {output}, 2 of 9 images of ImageFolder:root={photos}\n"
        with Image.open(output) as picture:
            pictures.append(np.asarray(picture))
    assert pictures[0].shape[1] > 5 * 200 and pictures[0].shape[0] > 2 * 200
    assert not np.array_equal(pictures[0][60:], pictures[2][60:])
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("stage", "size_px"), [([], 24), (["--stage", "near"], 24), (["--stage", "large"], 40)], ids=["", "near", "large"]
)
def test_a_stage_shows_its_own_crops_and_without_a_name_it_is_the_first(photos, monkeypatch, stage, size_px):
    sheet = Mock(return_value=Image.new("L", (1, 1)))
    monkeypatch.setattr(preview, "draw_sheet", sheet)
    assert main(["--dataset", f"ImageFolder:root={photos}", "--num-images", "1", *stage, *SMALL, STAGES]) == 0
    (row,), (_, heading) = sheet.call_args.args[0], sheet.call_args.kwargs["heading"]
    assert words(row)[1] == f"global crop 1, {size_px} px"
    assert ("stage large" in heading) == (size_px == 40)


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        (
            ["--stage", "huge", *SMALL, STAGES],
            2,
            "--stage huge: the config has no stage of that name; it has near, large",
        ),
        (["--stage", "large", *SMALL], 2, "--stage large: the config has no stage of that name; it has none"),
        ([], 2, "--dataset is not given; name the images, e.g. ImageFolder:root=photos"),
        (["--dataset", "Digits", "--num-images", "0"], 2, "--num-images 0: must be at least 1"),
        (
            ["--dataset", "Digits", "--output", "sheet.docx", *SMALL],
            2,
            "--output sheet.docx: cannot be written (unknown file extension: .docx); name a .png file",
        ),
        (
            ["--dataset", f"{ODD}:kinds='bad,bad'", *SMALL],
            1,
            "image 0 (image 0) cannot be read: it is out of order",
        ),
        (
            ["--dataset", f"{ODD}:kinds=u8:num_channels=4", *SMALL],
            1,
            "image 0 (image 0) cannot be read: it has 4 channels, but student.in_chans=3; set student.in_chans=4",
        ),
    ],
)
def test_sentences_and_exit_codes(capsys, argv, code, sentence):
    assert main(argv) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


def test_no_picture_goes_into_the_data(photos, capsys):
    assert main(["--dataset", f"ImageFolder:root={photos}", "--output", str(photos / "sheet.png")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --output {photos} lies in the dataset's folder {photos}, where the picture would become one of its "
        "images; choose a folder outside"
    )


def test_the_program_knows_dataset_classes_of_the_current_folder(tmp_path):
    Path("mylab.py").write_text("from support.odd_images import OddImages\n\n\nclass Mine(OddImages):\n    pass\n")
    argv = [sys.executable, ROOT / "run" / "preview.py", "--dataset", "mylab.Mine:kinds=u8", "--num-images", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "here" / "preview.png").is_file()
