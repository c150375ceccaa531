"""Neighbours and votes against a slow reference in numpy: exactly, ties included."""

import numpy as np
import pytest
import torch
from support.dist import run_distributed

from dinov2 import distributed
from dinov2.eval.neighbours import find_neighbours, num_better_classes, vote

CPU = torch.device("cpu")


def features(num, *, dim=16, seed=0, copies=1):
    """Random features; the last ones repeat the first ones, so that there are ties."""
    values = torch.randn(num // copies, dim, generator=torch.Generator().manual_seed(seed))
    return values.repeat(copies, 1)


def slow_neighbours(queries, train, k):
    """Sort by cosine on exact integer products, largest first; stable, so that the earlier of equals comes first."""

    def unit(values):
        values = values.double().numpy()
        gridded = np.round(values / np.linalg.norm(values, axis=1, keepdims=True) * 2**26).astype(np.int64)
        return gridded, np.sqrt((gridded.astype(object) ** 2).sum(axis=1).astype(float))

    (q, q_norms), (t, t_norms) = unit(queries), unit(train)
    cosine = (q.astype(object) @ t.T.astype(object)).astype(float) / (q_norms[:, None] * t_norms)
    places = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, places, axis=1), places


def slow_votes(similarities, classes, *, k, temperature, num_classes):
    weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.array(
        [
            [row_weights[:k][row_classes[:k] == number].sum() for number in range(num_classes)]
            for row_weights, row_classes in zip(weights, classes, strict=True)
        ]
    )


def run(queries, train, k, indices=None):
    indices = torch.arange(len(train)) if indices is None else indices
    blocks = list(find_neighbours(queries, train, train_indices=indices, num_neighbours=k, device=CPU))
    assert [row for rows, _, _ in blocks for row in range(rows.start, rows.stop)] == list(range(len(queries)))
    return torch.cat([s for _, s, _ in blocks]), torch.cat([p for _, _, p in blocks])


@pytest.mark.parametrize(("num_train", "k", "copies"), [(50, 7, 1), (60, 60, 1), (60, 10, 3), (9000, 20, 2)])
def test_neighbours_agree_with_sorting(num_train, k, copies):
    queries, train = features(30, seed=1), features(num_train, copies=copies)
    queries[:5] = train[:5]
    similarities, places = run(queries, train, k)
    slow_similarities, slow_places = slow_neighbours(queries, train, k)
    assert np.array_equal(places.numpy(), slow_places)
    np.testing.assert_allclose(similarities.numpy(), slow_similarities, rtol=0, atol=1e-12)


def test_neighbours_do_not_depend_on_the_number_of_queries():
    queries, train = features(1500, seed=1), features(300)
    similarities, places = run(queries, train, 5)
    for start in range(0, 1500, 499):
        part = run(queries[start : start + 499], train, 5)
        assert torch.equal(part[0], similarities[start : start + 499])
        assert torch.equal(part[1], places[start : start + 499])


def test_features_that_hardly_differ_are_told_apart():
    difference = features(200)
    constant = 1000 * features(1, seed=9)
    similarities, places = run((constant + 0.1 * difference)[:20], constant + 0.1 * difference, 2)
    assert torch.equal(places[:, 0], torch.arange(20))
    assert (similarities[:, 0] - similarities[:, 1]).max() < 1e-6  # float32 would see ties only


def test_scale_and_zero_features():
    train = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1e-3], [-1.0, 0.0]])
    similarities, places = run(torch.tensor([[1e6, 0.0], [0.0, 0.0]]), train, 4)
    assert places.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]
    assert similarities.tolist() == [[1, 0, 0, -1], [0, 0, 0, 0]]


def test_places_need_not_begin_at_zero():
    queries, train = features(4, seed=1), features(10)
    _, places = run(queries, train, 3)
    _, shifted = run(queries, train, 3, indices=torch.arange(10) * 1000 + 2**30)
    assert torch.equal(shifted, places * 1000 + 2**30)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_agree_with_counting(temperature):
    similarities, places = run(features(40, seed=1), features(80, copies=2), 30)
    classes = torch.randint(0, 5, (80,), generator=torch.Generator().manual_seed(2))[places]
    for k, votes in vote(similarities, classes, ks=[1, 10, 30], temperature=temperature, num_classes=5):
        slow = slow_votes(similarities.numpy(), classes.numpy(), k=k, temperature=temperature, num_classes=5)
        np.testing.assert_allclose(votes.numpy(), slow, rtol=0, atol=1e-14)
        slow_order = np.argsort(-votes.numpy(), axis=1, kind="stable")
        for target in range(5):
            targets = torch.full((40,), target)
            has_votes = votes[:, target] > 0
            expected = (slow_order == target).argmax(axis=1)
            better = num_better_classes(votes, targets)
            assert np.array_equal(better[has_votes].numpy(), expected[has_votes.numpy()])
            assert (better[~has_votes] == 5).all()


def test_all_votes_sum_to_one_and_earlier_k_to_less():
    similarities, places = run(features(8, seed=1), features(30), 30)
    sums = [
        votes.sum(dim=1).clone()
        for _, votes in vote(similarities, places % 3, ks=[5, 30], temperature=1, num_classes=3)
    ]
    assert (sums[0] < 1).all()
    assert torch.allclose(sums[1], torch.ones(8, dtype=torch.float64))


def test_of_equal_votes_the_first_class_wins_and_a_class_without_votes_never():
    votes = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert num_better_classes(votes, torch.tensor([0, 0])).tolist() == [0, 3]
    assert num_better_classes(votes, torch.tensor([1, 2])).tolist() == [1, 0]
    assert num_better_classes(votes, torch.tensor([2, -1])).tolist() == [3, 3]


def neighbours_of_rank(num_train, num_queries, k):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    train, queries = features(num_train, copies=2), features(num_queries, seed=1)
    mine = torch.arange(num_train)[rank::size]
    queries = queries[rank::size] if rank < 2 else queries[:0]  # a rank without queries
    if rank >= 2:
        mine = mine[:0]  # and without training images
    similarities, places = [], []
    for _, s, p in find_neighbours(queries, train[mine], train_indices=mine, num_neighbours=k, device=CPU):
        similarities.append(s)
        places.append(p)
    return {"similarities": torch.cat(similarities), "places": torch.cat(places)}


@pytest.mark.dist
def test_two_ranks_find_what_one_finds():
    results = run_distributed(neighbours_of_rank, args={"num_train": 60, "num_queries": 601, "k": 12})
    similarities, places = run(features(601, seed=1), features(60, copies=2), 12)
    for rank, result in enumerate(results):
        assert torch.equal(result["similarities"], similarities[rank::2])
        assert torch.equal(result["places"], places[rank::2])
