"""Gram loss and the anchor of features beyond the official numbers: gradients, kinds of input, edges."""

import pytest
import torch

from dinov2.loss import FeatureAnchorLoss, GramLoss


def patches(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gram_of_the_batch_takes_flat_rows_and_crops_alike():
    student, teacher = patches(2, 5, 8), patches(2, 5, 8, seed=1)
    loss = GramLoss(img_level=False, remove_neg=False)
    assert torch.equal(loss(student, teacher), loss(student.flatten(0, 1), teacher.flatten(0, 1)))
    assert torch.equal(loss(student, teacher), GramLoss(remove_neg=False)(student, teacher, img_level=False))


def test_gram_does_not_see_a_rotation_of_all_features():
    student = patches(3, 6, 8)
    rotation, _ = torch.linalg.qr(patches(8, 8, seed=1))
    for options in ({}, {"remove_neg": False, "apply_norm": False}, {"remove_neg": False, "img_level": False}):
        assert GramLoss(**options)(student @ rotation, student) < 1e-10


def test_gram_sends_gradients_to_the_student_alone_and_where_similarities_count():
    student, teacher = patches(2, 4, 8).requires_grad_(), patches(2, 4, 8, seed=1).requires_grad_()
    GramLoss()(student, teacher.detach()).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.1]]], requires_grad=True)
    GramLoss()(opposite, opposite.detach().clone()).backward()
    assert opposite.grad.abs().max() < 1e-6
    GramLoss(remove_neg=False, remove_only_teacher_neg=True)(opposite, opposite.detach().clone()).backward()
    assert opposite.grad.abs().max() > 1e-2  # the negative similarity is drawn towards 0


def test_gram_is_computed_in_float32_whatever_autocast_says():
    student, teacher = patches(2, 5, 8), patches(2, 5, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GramLoss()(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, GramLoss()(student, teacher))
    assert GramLoss()(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_gram_of_no_patches_is_zero_and_leads_back():
    student = patches(0, 8).requires_grad_()
    loss = GramLoss(img_level=False)(student, patches(0, 8))
    loss.backward()
    assert loss == 0 and student.grad is not None


def test_gram_refuses_contradictions():
    with pytest.raises(ValueError, match="exclude each other"):
        GramLoss(remove_neg=True, remove_only_teacher_neg=True)
    with pytest.raises(ValueError, match=r"cannot compare patches \[2, 5, 8\] with \[2, 6, 8\]"):
        GramLoss()(patches(2, 5, 8), patches(2, 6, 8))
    with pytest.raises(ValueError, match=r"cannot compare patches \[10, 8\] with \[10, 8\]"):
        GramLoss()(patches(10, 8), patches(10, 8))


def test_the_feature_anchor_measures_angles():
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    frozen = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(FeatureAnchorLoss()(student, frozen), torch.tensor((0 + 1 + 2) / 3))


def test_of_each_crop_only_what_counts_is_averaged():
    student, frozen = patches(3, 4, 8), patches(3, 4, 8, seed=1)
    counted = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])
    one = 1 - torch.nn.functional.cosine_similarity(student, frozen, dim=-1)
    expected = (one[0, [0, 3]].mean() + 0 + one[2].mean()) / 3
    torch.testing.assert_close(FeatureAnchorLoss()(student, frozen, counted), expected)
