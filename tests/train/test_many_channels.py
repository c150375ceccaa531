"""Images of five channels of 16 bits through all of training: crops, statistics, weights of three channels, k-NN."""

import pytest
import torch
from support.many_channels import NAME, write_stacks
from support.training import metrics_of, train

from dinov2.models import build_model

STATISTICS = ("augmentation.mean=[0.02, 0.03, 0.05, 0.09, 0.1]", "augmentation.std=[0.01, 0.01, 0.02, 0.04, 0.05]")
LEFT_OUT = "saturation, hue and grey are left out: they act on 3 channels, and student.in_chans=5"


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    root = tmp_path_factory.mktemp("stacks")
    write_stacks(root, 24)
    return f"{NAME}:root={root}"


def five_channels(stacks, *more):
    return (
        f"train.dataset_path={stacks}",
        "student.in_chans=5",
        "train.batch_size_per_gpu=4",
        "train.OFFICIAL_EPOCH_LENGTH=3",
        *more,
    )


def test_five_channels_of_16_bits_are_trained_on_and_evaluated(tmp_path, stacks):
    knn = (
        f"evaluation.knn.train_dataset_path={stacks}:split=train",
        f"evaluation.knn.val_dataset_path={stacks}:split=val",
        "evaluation.knn.nb_knn=[1]",
        "evaluation.eval_period_iterations=3",
    )
    assert train(tmp_path, *five_channels(stacks, *STATISTICS, *knn)) == 0
    rows = metrics_of(tmp_path)
    assert len(rows) == 3
    assert all(torch.isfinite(torch.tensor(row["total_loss"])) for row in rows)
    # the classes differ in their channels' brightness, so that five channels must have reached the features
    assert rows[-1]["knn_top1_pct"] >= 90
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert log.count(LEFT_OUT) == 1


def test_three_channels_and_an_augmentation_without_colours_are_not_spoken_of(tmp_path, stacks):
    colourless = ("augmentation.saturation=0", "augmentation.hue=0", "augmentation.grayscale_probability=0")
    assert train(tmp_path / "five", *five_channels(stacks, *colourless, "train.max_steps=1")) == 0
    assert "left out" not in (tmp_path / "five" / "logs" / "log.txt").read_text()
    assert train(tmp_path / "three", "student.in_chans=3", "train.max_steps=1") == 0
    assert "left out" not in (tmp_path / "three" / "logs" / "log.txt").read_text()


def test_weights_of_three_channels_are_inflated_to_five_and_the_log_says_so(tmp_path, stacks):
    backbone = build_model(
        "vit_tiny", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32, in_chans=3, init_values=0.1
    )
    torch.save(backbone.state_dict(), tmp_path / "rgb.pth")
    weights = f"student.pretrained_weights={tmp_path / 'rgb.pth'}"
    assert train(tmp_path / "run", *five_channels(stacks, weights, "train.max_steps=1", "optim.base_lr=0")) == 0
    assert "patch_embed.proj.weight: 3 -> 5 channels" in (tmp_path / "run" / "logs" / "log.txt").read_text()
    saved = torch.load(tmp_path / "run" / "model_0000000.rank_0.pth", weights_only=True)["model"]
    trained = saved["student.backbone.patch_embed.proj.weight"]
    assert trained.shape == (32, 5, 8, 8)
    # five equal channels give what three equal channels gave
    torch.testing.assert_close(trained.sum(1), backbone.patch_embed.proj.weight.sum(1), atol=1e-6, rtol=1e-5)


def test_a_wrong_number_of_channels_is_one_sentence_of_the_dataset(tmp_path, stacks, capsys):
    assert train(tmp_path, *five_channels(stacks, "student.in_chans=3")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: student.in_chans=3: dataset Stacks gives 5 channels"


def test_a_wrong_number_of_channels_is_found_in_the_images_of_a_dataset_that_does_not_tell(tmp_path, stacks, capsys):
    assert train(tmp_path, *five_channels(f"{stacks}:trusting=true", "student.in_chans=3")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: image ")
    assert last.endswith(".tif) cannot be read: it has 5 channels, but student.in_chans=3; set student.in_chans=5")


def test_a_damaged_image_is_named(tmp_path, capsys):
    write_stacks(tmp_path / "data", 8)
    broken = tmp_path / "data" / "class_0" / "004.tif"
    broken.write_bytes(broken.read_bytes()[:200])
    options = five_channels(f"{NAME}:root={tmp_path / 'data'}", "train.batch_size_per_gpu=8")
    assert train(tmp_path / "run", *options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: image 2 ({broken}) cannot be read: damaged TIFF file (")
