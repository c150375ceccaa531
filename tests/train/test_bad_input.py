"""What a user can get wrong: one clear sentence on standard error, exit code 1 or 2, and nothing lost."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.dist import run_distributed
from support.images import write_photos
from support.training import PROGRAM, TINY_RUN, metrics_of, train, train_on_ranks

from dinov2.data.registry import known_datasets
from dinov2.distributed import get_rank
from dinov2.errors import DatasetError
from dinov2.logging import run_program
from dinov2.train.build import require_equal_sizes
from dinov2.train.train import main

IMAGE_FOLDER_KEYS = (
    "root, classes, exclude, label_level, split, val_fraction, test_fraction, split_by, one_per_group, bits"
)
FEW_STEPS = ("train.max_steps=2", "checkpointing.period=1")


def sentence_of(capsys, *arguments, folder, code):
    """Run the program, which must fail with this exit code, and return what it says."""
    capsys.readouterr()
    assert train(folder, *arguments) == code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert not any("Traceback" in line for line in lines)
    return errors[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def good_photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 16)
    return folder


@pytest.fixture
def one_truncated(tmp_path):
    paths = write_photos(tmp_path / "photos", 16)
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    return paths[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run of two steps with two checkpoints and an evaluation; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder, *FEW_STEPS, "evaluation.eval_period_iterations=2") == 0
    return folder


def files_of(folder):
    """All files but the text logs, with their content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            "train.batchsize=3",
            "unknown key train.batchsize on the command line; the nearest known key is train.global_batch_size",
        ),
        ("optim.epochs=many", "optim.epochs='many': must be an integer"),
        (
            "crops.global_crops_size=33",
            "crops.global_crops_size=33 is not a multiple of student.patch_size=8; use 32 or 40",
        ),
        (
            "student.arch=vit_hug",
            "student.arch='vit_hug': must be one of vit_tiny, vit_small, vit_base, vit_large, vit_so400m, vit_huge2, "
            "vit_giant2, vit_7b, resnet18, resnet34, resnet50, resnet101, resnet152",
        ),
        (
            "gram.use_loss=true",
            "gram.use_loss=true needs a Gram teacher; name its weights by gram.ckpt (gram.ckpt=start: those that the "
            "run starts from), or set gram.ema_teacher=true, or gram.it_load_ema_teacher to a step",
        ),
        (
            "anchor.cls_weight=0.5",
            "anchor.cls_weight=0.5 keeps what the weights that the run starts from can do, but these would be random; "
            "name weights by student.pretrained_weights or MODEL.WEIGHTS",
        ),
        (
            "train.dataset_path=",
            "train.dataset_path is empty; name the training images, e.g. train.dataset_path=ImageFolder:root=photos",
        ),
        (
            "train.dataset_path=Imagefolder:root=x",
            f"unknown dataset 'Imagefolder'; did you mean ImageFolder? known are {', '.join(known_datasets())}; "
            "a class of your own is named package.module.Class",
        ),
        (
            "train.dataset_path=ImageFolder",
            f"dataset ImageFolder needs root=...; its keys are {IMAGE_FOLDER_KEYS}",
        ),
        (
            "train.dataset_path=ImageFolder:rot=x",
            f"dataset ImageFolder has no key 'rot'; did you mean root? known are {IMAGE_FOLDER_KEYS}",
        ),
        (
            "train.dataset_path=ImageFolder:root=a:b",
            "dataset string 'ImageFolder:root=a:b': 'b' is not key=value; "
            "put a value that holds a colon in single quotes",
        ),
        (
            "train.batch_size_per_gpu=5000",
            "the global batch of 5000 images (train.batch_size_per_gpu=5000 x 1 ranks x "
            "optim.gradient_accumulation_steps=1) is larger than the dataset of 1198 images; "
            "use a batch of at most 1198",
        ),
        ("--overwrite", "--overwrite removes a run and is only for --no-resume"),
        pytest.param(
            "compute_precision.device=cuda",
            "compute_precision.device=cuda but PyTorch finds no GPU here; use cpu or auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_settings(tmp_path, capsys, option, sentence):
    assert sentence_of(capsys, option, folder=tmp_path / "run", code=2) == sentence


def test_an_output_folder_with_a_tilde(capsys):
    assert sentence_of(capsys, folder="~/run", code=2) == (
        "train.output_dir='~/run': must be written without ~, which only a shell replaces; use ${oc.env:HOME}"
    )


def test_a_global_batch_that_does_not_divide(tmp_path, capsys):
    options = ["train.global_batch_size=10", "optim.gradient_accumulation_steps=4"]
    assert sentence_of(capsys, *options, folder=tmp_path, code=2) == (
        "train.global_batch_size=10 is not a multiple of 4 (ranks=1 x optim.gradient_accumulation_steps=4); use 8 or 12"
    )


@pytest.mark.parametrize(
    ("group_size", "topk", "sentence"),
    [
        (
            5,
            1,
            "dino.koleo_distributed_loss_group_size=5 does not divide the 12 images that all ranks pass through the "
            "network at once; use 4",
        ),
        (
            24,
            1,
            "dino.koleo_distributed_loss_group_size=24 does not divide the 12 images that all ranks pass through the "
            "network at once; use 12",
        ),
        (
            2,
            2,
            "dino.koleo_topk=2 needs groups of at least 3 images, but 2 are compared with each other; lower it, or "
            "raise dino.koleo_distributed_loss_group_size or the batch",
        ),
    ],
)
def test_groups_of_koleo(tmp_path, capsys, group_size, topk, sentence):
    options = [
        "dino.koleo_loss_distributed=true",
        f"dino.koleo_distributed_loss_group_size={group_size}",
        f"dino.koleo_topk={topk}",
    ]
    assert sentence_of(capsys, *options, folder=tmp_path, code=2) == sentence


def test_config_files(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    assert sentence_of(capsys, "--config-file", str(path), folder=tmp_path, code=2) == f"{path}: no such config file"
    path.write_text("train:\n  seed: [1\n")
    assert sentence_of(capsys, "--config-file", str(path), folder=tmp_path, code=2).startswith(
        f"{path}:3: is not valid YAML ("
    )


def test_flags_may_stand_between_settings(tmp_path):
    options = ["train.seed=1", "--no-resume", "train.max_steps=1", "--output-dir", str(tmp_path), "optim.min_lr=0"]
    assert main([*TINY_RUN, *options]) == 0
    assert len(metrics_of(tmp_path)) == 1


def test_folders_without_images(tmp_path, capsys):
    def sentence(folder):
        option = f"train.dataset_path=ImageFolder:root={folder}"
        return sentence_of(capsys, option, folder=tmp_path / "run", code=1)

    assert sentence("/none") == "folder /none does not exist; check root= in the dataset string"
    (tmp_path / "empty").mkdir()
    assert sentence(tmp_path / "empty") == f"folder {tmp_path}/empty is empty"
    (tmp_path / "broken").mkdir()
    for number in range(3):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no image")
    assert sentence(tmp_path / "broken") == (
        f"folder {tmp_path}/broken: none of the first 3 of its 3 images can be read; the first: "
        f"image 0 ({tmp_path}/broken/0.jpg) cannot be read: not an image of a known format"
    )


def test_an_unwritable_output_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sentence_of(capsys, folder=tmp_path / "file" / "run", code=2) == (
        f"train.output_dir={tmp_path}/file/run cannot be written (Not a directory); choose another folder"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_ends_the_run_and_is_named(tmp_path, capsys, one_truncated, workers):
    options = [f"train.dataset_path=ImageFolder:root={one_truncated.parent}", "student.in_chans=3"]
    assert sentence_of(capsys, *options, f"train.num_workers={workers}", folder=tmp_path / "run", code=1) == (
        f"image 3 ({one_truncated}) cannot be read: damaged file (Truncated File Read)"
    )


@pytest.mark.dist
def test_a_truncated_image_on_one_rank_ends_all_with_the_same_sentence(tmp_path, one_truncated):
    options = [f"train.dataset_path=ImageFolder:root={one_truncated.parent}", "student.in_chans=3"]
    done = train_on_ranks(tmp_path / "run", *options, "train.batch_size_per_gpu=4", "train.num_workers=1")
    assert done.returncode == 1
    errors = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    sentence = f"image 3 ({one_truncated}) cannot be read: damaged file (Truncated File Read)"
    assert errors == [f"error: rank 0: {sentence}", f"error: rank 1: {sentence}"]
    assert "dinov2/train/train.py" not in done.stderr.split("torch.distributed.elastic")[0]  # no traceback of ours


def test_truncated_images_are_skipped_counted_and_listed(tmp_path, capsys, one_truncated):
    options = [f"train.dataset_path=ImageFolder:root={one_truncated.parent}", "student.in_chans=3"]
    options += ["train.on_bad_image=skip", "train.OFFICIAL_EPOCH_LENGTH=4"]
    assert train(tmp_path / "run", *options, "train.max_steps=3") == 0
    assert train(tmp_path / "run", *options) == 0  # resumed: listed once all the same
    assert len(metrics_of(tmp_path / "run")) == 4
    listed = tmp_path / "run" / "logs" / "skipped_images.rank0.txt"
    assert listed.read_text() == f"{one_truncated}\n"
    assert "WARNING dinov2.train.batches 1 images could not be read" in capsys.readouterr().err.split("saved")[-1]


def test_a_run_is_not_replaced_by_accident(capsys, finished):
    before = files_of(finished)
    assert sentence_of(capsys, "--no-resume", folder=finished, code=2) == (
        f"train.output_dir={finished} holds a run and --no-resume (train.resume=false) would start anew; "
        f"add --overwrite to remove it, or choose another folder"
    )
    overwrite = ["--no-resume", "--overwrite"]
    sentence_of(capsys, *overwrite, "train.dataset_path=ImageFolder:root=/none", folder=finished, code=1)
    sentence_of(capsys, *overwrite, "student.pretrained_weights=/none.pth", folder=finished, code=1)
    sentence_of(capsys, *overwrite, "--eval-only", folder=finished, code=2)
    assert files_of(finished) == before


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    assert train(tmp_path, *FEW_STEPS, "evaluation.eval_period_iterations=1") == 0
    kept = [tmp_path / "notes.txt", tmp_path / "eval" / "notes.txt", tmp_path / "eval" / "training_1" / "notes.txt"]
    for path in kept:
        path.write_text("mine")
    assert train(tmp_path, "--no-resume", "--overwrite", "train.max_steps=1") == 0
    assert [path.read_text() for path in kept] == ["mine"] * 3
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [0]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == [
        "model_0000000.manifest.json",
        "model_0000000.rank_0.pth",
    ]
    assert not (tmp_path / "eval" / "training_0").exists()


def test_weights_that_are_missing_or_do_not_fit(tmp_path, capsys, finished):
    teacher = finished / "eval" / "training_1" / "teacher_checkpoint.pth"

    def sentence(*options):
        return sentence_of(capsys, *options, folder=tmp_path / "run", code=1)

    assert sentence("student.pretrained_weights=/none.pth") == "/none.pth: no such file of weights"
    given = f"student.pretrained_weights={teacher}"
    assert sentence(given, "student.num_register_tokens=4") == (
        f"{teacher}: it has 0 register tokens but the model has 4; set student.num_register_tokens=0"
    )
    assert sentence(given, "student.embed_dim=48") == (
        f"{teacher}: its embedding has 32 features but the model's has 48; set student.embed_dim=32"
    )

    assert sentence("MODEL.WEIGHTS=/none.pth") == "/none.pth: no such file of weights"
    assert sentence(f"MODEL.WEIGHTS={teacher}", "dino.head_n_prototypes=16") == (
        f"MODEL.WEIGHTS={teacher}: dino_head cannot be loaded, it has 32 prototypes, the model 16; "
        "use student.pretrained_weights to start from the backbone"
    )
    backbone = tmp_path / "backbone.pth"
    given = torch.load(teacher, weights_only=True)["teacher"]
    torch.save({name: tensor for name, tensor in given.items() if name.startswith("backbone.")}, backbone)
    assert sentence(f"MODEL.WEIGHTS={backbone}") == (
        f"MODEL.WEIGHTS={backbone}: dino_head cannot be loaded, the file has none; "
        "use student.pretrained_weights to start from the backbone"
    )
    assert sentence("train.resume_path=/none/model_0000001.rank_{rank}.pth") == (
        "train.resume_path=/none/model_0000001.rank_{rank}.pth: model_0000001: there is no model_0000001.manifest.json "
        "in /none, so it is not complete; name another, such as outputs/run1/model_0003749"
    )


def test_nothing_to_evaluate(tmp_path, capsys):
    assert sentence_of(capsys, "--eval-only", folder=tmp_path, code=1) == (
        f"train.output_dir={tmp_path} holds no complete checkpoint to evaluate; "
        "name the folder of a run, or weights by MODEL.WEIGHTS"
    )


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    assert train(tmp_path, *FEW_STEPS) == 0
    newest, older = tmp_path / "model_0000001.rank_0.pth", tmp_path / "model_0000000.rank_0.pth"
    content = bytearray(newest.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 500)  # more than the space between two tensors
    content[middle] = bytes(500)
    newest.write_bytes(content)
    capsys.readouterr()
    assert train(tmp_path, *FEW_STEPS) == 0
    log = capsys.readouterr().err
    assert "WARNING dinov2.fsdp.checkpointer model_0000001 is damaged, trying the one before it" in log
    assert "resuming at step 1 of 2" in log
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [0, 1]
    for path in (newest, older):
        path.write_bytes(b"")
    assert sentence_of(capsys, *FEW_STEPS, folder=tmp_path, code=1) == (
        f"none of the 2 checkpoints in {tmp_path} is sound "
        "(model_0000001.rank_0.pth has 0 bytes but "
        f"{len(content)} were written); pass --no-resume to start again"
    )


def test_a_full_disk(tmp_path, capsys):
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        sentence = sentence_of(capsys, "checkpointing.period=2", folder=tmp_path, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sentence == (
        f"model_0000001 could not be written to {tmp_path} (rank 0: File too large); earlier checkpoints are intact"
    )
    assert not list(tmp_path.glob("model_*"))

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # not even the log file has room
    try:
        assert run_program(lambda argv: len(Path(argv[0]).write_bytes(bytes(200))), [str(tmp_path / "file")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "error: cannot write (File too large); free some space and start again\n"


def test_each_sentence_is_shown_once_by_the_real_program(tmp_path):
    command = [sys.executable, str(PROGRAM), "--output-dir", str(tmp_path), "optim.epoch=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: unknown key optim.epoch on the command line; the nearest known key is optim.epochs\n"
    )


def sizes_differ():
    try:
        require_equal_sizes(range(3 + get_rank()))
    except DatasetError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_ranks_that_see_different_data_all_stop():
    assert run_distributed(sizes_differ) == 2 * [
        "the processes find different numbers of images (3, 4): the data changed while they were opened, or a node "
        "sees another folder; start again once all see the same"
    ]
