"""Gram anchoring of a step: when the Gram teacher is renewed, which patches are compared, on which grid."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import GramLoss
from dinov2.train.gram import GramAnchor, GramRenewals
from dinov2.train.token_samples import patch_ranks, smallest

NUM_CROPS, NUM_PATCHES, DIM = 6, 16, 8


def patches(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(num_teacher=NUM_PATCHES):
    return patches(NUM_CROPS, NUM_PATCHES, DIM), patches(NUM_CROPS, num_teacher, DIM, seed=1)


def images(seeds=(11, 12, 13)):
    masks = patches(NUM_CROPS, NUM_PATCHES, seed=2) > 0.5
    return {
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "seeds": torch.tensor(seeds),
    }


def official_updates(num_steps, *, period, first, most, load):
    """Steps before which the Gram teacher changes, counted as the parents' loop does: after the step before."""
    updates, count = {load} if load >= 0 else set(), 0
    for it in range(num_steps):
        if (it + 1) >= first and (it + 1) % period == 0 and (most is None or count < most):
            updates.add(it + 1)
            count += 1
    return sorted(step for step in updates if step < num_steps)


@pytest.mark.parametrize(
    ("period", "first", "most", "load"),
    [(5, 0, None, -1), (5, 0, 2, 0), (5, 12, None, 7), (5, 15, 1, -1), (1, 3, 4, 2), (4, 1, 0, 9), (3, 3, 2, -1)],
)
def test_renewals_are_those_of_the_parents_loop(period, first, most, load):
    renewals = GramRenewals(load_step=load, period_steps=period, first_step=first, max_count=most)
    ours = [step for step in range(40) if renewals.is_due(step)]
    assert ours == official_updates(40, period=period, first=first, most=most, load=load)


def test_without_a_period_or_a_step_there_are_none():
    assert not any(GramRenewals().is_due(step) for step in range(10))


@pytest.mark.parametrize("kind", ["all", "masked", "unmasked"])
def test_patches_of_a_kind_are_compared_over_all_crops(kind):
    student, teacher = pair()
    batch = images()
    rows = {"all": torch.ones_like(batch["collated_masks"]), "masked": batch["collated_masks"]}
    chosen = rows.get(kind, ~batch["collated_masks"])
    loss = GramLoss(img_level=False, remove_neg=False)
    ours, metrics = GramAnchor(loss, tokens_used=kind)(student, teacher, batch)
    torch.testing.assert_close(ours, loss(student[chosen], teacher[chosen]))
    assert torch.equal(metrics["gram_loss"], ours)


def test_statistics_tell_masked_and_unmasked_patches_apart():
    student, teacher = pair()
    batch, loss = images(), GramLoss(remove_neg=False)
    _, metrics = GramAnchor(loss, compute_stats=True)(student.requires_grad_(), teacher, batch)
    masks = batch["collated_masks"]
    for kind, chosen in (("masked", masks), ("unmasked", ~masks)):
        value = metrics[f"stats_only/{kind}_gram_loss"]
        assert not value.requires_grad
        torch.testing.assert_close(value, loss(student[chosen], teacher[chosen], img_level=False).detach())


@pytest.mark.parametrize(
    ("method", "antialias"),
    [("bicubic", False), ("bicubic", True), ("bilinear", True), ("nearest", False), ("area", False)],
)
def test_a_finer_map_of_the_teacher_is_brought_to_the_students_grid(method, antialias):
    student, teacher = pair(num_teacher=64)
    options = {"align_corners": False, "antialias": antialias} if method.startswith("bi") else {}
    maps = teacher.transpose(1, 2).reshape(NUM_CROPS, DIM, 8, 8)
    resized = F.interpolate(maps, (4, 4), mode=method, **options).reshape(NUM_CROPS, DIM, 16).transpose(1, 2)
    loss = GramLoss(remove_neg=False)
    ours, _ = GramAnchor(loss, resize_method=method, resize_antialias=antialias)(student, teacher, images())
    torch.testing.assert_close(ours, loss(student, resized))


def test_a_sample_of_patches_is_the_same_in_student_and_teacher():
    student, _ = pair()
    for img_level in (True, False):
        anchor = GramAnchor(GramLoss(img_level=img_level, remove_neg=False), max_tokens=5)
        assert anchor(student, student.clone(), images())[0] == 0
        differing, _ = anchor(student, student.roll(1, dims=1), images())
        assert differing > 0


def test_a_sample_is_compared_as_if_there_were_no_other_patches():
    student, teacher = pair()
    batch, loss = images(), GramLoss(remove_neg=False)
    ours, _ = GramAnchor(loss, max_tokens=5)(student, teacher, batch)
    places = smallest(patch_ranks(batch["seeds"], num_crops=2, num_patches=NUM_PATCHES), 5)
    assert places.shape == (NUM_CROPS, 5)
    each = [loss(s[p][None], t[p][None]) for s, t, p in zip(student, teacher, places, strict=True)]
    torch.testing.assert_close(ours, torch.stack(each).mean())


def test_a_sample_of_masked_patches_holds_no_others():
    student, teacher = pair()
    batch = images()
    anchor = GramAnchor(GramLoss(img_level=False, remove_neg=False), tokens_used="masked", max_tokens=6)
    student = student.masked_fill(~batch["collated_masks"].unsqueeze(-1), torch.nan)
    assert anchor(student, teacher, batch)[0].isfinite()


def test_more_tokens_than_there_are_means_all():
    student, teacher = pair()
    for img_level in (True, False):
        loss = GramLoss(img_level=img_level, remove_neg=False)
        ours, _ = GramAnchor(loss, max_tokens=10_000)(student, teacher, images())
        torch.testing.assert_close(ours, loss(student, teacher))


def test_the_sample_depends_on_its_image_and_crop_alone():
    together = patch_ranks(torch.tensor([3, 4, 5]), num_crops=2, num_patches=9)
    alone = patch_ranks(torch.tensor([5]), num_crops=2, num_patches=9)
    assert torch.equal(together.unflatten(0, (2, 3))[:, 2], alone)
    assert len({tuple(row.tolist()) for row in together}) == 6
    assert not torch.equal(together, patch_ranks(torch.tensor([6, 7, 8]), num_crops=2, num_patches=9))
