"""Stochastic depth over packed tokens of two crop sizes."""

import pytest
import torch

from dinov2.layers.drop_path import add_residual

LAYOUT = ((10, 3), (20, 2))
ROWS = 70


def per_image(x):
    """Reduce rows to one value for each image; all rows of an image must agree."""
    values = []
    for images in (x[:30].view(10, 3, -1), x[30:].view(20, 2, -1)):
        assert (images == images[:, :1, :1]).all()
        values.append(images[:, 0, 0])
    return values


def ones_branch(seen):
    def branch(x, layout):
        seen.append((tuple(x.shape), layout))
        return torch.ones_like(x)

    return branch


def test_high_rates_compute_the_branch_for_the_kept_images_alone():
    seen = []
    out = add_residual(torch.zeros(ROWS, 4), ones_branch(seen), LAYOUT, gamma=None, drop_rate=0.3)
    assert seen == [((7 * 3 + 14 * 2, 4), ((7, 3), (14, 2)))]
    for values, num_images, num_kept in zip(per_image(out), (10, 20), (7, 14), strict=True):
        assert int((values > 0).sum()) == num_kept
        torch.testing.assert_close(values[values > 0], torch.full((num_kept,), num_images / num_kept))


def test_low_rates_compute_all_and_switch_images_off():
    seen, sums = [], []
    torch.manual_seed(0)
    for _ in range(300):
        out = add_residual(torch.zeros(ROWS, 1), ones_branch(seen), LAYOUT, gamma=None, drop_rate=0.1)
        values = torch.cat(per_image(out))
        torch.testing.assert_close(values[values > 0], torch.full_like(values[values > 0], 1 / 0.9))
        sums.append(values.mean())
    assert seen[0] == ((ROWS, 1), LAYOUT)
    # 9,000 draws of 0 or 1.11: the standard error of their mean is 0.0035
    assert abs(torch.stack(sums).mean() - 1) < 0.02


def test_different_images_are_kept_each_time():
    torch.manual_seed(0)
    runs = [add_residual(torch.zeros(ROWS, 1), ones_branch([]), LAYOUT, gamma=None, drop_rate=0.5) for _ in range(2)]
    assert not torch.equal(*runs)


def test_one_image_is_always_kept():
    out = add_residual(torch.zeros(3, 1), ones_branch([]), ((1, 3),), gamma=None, drop_rate=0.9)
    torch.testing.assert_close(out, torch.ones(3, 1))


@pytest.mark.parametrize("drop_rate", [0.0, 0.1, 0.4])
def test_gradients_are_those_of_numerical_differences(drop_rate):
    gamma = torch.rand(2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(ROWS, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, gamma):
        torch.manual_seed(1)
        return add_residual(x, lambda rows, _: torch.tanh(rows @ weight), LAYOUT, gamma=gamma, drop_rate=drop_rate)

    before = x.detach().clone()
    assert torch.autograd.gradcheck(function, (x, weight, gamma))
    assert torch.equal(x, before)


def test_gradient_of_a_plain_sum_passes():
    x = torch.randn(ROWS, 2, requires_grad=True)
    add_residual(x, lambda rows, _: 0 * rows, LAYOUT, gamma=None, drop_rate=0.5).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(ROWS, 2))


def test_a_branch_in_lower_precision_is_added_in_the_precision_of_the_tokens():
    out = add_residual(torch.zeros(ROWS, 2), lambda rows, _: rows.bfloat16() + 1, LAYOUT, gamma=None, drop_rate=0.5)
    assert out.dtype is torch.float32
    assert out.unique().tolist() == [0.0, 2.0]
