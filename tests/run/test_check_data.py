"""`run/check_data.py`: what it finds out, its sentences and its exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.images import photo, write_photos
from support.many_channels import NAME as STACKS
from support.many_channels import write_stacks
from support.odd_images import NAME as ODD

from dinov2.configs import load_config
from dinov2.run.check_data import main

ROOT = Path(__file__).resolve().parents[2]
IN_ONE_PROCESS = "train.num_workers=0"
SMALL_CROPS = ("crops.global_crops_size=16", "crops.local_crops_size=16")


def check(capsys, tmp_path, *argv):
    """Return the exit code, what is printed, the sentences of errors, and the report."""
    report = tmp_path / "out" / "check_data.json"
    code = main([*map(str, argv), "--output-dir", str(tmp_path / "out"), "train.batch_size_per_gpu=1", *SMALL_CROPS])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return code, captured.out, errors, json.loads(report.read_text()) if report.exists() else {}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 9, num_classes=3, size=(40, 30))
    return tmp_path / "photos"


def test_a_good_folder_is_described(tmp_path, photos, capsys):
    photo(50, size=(20, 60)).convert("L").save(photos / "class_0" / "grey.png")
    code, out, errors, report = check(capsys, tmp_path, "--dataset", f"ImageFolder:root={photos}", IN_ONE_PROCESS)
    assert (code, errors) == (0, [])
    assert out.splitlines()[:7] == [
        f"dataset         ImageFolder:root={photos}",
        "images          10",
        "sizes           40 x 30 px (9), 20 x 60 px (1)",
        "channels        3",
        "bits a channel  8",
        f"highest value   {report['sets'][0]['highest_value']['8']} of 255",
        "stored as       JPEG, 3 channels, 8 bits (9); PNG, 1 channel, 8 bits (1)",
    ]
    assert out.splitlines()[7] == "labels          class_0 (4), class_1 (3), class_2 (3)"
    assert out.splitlines()[-1] == "nothing here would make training fail (0 warnings)"
    with Image.open(tmp_path / "out" / "check_data.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10  # something was drawn


def test_mean_and_std_are_those_of_the_images_and_go_into_a_config(tmp_path, photos, capsys):
    photo(50, size=(50, 80)).save(photos / "class_0" / "larger.png")  # counts as much as the others
    means, squares = [], []
    for path in sorted(photos.rglob("*.*g")):
        values = np.asarray(Image.open(path), dtype=np.float64) / 255
        means.append(values.mean((0, 1)))
        squares.append((values**2).mean((0, 1)))
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.mean(squares, axis=0) - mean**2)
    reports = []
    for num_workers in (0, 2):
        code, out, _, report = check(
            capsys, tmp_path, "--dataset", f"ImageFolder:root={photos}", f"train.num_workers={num_workers}"
        )
        np.testing.assert_allclose(report["sets"][0]["mean"], mean, atol=1e-12)
        np.testing.assert_allclose(report["sets"][0]["std"], std, atol=1e-12)
        reports.append(report)
    assert reports[0] == reports[1]
    (line,) = (line for line in out.splitlines() if line.startswith("augmentation: "))
    (tmp_path / "config.yaml").write_text(line)
    np.testing.assert_allclose(load_config(str(tmp_path / "config.yaml")).augmentation.mean, mean, rtol=1e-3)


def test_tiny_and_missing_spreads_are_written_so_that_yaml_reads_numbers(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        values = np.zeros((8, 8), dtype=np.uint16)
        values[0, 0] = number
        Image.fromarray(values).save(data / f"{number}.png")
    _, out, _, _ = check(
        capsys, tmp_path, "--dataset", f"ImageFolder:root={data}:bits=16", "student.in_chans=1", IN_ONE_PROCESS
    )
    (line,) = (line for line in out.splitlines() if line.startswith("augmentation: "))
    assert line == "augmentation: {mean: [0.0000001192], std: [0.000001343]}"
    assert yaml.safe_load(line)["augmentation"]["std"] == [0.000001343]
    Image.new("L", (8, 8)).save(data / "0.png")
    (data / "1.png").unlink()
    _, out, _, _ = check(capsys, tmp_path, "--dataset", f"ImageFolder:root={data}", "student.in_chans=1")
    assert "augmentation: {mean: [0.0], std: [1.0]}" in out.splitlines()  # a config takes no std of 0


def test_unreadable_images_are_a_problem_unless_they_are_skipped(tmp_path, photos, capsys):
    (photos / "class_1" / "broken.jpg").write_bytes(b"no image")
    (photos / "class_1" / "empty.png").touch()
    argv = ("--dataset", f"ImageFolder:root={photos}", IN_ONE_PROCESS)
    code, out, errors, report = check(capsys, tmp_path, *argv)
    found = f"2 images cannot be read; the first is {photos}/class_1/broken.jpg: not an image of a known format"
    assert (code, errors) == (
        1,
        [f"error: ImageFolder:root={photos}: {found}; repair or remove what is broken, or set train.on_bad_image=skip"],
    )
    assert report["problems"] == [errors[0].removeprefix("error: ")]
    assert report["sets"][0]["unreadable"][1] == {
        "path": f"{photos}/class_1/empty.png",
        "reason": "the file is empty",
    }
    code, out, errors, _ = check(capsys, tmp_path, *argv, "train.on_bad_image=skip")
    assert (code, errors) == (0, [])
    skipped = found.replace("read;", "read and will be skipped;")
    assert f"warning: ImageFolder:root={photos}: {skipped}" in out.splitlines()


def test_a_set_of_which_nothing_can_be_read_fails_even_with_skipping(tmp_path, capsys):
    code, _, errors, _ = check(capsys, tmp_path, "--dataset", f"{ODD}:kinds='bad,bad'", "train.on_bad_image=skip")
    assert (code, errors) == (
        1,
        [f"error: {ODD}:kinds='bad,bad': none of 2 images can be read; the first is image 0: it is out of order"],
    )


def test_files_that_occur_twice_are_found_in_a_set_and_are_a_leak_between_sets(tmp_path, photos, capsys):
    shutil.copy(photos / "class_0" / "photo_0000.jpg", photos / "class_2" / "copy.jpg")
    other = tmp_path / "other"
    write_photos(other, 2, size=(50, 50))
    shutil.copy(photos / "class_1" / "photo_0001.jpg", other / "stolen.jpg")
    first, second = f"ImageFolder:root={photos}", f"ImageFolder:root={other}"
    code, out, errors, report = check(capsys, tmp_path, "--dataset", first, "--against", second, IN_ONE_PROCESS)
    pair = [f"{photos}/class_0/photo_0000.jpg", f"{photos}/class_2/copy.jpg"]
    assert report["sets"][0]["duplicates"] == {"num_images": 1, "groups": [pair]}
    assert f"warning: {first} holds 1 image more than once, the first {pair[0]} and {pair[1]}" in out.splitlines()
    shared = [f"{photos}/class_1/photo_0001.jpg", f"{other}/stolen.jpg"]
    assert report["in_common"][0]["pairs"] == [shared]
    assert (code, errors) == (
        1,
        [
            f"error: {first} and {second} share 1 image, the first {shared[0]} and {shared[1]}; remove what is shared "
            "from one of them"
        ],
    )


def test_splits_of_one_folder_share_nothing(tmp_path, photos, capsys):
    one, other = (f"ImageFolder:root={photos}:split={split}:val_fraction=0.5" for split in ("train", "val"))
    code, out, errors, report = check(capsys, tmp_path, "--dataset", one, "--against", other, IN_ONE_PROCESS)
    assert (code, errors) == (0, [])
    assert sum(found["num_images"] for found in report["sets"]) == 9
    assert f"in both  {one} and {other}\nimages   0\n" in out


def test_a_group_in_two_splits_is_a_problem(tmp_path, capsys):
    for patient in ("p1", "p2"):
        for kind in ("scan", "x_ray"):
            write_photos(tmp_path / "data" / patient / kind, 1, size=(30, 30 + len(list(tmp_path.rglob("*.jpg")))))
    base = f"ImageFolder:root={tmp_path / 'data'}:label_level=2:split_by=level1"
    one, other = f"{base}:classes=scan", f"{base}:classes=x_ray"
    code, _, errors, _ = check(capsys, tmp_path, "--dataset", one, "--against", other, IN_ONE_PROCESS)
    assert (code, errors) == (
        1,
        [
            f"error: level1 'p1' and 1 more has images both in {one} and in {other}, which lets one split give the "
            "other's answers away; move each level1 to one of them"
        ],
    )


def test_images_of_nothing_in_two_sets_are_no_leak(tmp_path, photos, capsys):
    for folder in (photos / "class_0", tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (250, 250, 250)).save(folder / "white.png")
    write_photos(tmp_path / "other", 2, size=(30, 30))
    first, second = f"ImageFolder:root={photos}", f"ImageFolder:root={tmp_path / 'other'}"
    code, out, errors, report = check(capsys, tmp_path, "--dataset", first, "--against", second, IN_ONE_PROCESS)
    assert (code, errors) == (0, [])
    assert report["in_common"][0]["common_images"] == {"num_images": 1, "num_nearly_constant": 1}
    assert (
        f"warning: {first} holds 1 nearly constant image, from which nothing is learnt; the first is "
        f"{photos}/class_0/white.png"
    ) in out.splitlines()


def test_images_without_files_of_their_own_are_compared_by_their_pixels(tmp_path, capsys):
    one, other = f"{ODD}:kinds='grey1,grey2,grey1':one_file=true", f"{ODD}:kinds='grey3,grey2':one_file=true"
    code, _, errors, report = check(
        capsys, tmp_path, "--dataset", one, "--against", other, "student.in_chans=1", IN_ONE_PROCESS
    )
    assert report["sets"][0]["duplicates"]["num_images"] == 1
    assert (code, errors) == (
        1,
        [f"error: {one} and {other} share 1 image, the first stack.tif; remove what is shared from one of them"],
    )


def test_a_sample_is_the_same_each_time_and_files_are_compared_whole(tmp_path, photos, capsys):
    shutil.copy(photos / "class_0" / "photo_0000.jpg", photos / "class_2" / "copy.jpg")
    argv = ("--dataset", f"ImageFolder:root={photos}", "--sample", "3", IN_ONE_PROCESS)
    first, second = (check(capsys, tmp_path, *argv)[3]["sets"][0] for _ in range(2))
    assert first == second
    assert (first["num_images"], first["num_checked"]) == (10, 3)
    assert first["duplicates"]["num_images"] == 1


def test_images_of_other_channels_than_the_network_are_a_problem(tmp_path, capsys):
    write_stacks(tmp_path / "stacks", 4)
    name = f"{STACKS}:root={tmp_path / 'stacks'}:trusting=true"
    code, _, errors, report = check(capsys, tmp_path, "--dataset", name, IN_ONE_PROCESS)
    assert (code, errors) == (
        1,
        [f"error: {name}: its images have 5 channels, but student.in_chans=3; set student.in_chans=5"],
    )
    found = report["sets"][0]
    assert (found["channels"], found["bits"]) == ({"5": 4}, {"16": 4})
    assert len(found["mean"]) == len(found["std"]) == 5


def test_images_that_no_batch_can_hold_together_are_a_problem(tmp_path, capsys):
    name = f"{ODD}:kinds='u8,u16,grey'"
    code, _, errors, _ = check(capsys, tmp_path, "--dataset", name, IN_ONE_PROCESS)
    assert (code, errors) == (
        1,
        [
            f"error: {name}: its images have 1 channel (1 image) and 3 channels (2 images), but a batch needs images "
            "of one kind; train on each kind by itself",
            f"error: {name}: its images have 8 bits (2 images) and 16 bits (1 image) a channel, but a batch needs "
            "images of one kind; store all alike, or set bits=8 or bits=16 in the dataset string where the dataset "
            "takes it",
        ],
    )


def test_pixels_of_another_type_are_unreadable(tmp_path, capsys):
    _, _, _, report = check(capsys, tmp_path, "--dataset", f"{ODD}:kinds='u8,float'", IN_ONE_PROCESS)
    assert report["sets"][0]["unreadable"] == [
        {
            "path": "image 1",
            "reason": "it is a tensor of 3 x 20 x 24 torch.float64, but must be uint8 or uint16 of C x H x W",
        }
    ]


def test_a_huge_image_is_read_in_parts(tmp_path, capsys):
    code, _, errors, report = check(
        capsys, tmp_path, "--dataset", f"{ODD}:kinds=huge", "student.in_chans=1", IN_ONE_PROCESS
    )
    assert (code, errors) == (0, [])
    assert report["sets"][0]["sizes"]["most_frequent"] == [{"width": 4000, "height": 5000, "num_images": 1}]
    np.testing.assert_allclose(report["sets"][0]["mean"], [99.5 / 255], atol=1e-12)


def test_a_huge_image_whose_crops_are_too_large_is_a_problem(tmp_path, capsys):
    name = f"{ODD}:kinds=huge"
    options = ("student.in_chans=1", IN_ONE_PROCESS, "data.max_image_pixels=19999999")
    code, _, errors, _ = check(capsys, tmp_path, "--dataset", name, *options)
    assert (code, errors) == (
        1,
        [
            f"error: {name}: 1 image may need global crops of more than data.max_image_pixels=19999999; the first is "
            "image 0; take tiles where the dataset has tile_px=, lower crops.global_crops_scale, or raise the limit"
        ],
    )
    assert check(capsys, tmp_path, "--dataset", name, *options, "crops.global_crops_scale=[0.3, 0.9]")[0] == 0


def test_what_one_probably_wants_to_know_is_a_warning(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for number in range(3):
        values = np.asarray(photo(number, size=(12, 14)).convert("L"), dtype=np.uint16) * 257
        Image.fromarray(values).save(tmp_path / "data" / f"{number}.png")
    name = f"ImageFolder:root={tmp_path / 'data'}"
    code, out, _, _ = check(capsys, tmp_path, "--dataset", name, IN_ONE_PROCESS)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == [
        f"warning: {name} holds 3 files of more than 8 bits a channel, of which 8 are read; bits=16 in the dataset "
        "string keeps more where the dataset takes it",
        f"warning: all images of {name} are grey in 3 equal channels; student.in_chans=1 says the same with less",
        f"warning: {name} holds 3 images smaller than crops.global_crops_size=16 px; crops of them are enlarged",
    ]


def test_a_batch_larger_than_the_set_is_a_problem(tmp_path, photos, capsys):
    argv = ("--dataset", f"ImageFolder:root={photos}", IN_ONE_PROCESS, "optim.gradient_accumulation_steps=10")
    code, _, errors, _ = check(capsys, tmp_path, *argv)
    assert (code, errors) == (
        1,
        [
            "error: the global batch of 10 images (train.batch_size_per_gpu=1 x 1 ranks x "
            "optim.gradient_accumulation_steps=10) is larger than the dataset of 9 images; use a batch of at most 9"
        ],
    )


def test_names_that_are_no_text_are_shown_as_escapes(tmp_path, photos, capsys):
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        shutil.copy(photos / "class_0" / "photo_0000.jpg", os.path.join(os.fsencode(photos), b"class_0", name))
    code, out, errors, report = check(capsys, tmp_path, "--dataset", f"ImageFolder:root={photos}", IN_ONE_PROCESS)
    assert (code, errors) == (0, [])
    names = r"class_0/caf\udce9.jpg = ", "class_0/photo_0000.jpg = ", r"class_0/two\nlines.jpg"
    assert all(name in out for name in names)
    assert os.fsencode(report["sets"][0]["duplicates"]["groups"][0][0]).endswith(b"caf\xe9.jpg")


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        ([], 2, "--dataset is not given; name the images, e.g. ImageFolder:root=photos"),
        (["--dataset", "Digits", "--sample", "0"], 2, "--sample 0: must be at least 1 image"),
        (
            ["--dataset", "ImageFolder:root=nowhere"],
            1,
            "folder nowhere does not exist; check root= in the dataset string",
        ),
        (
            ["--dataset", "Digits", "--output-dir", __file__],
            2,
            f"--output-dir {__file__}: cannot be made (File exists); choose another",
        ),
    ],
)
def test_sentences_and_exit_codes(capsys, argv, code, sentence):
    assert main(argv) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


def test_no_picture_goes_into_the_data(tmp_path, photos, capsys):
    assert main(["--dataset", f"ImageFolder:root={photos}+Digits", "--output-dir", str(photos / "report")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --output-dir {photos}/report lies in the dataset's folder {photos}, where the picture would become "
        "one of its images; choose a folder outside"
    )
    assert len(list(photos.rglob("*.png"))) == 0


def test_keys_behind_a_list_of_sets_are_keys(tmp_path, capsys):
    argv = ("--dataset", "Digits:split=TRAIN", "--against", "Digits:split=VAL", "student.in_chans=1", "--sample", "5")
    code, out, errors, report = check(capsys, tmp_path, *argv)
    assert (code, errors) == (0, [])
    assert [found["channels"] for found in report["sets"]] == [{"1": 5}, {"1": 5}]


def test_the_program_knows_dataset_classes_of_the_current_folder(tmp_path):
    Path("mylab.py").write_text("from support.odd_images import OddImages\n\n\nclass Mine(OddImages):\n    pass\n")
    argv = [sys.executable, ROOT / "run" / "check_data.py", "--dataset", "mylab.Mine:kinds=u8"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "check_data.json",
        "check_data.png",
        "mylab.py",
    ]
