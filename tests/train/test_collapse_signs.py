"""Signs of collapse of one step, on features and images whose answer is known."""

import math

import pytest
import torch
from support.dist import run_distributed

from dinov2.distributed import get_rank
from dinov2.loss.assignments import Assignments
from dinov2.train.collapse_signs import (
    blank_images,
    copied_images,
    signs_of_crops,
    signs_of_features,
    signs_of_student,
    signs_of_targets,
)

NUM_IMAGES, DIM, NUM_PROTOTYPES = 64, 32, 8


def crops_of(images, *, noise, seed=0):
    """Class tokens of two crops of each image, crop-major."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([images + noise * torch.randn(images.shape, generator=generator) for _ in range(2)])


def random_images(seed=1):
    return torch.randn(NUM_IMAGES, DIM, generator=torch.Generator().manual_seed(seed))


def test_blank_crops_of_any_colour_are_counted():
    crops = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    crops[:2] = torch.tensor([-1.0, 0.3, 2.0]).reshape(3, 1, 1)  # a colour, not grey
    crops[2] = crops[2] * 1e-3  # compression leaves a blank image a little restless
    crops[3, :2] = 0  # one channel still has something to see
    assert signs_of_crops(crops)["blank_pct"] == pytest.approx(100 * 3 / 8)


def test_copies_are_found_whatever_their_brightness_and_compression():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    images[1] = 0.7 * images[0] + 0.4 + 0.02 * torch.randn(3, 16, 16, generator=generator)
    images[4:] = 1.0  # blank ones are counted elsewhere
    assert copied_images(images).tolist() == [True, True, False, False, False, False]
    assert blank_images(images).tolist() == [False] * 4 + [True] * 2
    crops = torch.cat([images, torch.randn(6, 3, 16, 16, generator=generator)])
    assert signs_of_crops(crops)["copies_pct"] == pytest.approx(100 * 2 / 6)


def test_separation_is_an_analysis_of_variance():
    cls = crops_of(random_images(), noise=0.5)
    first, second = torch.nn.functional.normalize(cls, dim=1).double().chunk(2)
    groups = torch.stack([first, second], dim=1)  # [B, 2, D]
    within = (groups - groups.mean(dim=1, keepdim=True)).square().sum() / NUM_IMAGES
    between = 2 * (groups.mean(dim=1) - groups.mean(dim=(0, 1))).square().sum() / (NUM_IMAGES - 1)
    assert signs_of_features(cls)["image_separation"].item() == pytest.approx((between / within).item(), rel=1e-5)


def test_copies_of_one_image_have_a_separation_of_one():
    one = random_images()[:1].expand(NUM_IMAGES, DIM)
    copies = [signs_of_features(crops_of(one, noise=0.5, seed=seed))["image_separation"] for seed in range(20)]
    assert torch.stack(copies).mean().item() == pytest.approx(1, abs=0.05)
    assert signs_of_features(crops_of(random_images(), noise=0.5))["image_separation"] > 3
    assert signs_of_features(torch.ones(8, DIM))["image_separation"] == 0  # nothing differs at all


def test_spread_and_length_of_class_tokens():
    even = signs_of_features(3 * crops_of(random_images(), noise=0))
    assert 0.9 < even["feature_std"] <= 1 and even["cls_norm"] > 10
    alike = torch.ones(2 * NUM_IMAGES, DIM) + 1e-3 * crops_of(random_images(), noise=0)
    assert signs_of_features(alike)["feature_std"] < 0.01
    assert signs_of_student(alike)["student_feature_std"] == signs_of_features(alike)["feature_std"]


def test_one_image_has_nothing_to_be_compared_with():
    assert "image_separation" not in signs_of_features(torch.randn(2, DIM))


@pytest.mark.parametrize(
    ("rows", "entropy", "usage", "information"),
    [
        (torch.eye(NUM_PROTOTYPES), 0, 1, math.log(NUM_PROTOTYPES)),  # a prototype for each image
        (torch.full((4, NUM_PROTOTYPES), 1 / NUM_PROTOTYPES), math.log(NUM_PROTOTYPES), 1, 0),  # nothing is said
        (torch.eye(NUM_PROTOTYPES)[:1].expand(4, -1), 0, 1 / NUM_PROTOTYPES, 0),  # the same for all
    ],
)
def test_targets_that_say_something_and_those_that_do_not(rows, entropy, usage, information):
    signs = signs_of_targets(Assignments(rows))
    assert signs["teacher_entropy"].item() == pytest.approx(entropy, abs=1e-6)
    assert signs["prototype_usage"].item() == pytest.approx(usage, rel=1e-6)
    assert signs["target_information"].item() == pytest.approx(information, abs=1e-6)


def signs_on_rank():
    return {name: value.item() for name, value in signs_of_targets(Assignments(half_of(get_rank()))).items()}


def half_of(rank):
    rows = torch.rand(6, NUM_PROTOTYPES, generator=torch.Generator().manual_seed(rank))
    return rows / rows.sum(dim=1, keepdim=True)


@pytest.mark.dist
def test_prototypes_in_use_are_counted_over_all_ranks():
    alone = signs_of_targets(Assignments(torch.cat([half_of(0), half_of(1)])))
    for signs in run_distributed(signs_on_rank, num_processes=2):
        assert signs["prototype_usage"] == pytest.approx(alone["prototype_usage"].item(), rel=1e-6)
