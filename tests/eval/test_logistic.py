"""Logistic regression for many C at once, against scikit-learn's one by one."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as Reference

from dinov2.eval.logistic import LogisticRegression, group_cs

CPU = torch.device("cpu")
CS = (10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist()  # the parents' grid


def digits(num_classes=10, count=1200, test_count=500):
    values, targets = load_digits(n_class=num_classes, return_X_y=True)
    values = torch.from_numpy(values + 3 * np.random.default_rng(0).standard_normal(values.shape)).float()
    targets = torch.from_numpy(targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, test = order[:count], order[count : count + test_count]
    return values[train], targets[train], values[test], targets[test]


def fitted(values, targets, cs, *, dtype=torch.float64, max_rounds=3000, **more):
    num_classes = int(targets.max()) + 1
    regression = LogisticRegression(values, targets, num_classes=num_classes, dtype=dtype, device=CPU)
    return regression.fit(cs, max_rounds=max_rounds, **more)


def objective(values, targets, c, weight, bias):
    """Of scikit-learn's parametrisation, for each image."""
    logits = torch.from_numpy(values.double().numpy() @ weight.T + bias)
    if len(weight) == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return (loss + (weight**2).sum() / (2 * c * len(values))).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_over_the_whole_grid_are_those_of_scikit_learn(dtype):
    values, targets, test_values, test_targets = digits(num_classes=4, count=300)
    fits = fitted(values, targets, CS[::4], dtype=dtype)  # every tenfold C
    assert [fit.c for fit in fits] == CS[::4] and all(fit.has_converged for fit in fits)
    for fit in fits:
        # exact Newton: scikit-learn's own L-BFGS ends far from the minimum where C is large
        reference = Reference(C=fit.c, max_iter=100, tol=1e-9, solver="newton-cholesky")
        reference.fit(values.double().numpy(), targets.numpy())
        right = (fit.logits(test_values).argmax(dim=1) == test_targets).double().mean().item()
        # a tenth of a point is half an image here
        assert abs(right - reference.score(test_values.double().numpy(), test_targets.numpy())) < 0.001
        theirs = objective(values, targets, fit.c, reference.coef_, reference.intercept_)
        assert theirs * (1 - 1e-3) < fit.objective < theirs * (1 + 2e-6)
        ours = objective(values, targets, fit.c, fit.weight.numpy(), fit.bias.numpy())
        assert fit.objective == pytest.approx(ours, rel=1e-6)


def test_weights_are_those_of_a_tightly_converged_reference():
    values, targets, *_ = digits(num_classes=4)
    for fit in fitted(values, targets, [1e-3, 1.0], tolerance=1e-14):
        reference = Reference(C=fit.c, max_iter=9999, tol=1e-10, solver="newton-cg").fit(values.double(), targets)
        # weights are around 0.1; only differences between the classes' biases matter
        np.testing.assert_allclose(fit.weight, reference.coef_, atol=1e-5)
        bias = fit.bias - fit.bias.mean()
        np.testing.assert_allclose(bias, reference.intercept_ - reference.intercept_.mean(), atol=1e-4)


def test_two_classes_have_one_penalised_column_as_in_scikit_learn():
    values, targets, *_ = digits(num_classes=2, count=250)
    for fit in fitted(values, targets, [1e-4, 1e-2], tolerance=1e-14):
        reference = Reference(C=fit.c, max_iter=9999, tol=1e-10, solver="newton-cg").fit(values.double(), targets)
        assert not fit.weight[0].any() and not fit.bias[0]
        np.testing.assert_allclose(fit.weight[1:], reference.coef_, atol=1e-5)
        np.testing.assert_allclose(fit.bias[1:], reference.intercept_, atol=1e-4)


def test_more_features_than_images_and_constant_features():
    values, targets, *_ = digits(count=40)
    values[:, 5] = 7.0
    wide = torch.cat([values, values.flip(1)], dim=1)
    regression = LogisticRegression(wide, targets, num_classes=10, dtype=torch.float64, device=CPU)
    assert regression.data.shape[1] <= 40  # 39 directions and the ones
    (fit,) = regression.fit([0.1], max_rounds=1000)
    reference = Reference(C=0.1, max_iter=9999, tol=1e-9).fit(wide.double(), targets)
    np.testing.assert_allclose(fit.weight, reference.coef_, atol=1e-4)
    assert fit.weight[:, 5].abs().max() < 1e-12


def test_features_that_all_agree_leave_the_shares_of_the_classes():
    targets = torch.tensor([0, 0, 0, 1, 2, 2])
    (fit,) = fitted(torch.ones(6, 3), targets, [1.0])
    shares = fit.logits(torch.ones(1, 3)).softmax(dim=1)[0]
    np.testing.assert_allclose(shares, [3 / 6, 1 / 6, 2 / 6], atol=1e-4)


def test_each_c_is_fitted_as_if_alone():
    values, targets, *_ = digits(count=300)
    together = fitted(values, targets, [1e-4, 1e-2, 1.0])
    for fit in together:
        (alone,) = fitted(values, targets, [fit.c])
        # products of other shapes round differently; weights are around 0.1
        np.testing.assert_allclose(alone.weight, fit.weight, atol=1e-4)


def test_a_fit_that_is_cut_short_says_so():
    values, targets, *_ = digits(count=300)
    fits = fitted(values, targets, [1e-6, 1e5], max_rounds=8)
    assert [fit.has_converged for fit in fits] == [True, False]
    assert fits[1].num_rounds == 8


def test_groups_hold_neighbours_and_do_not_depend_on_order():
    assert group_cs([10.0, 0.1, 1.0], num_classes=200) == [[0.1, 1.0], [10.0]]
    assert group_cs([1.0, 2.0], num_classes=9000) == [[1.0], [2.0]]
    assert [len(group) for group in group_cs(CS, num_classes=2)] == [45]
