"""Losses and assignments against numbers of the official code."""

import pytest
import torch
from support.golden import load_golden

from dinov2.loss import DINOLoss, GramLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.assignments import Assignments

TEMPERATURE = 0.06
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_golden("losses_v2").items()}


def test_softmax_centring_before_and_after_a_centre_update(golden):
    loss = DINOLoss(32)
    first = loss.softmax_center_teacher(golden["teacher_logits"].clone(), TEMPERATURE).dense()
    loss.update_center(golden["teacher_logits"])
    loss.apply_center_update()
    second = loss.softmax_center_teacher(golden["teacher_logits_next"].clone(), TEMPERATURE).dense()
    torch.testing.assert_close(first, golden["softmax_center_step0"], **CLOSE)
    torch.testing.assert_close(loss.center, golden["center_after"], **CLOSE)
    torch.testing.assert_close(second, golden["softmax_center_step1"], **CLOSE)


def test_sinkhorn(golden):
    assignments = DINOLoss(32).sinkhorn_knopp_teacher(golden["teacher_logits"].clone(), TEMPERATURE)
    torch.testing.assert_close(assignments.dense(), golden["sinkhorn_0.06"], **CLOSE)


def test_dense_dino_loss_of_local_and_global_crops(golden):
    loss = DINOLoss(32)
    targets = golden["softmax_center_step0"]
    local = loss(golden["student_local"].chunk(4), targets.view(2, 6, 32))
    everything = loss([golden["student_global"]], [targets])
    torch.testing.assert_close(local, golden["dino_local_4chunks"], **CLOSE)
    torch.testing.assert_close(everything, golden["dino_global"], **CLOSE)


def test_ibot_loss_and_centre(golden):
    loss = iBOTPatchLoss(32)
    teacher = golden["ibot_teacher_logits"].squeeze(0)
    targets = loss.softmax_center_teacher(teacher.clone(), TEMPERATURE).dense()
    torch.testing.assert_close(targets, golden["ibot_softmax_center"], **CLOSE)
    value = loss.forward_masked(golden["ibot_student_logits"], targets, golden["ibot_masks"])
    torch.testing.assert_close(value, golden["ibot_loss"], **CLOSE)
    loss.update_center(teacher)
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, golden["ibot_center_after"].squeeze(0), **CLOSE)


def test_chunked_ibot_loss_equals_the_official_one(golden):
    masks = golden["ibot_masks"]
    per_image = masks.sum(1)
    weights = (1 / per_image.clamp_min(1))[masks.nonzero()[:, 0]]
    criterion = iBOTPatchLoss(32).criterion(
        Assignments(golden["ibot_softmax_center"]), masks_weight=weights, num_images=len(masks)
    )
    (value,) = criterion(golden["ibot_student_logits"], torch.eye(32))  # scores are the features themselves
    torch.testing.assert_close(value, golden["ibot_loss"], **CLOSE)


def test_koleo(golden):
    torch.testing.assert_close(KoLeoLoss()(golden["koleo_in"]), golden["koleo"], **CLOSE)


@pytest.fixture(scope="module")
def golden_v3() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_golden("losses_v3").items()}


def test_sinkhorn_of_dinov3(golden_v3):
    assignments = DINOLoss(32).sinkhorn_knopp_teacher(golden_v3["teacher_logits"].clone(), TEMPERATURE)
    torch.testing.assert_close(assignments.dense(), golden_v3["sinkhorn_0.06"], **CLOSE)
    assignments = iBOTPatchLoss(32).sinkhorn_knopp_teacher(golden_v3["ibot_teacher_logits"].clone(), TEMPERATURE)
    torch.testing.assert_close(assignments.dense(), golden_v3["ibot_sinkhorn"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "ignore_diagonal"), [("dino_global_ignore_diagonal", True), ("dino_global_all", False)]
)
def test_dino_loss_of_dinov3(golden_v3, name, ignore_diagonal):
    loss, targets = DINOLoss(32), golden_v3["sinkhorn_0.06"]
    stacked = targets.view(2, 6, 32)
    dense_local = loss(golden_v3["student_local"], stacked) / 8
    dense_global = loss(golden_v3["student_global"], stacked, ignore_diagonal=ignore_diagonal)
    torch.testing.assert_close(dense_local, golden_v3["dino_local"], **CLOSE)
    torch.testing.assert_close(dense_global / (2 if ignore_diagonal else 4), golden_v3[name], **CLOSE)

    criterion = loss.criterion(Assignments(targets), num_local_crops=4, ignore_diagonal=ignore_diagonal)
    scores = torch.cat([golden_v3["student_global"], golden_v3["student_local"]]).flatten(0, 1)
    total, local_mean, global_mean = criterion(scores, torch.eye(32))  # scores are the features themselves
    torch.testing.assert_close(local_mean, golden_v3["dino_local"], **CLOSE)
    torch.testing.assert_close(global_mean, golden_v3[name], **CLOSE)
    num_global = 2 if ignore_diagonal else 4
    torch.testing.assert_close(total, (8 * local_mean + num_global * global_mean) / (8 + num_global), **CLOSE)


def test_ibot_loss_of_dinov3(golden_v3):
    loss, masks, weights = iBOTPatchLoss(32), golden_v3["ibot_masks"], golden_v3["ibot_weights"]
    student, targets = golden_v3["ibot_student_logits"], golden_v3["ibot_sinkhorn"]
    torch.testing.assert_close(loss.forward_masked(student, targets, masks, weights), golden_v3["ibot_loss"], **CLOSE)
    criterion = loss.criterion(Assignments(targets), masks_weight=weights, num_images=len(masks))
    torch.testing.assert_close(criterion(student, torch.eye(32))[0], golden_v3["ibot_loss"], **CLOSE)


def test_koleo_of_dinov3(golden_v3):
    for loss in (KoLeoLoss(), KoLeoLoss(distributed=True)):
        torch.testing.assert_close(loss(golden_v3["koleo_in"]), golden_v3["koleo"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gram_img", {"remove_neg": False}),
        ("gram_batch", {"remove_neg": False, "img_level": False}),
        ("gram_img_remove_neg", {}),
        ("gram_img_remove_teacher_neg", {"remove_neg": False, "remove_only_teacher_neg": True}),
        ("gram_img_no_norm", {"remove_neg": False, "apply_norm": False}),
    ],
)
def test_gram_of_dinov3(golden_v3, name, options):
    loss = GramLoss(**options)(golden_v3["gram_student"], golden_v3["gram_teacher"])
    torch.testing.assert_close(loss, golden_v3[name], **CLOSE)
