"""Losses against the independent implementations of the package lightly."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.assignments import sinkhorn

lightly_loss = pytest.importorskip("lightly.loss")


def logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_koleo():
    rows = logits(9, 16, seed=0)
    torch.testing.assert_close(KoLeoLoss()(rows), lightly_loss.KoLeoLoss()(rows))


def test_sinkhorn():
    from lightly.loss.swav_loss import sinkhorn as reference

    scores = logits(12, 6, seed=1)
    expected = reference(scores, iterations=3, epsilon=0.05)
    torch.testing.assert_close(sinkhorn(scores.clone(), temperature=0.05).dense(), expected, rtol=1e-4, atol=1e-6)


def test_dino_with_softmax_centring():
    reference = lightly_loss.DINOLoss(
        output_dim=20, warmup_teacher_temp=0.06, teacher_temp=0.06, warmup_teacher_temp_epochs=1, student_temp=0.1
    )
    teacher, student = logits(2, 5, 20, seed=2), logits(4, 5, 20, seed=3)
    expected = reference(list(teacher), list(student), epoch=0)
    loss = DINOLoss(20)
    targets = loss.softmax_center_teacher(teacher.flatten(0, 1).clone(), 0.06).dense().view(2, 5, 20)
    pairs = [loss([student[s]], [targets[t]]) for s in range(4) for t in range(2) if s != t]
    torch.testing.assert_close(torch.stack(pairs).mean(), expected)


def test_ibot_with_softmax_centring():
    reference = lightly_loss.IBOTPatchLoss(output_dim=20, teacher_temp=0.06, student_temp=0.1)
    mask = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[:, 0, 0] = True
    num_masked = int(mask.sum())
    teacher, student = logits(num_masked, 20, seed=5), logits(num_masked, 20, seed=6)
    expected = reference(teacher, student, mask)
    loss = iBOTPatchLoss(20)
    targets = loss.softmax_center_teacher(teacher.clone(), 0.06).dense()
    torch.testing.assert_close(loss.forward_masked(student, targets, mask.flatten(1)), expected)
    assert F.softmax(teacher / 0.06, -1).allclose(targets, atol=1e-6)
