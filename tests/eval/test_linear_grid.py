"""The grid of linear classifiers, against PyTorch's own optimiser and schedule."""

import pytest
import torch
from torch import nn

from dinov2.eval.linear_grid import LEARNING_RATES, LinearGrid, make_grid

CPU = torch.device("cpu")
WIDTH, CLASSES, STEPS = 6, 3, 8
POOL = "last2+mean"
COLUMNS = {"cls": (6, 12), "cls+mean": (6, 18), "last2": (0, 12), "last2+mean": (0, 18)}


def grid_of(candidates, *, total_steps=STEPS):
    return LinearGrid(
        candidates, pool=POOL, num_features=3 * WIDTH, num_classes=CLASSES, total_steps=total_steps, device=CPU
    )


def some_candidates():
    return make_grid(POOL, num_blocks=[1, 2], learning_rates=[0.5, 4.0], batch_size=64)


def batches(count=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(5, 3 * WIDTH, generator=generator),
            torch.randint(CLASSES, (5,), generator=generator),
        )


def test_the_parents_grid_has_52_classifiers_with_their_names():
    candidates = make_grid("last4+mean", num_blocks=[1, 4], learning_rates=LEARNING_RATES, batch_size=1024)
    assert len(candidates) == 52
    names = [candidate.name for candidate in candidates]
    assert names[0] == "classifier_1_blocks_avgpool_False_lr_0_00004"
    assert names[-1] == "classifier_4_blocks_avgpool_True_lr_0_40000"
    assert [candidates[place].pool for place in (0, 13, 26, 39)] == ["cls", "cls+mean", "last4", "last4+mean"]


def test_a_pool_without_mean_has_no_classifiers_with_it():
    assert [one.pool for one in make_grid("cls", num_blocks=[1], learning_rates=[1.0], batch_size=256)] == ["cls"]


def test_each_classifier_learns_as_with_pytorchs_optimiser():
    candidates = some_candidates()
    grid = grid_of(candidates)
    layers, optimisers = [], []
    for number, candidate in enumerate(candidates):
        layer = nn.Linear(*reversed(grid.classifier(number)[0].shape))
        with torch.no_grad():
            layer.weight.copy_(grid.classifier(number)[0])
            layer.bias.zero_()
        layers.append(layer)
        optimisers.append(torch.optim.SGD(layer.parameters(), lr=candidate.learning_rate, momentum=0.9))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, STEPS, eta_min=0) for one in optimisers]
    for features, targets in batches():
        grid.train_step(features, targets)
        for candidate, layer, optimiser, schedule in zip(candidates, layers, optimisers, schedules, strict=True):
            inputs = features[:, slice(*COLUMNS[candidate.pool])]
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(inputs), targets).backward()
            optimiser.step()
            schedule.step()
    features, _ = next(batches(seed=1))
    for number, (layer, logits) in enumerate(zip(layers, grid.logits(features), strict=True)):
        weight, bias = grid.classifier(number)
        torch.testing.assert_close(weight, layer.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, layer.bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, features[:, slice(*COLUMNS[candidates[number].pool])] @ weight.T + bias)


def test_first_weights_are_small_and_the_seeds():
    weight, bias = grid_of(some_candidates()).classifier(3)
    assert 0.005 < weight.std() < 0.015 and not bias.any()
    assert torch.equal(weight, grid_of(some_candidates()).classifier(3)[0])


def test_saved_and_loaded_the_training_goes_on_bit_for_bit():
    whole, first, second = (grid_of(some_candidates()) for _ in range(3))
    for step, batch in enumerate(batches()):
        whole.train_step(*batch)
        if step == 3:
            second.load_state_dict(first.state_dict())
        (first if step < 3 else second).train_step(*batch)
    assert second.step == STEPS
    for number in range(len(whole.candidates)):
        assert torch.equal(whole.classifier(number)[0], second.classifier(number)[0])


def test_a_state_of_another_grid_is_refused():
    other = LinearGrid(
        some_candidates(), pool=POOL, num_features=3 * WIDTH, num_classes=4, total_steps=STEPS, device=CPU
    )
    with pytest.raises(ValueError, match="weight of shape"):
        grid_of(some_candidates()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="4 families, not of 1"):
        grid_of(some_candidates()[:1]).load_state_dict(other.state_dict())
