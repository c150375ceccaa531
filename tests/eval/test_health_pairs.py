"""Comparisons of all pairs against plain references: on any number of processes, in any tiles, ties included."""

import math

import numpy as np
import pytest
import torch
from support.dist import run_distributed

from dinov2.eval import health_pairs
from dinov2.eval.health_pairs import compare_pairs, neighbours_within

CPU = torch.device("cpu")


def features(num=90, dim=12):
    """Random features; three are copies of one, two others nearly so."""
    values = torch.randn(num, dim, generator=torch.Generator().manual_seed(4))
    values[[7, 70]] = 2 * values[3]
    values[50] = values[20] + 0.01 * values[21]
    return values


def exact_cosines(values):
    unit = torch.nn.functional.normalize(values.double(), dim=1).numpy()
    return unit @ unit.T


@pytest.mark.parametrize("tile", [7, 32, 1000])
def test_uniformity_and_duplicates_agree_with_all_cosines(tile, monkeypatch):
    monkeypatch.setattr(health_pairs, "_TILE", tile)
    values = features()
    cosines = exact_cosines(values)
    first, second = np.triu_indices(len(values), 1)
    found = compare_pairs(values, device=CPU, duplicate_cosine=0.99, max_pairs=10)
    expected = math.log(np.exp(-2 * (2 - 2 * cosines[first, second])).mean())
    assert found.uniformity == pytest.approx(expected, rel=1e-7)  # features are rounded to 2^-26
    assert found.num_duplicates == 4
    assert found.duplicates.tolist() == [[3, 7], [3, 70], [7, 70], [20, 50]]
    assert found.cosines.tolist() == pytest.approx([1, 1, 1, cosines[20, 50]], abs=1e-7)
    shorter = compare_pairs(values, device=CPU, duplicate_cosine=0.99, max_pairs=2)
    assert shorter.num_duplicates == 4 and shorter.duplicates.tolist() == [[3, 7], [3, 70]]
    assert shorter.uniformity == found.uniformity


def test_uniformity_of_known_features():
    assert compare_pairs(torch.ones(5, 3), device=CPU).uniformity == pytest.approx(0, abs=1e-15)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert compare_pairs(opposite, device=CPU).uniformity == pytest.approx(-8)
    assert compare_pairs(torch.eye(4), device=CPU).uniformity == pytest.approx(-4)


def test_neighbours_within_a_set_leave_the_image_itself_out():
    values = features()
    cosines = exact_cosines(values)
    np.fill_diagonal(cosines, -2)
    found = neighbours_within(values, num_neighbours=5, device=CPU)
    # copies differ by rounding in the reference only
    order = np.argsort(-cosines.round(9), axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.numpy(), order)
    copies = torch.ones(6, 3)
    assert neighbours_within(copies, num_neighbours=2, device=CPU).tolist() == [
        [1, 2],
        [0, 2],
        [0, 1],
        [0, 1],
        [0, 1],
        [0, 1],
    ]


def of_rank():
    health_pairs._TILE = 16  # so that there are tiles for all ranks
    found = compare_pairs(features(), device=CPU, duplicate_cosine=0.9, max_pairs=3)
    return {
        "uniformity": found.uniformity,
        "duplicates": [found.num_duplicates, found.duplicates.tolist(), found.cosines.tolist()],
        "neighbours": neighbours_within(features(), num_neighbours=4, device=CPU),
        "few": neighbours_within(torch.eye(2), num_neighbours=1, device=CPU),  # fewer images than ranks
    }


@pytest.mark.dist
def test_three_ranks_find_what_one_finds(monkeypatch):
    monkeypatch.setattr(health_pairs, "_TILE", 16)
    alone = of_rank()
    assert alone["duplicates"][0] > 3 and alone["few"].tolist() == [[1], [0]]
    for result in run_distributed(of_rank, num_processes=3):
        assert result["uniformity"] == pytest.approx(alone["uniformity"], rel=1e-14)
        assert result["duplicates"] == alone["duplicates"]
        assert torch.equal(result["neighbours"], alone["neighbours"]) and torch.equal(result["few"], alone["few"])
