"""Gram anchoring and the feature anchor: settings that contradict each other, and weights that must be named."""

import pytest

from dinov2.configs import load_config, require_trainable
from dinov2.errors import ConfigError

ON = "gram.use_loss=true"
START = "gram.ckpt=start"


def sentence(overrides, *, training=False):
    with pytest.raises(ConfigError) as caught:
        cfg = load_config(None, overrides)
        if training:
            require_trainable(cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["gram.remove_neg=true", "gram.remove_only_teacher_neg=true"],
            "gram.remove_neg and gram.remove_only_teacher_neg are both true; set one to false",
        ),
        (
            ["gram.ema_teacher=true", "gram.ckpt=a.pth"],
            "gram.ema_teacher=true has no use for gram.ckpt='a.pth'; set gram.ckpt=null or gram.ema_teacher=false",
        ),
        (
            ["gram.img_level=true", "gram.tokens_used=masked"],
            "gram.tokens_used='masked': must be all with gram.img_level=true; or set gram.img_level=false",
        ),
        (
            ["gram.global_teacher_resize_antialias=true", "gram.global_teacher_resize_method=area"],
            "gram.global_teacher_resize_antialias=true: must be false unless the method is bilinear or bicubic",
        ),
        (
            ["crops.gram_teacher_crops_size=500"],
            "crops.gram_teacher_crops_size=500 is not a multiple of student.patch_size=16; use 496 or 512",
        ),
        (
            ["gram.ema_teacher=true", "crops.gram_teacher_crops_size=512"],
            "gram.ema_teacher=true compares with what the teacher sees anyway, so that "
            "crops.gram_teacher_crops_size=512 has no use; set it to null",
        ),
        (
            ["student.arch=resnet18", "ibot.loss_weight=0"],
            "student.arch=resnet18 has no patch tokens to compare; set gram.use_loss=false",
        ),
        (
            ["gram.loss_weight_schedule={start: 0, peak: 1, end: 1, warmup_epochs: 101}"],
            "gram.loss_weight_schedule.warmup_epochs=101 and cosine_epochs=null go beyond the end of the run at "
            "optim.epochs=100; shorten them",
        ),
    ],
)
def test_contradictions_are_found_where_gram_is_used(overrides, expected):
    if "student.arch=resnet18" not in overrides:
        load_config(None, overrides)
    assert sentence([ON, *overrides]) == expected


def test_patches_of_a_resnet_cannot_be_anchored_its_class_token_can():
    resnet = ["student.arch=resnet18", "ibot.loss_weight=0", "anchor.cls_weight=1"]
    assert load_config(None, resnet).anchor.is_on
    assert sentence([*resnet, "anchor.patch_weight=1"]) == (
        "student.arch=resnet18 has no patch tokens to anchor; set anchor.patch_weight=0"
    )


@pytest.mark.parametrize(
    ("overrides", "wish"),
    [
        ([ON, START], "gram.ckpt=start"),
        (["anchor.cls_weight=0.5"], "anchor.cls_weight=0.5"),
        ([ON, START, "anchor.patch_weight=2"], "anchor.patch_weight=2.0"),
    ],
)
def test_a_random_start_is_nothing_to_be_kept(overrides, wish):
    assert sentence(overrides, training=True) == (
        f"{wish} keeps what the weights that the run starts from can do, but these would be random; name weights by "
        f"student.pretrained_weights or MODEL.WEIGHTS"
    )
    for weights in ("MODEL.WEIGHTS=a.pth", "student.pretrained_weights=a.pth", "train.resume_path=run/model_0000009"):
        require_trainable(load_config(None, [*overrides, weights]))


@pytest.mark.parametrize(
    "source", ["gram.ckpt=a.pth", "gram.ema_teacher=true", "gram.it_load_ema_teacher=0", "gram.use_loss=false"]
)
def test_a_gram_teacher_may_come_from_elsewhere(source):
    require_trainable(load_config(None, [ON, source]))
