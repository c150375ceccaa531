"""Retrieval against rankings made one by one, by hand where small, and its unhappy paths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from support.dist import run_distributed

from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.retrieval_scores import measure_rankings, retrieve

CPU = torch.device("cpu")
KS = (1, 5, 10)


def feature_set(values, targets, *, name="PHOTOS", order=None, class_names=(), **columns):
    columns = {column: np.asarray(texts) for column, texts in columns.items()}
    features = FeatureSet(
        name=name,
        values=torch.as_tensor(values, dtype=torch.float32),
        targets=np.asarray(targets),
        places=np.arange(len(targets)),
        class_names=class_names,
        columns={"path": np.array([f"{number:04d}.png" for number in range(len(targets))])} | columns,
    )
    return features if order is None else features.take(order)


def blobs(num=120, *, seed=0, order=None, name="PHOTOS"):
    """Images of 5 classes, 15 parts; the last third repeats the first, so that there are ties."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, num)
    values = np.random.default_rng(9).normal(size=(5, 6))[targets] + rng.normal(size=(num, 6))
    third = num // 3
    values[-third:] = values[:third]
    parts = [f"part {part}" for part in rng.integers(0, 15, num)]
    return feature_set(values, targets, part=parts, order=order, name=name)


def slow_scores(queries, gallery, *, excluded, is_one):
    """Recalls, mAP and R-precision in percent, query by query, with scikit-learn's average precision."""

    def unit(features):
        values = features.values.double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    cosine = np.round(unit(queries) @ unit(gallery).T, 9)  # ties are ties
    found = []
    for query in range(len(queries)):
        is_member = ~excluded[query]
        if is_one:
            is_member[query] = False
        members = np.flatnonzero(is_member)
        ranked = members[np.argsort(-cosine[query, members], kind="stable")]
        relevant = gallery.targets[ranked] == queries.targets[query]
        if not relevant.any():
            continue
        average_precision = average_precision_score(relevant, -np.arange(len(relevant)))
        found.append([relevant[:k].any() for k in KS] + [average_precision, relevant[: relevant.sum()].mean()])
    return 100 * np.mean(found, axis=0)


def as_list(retrieved):
    scores = retrieved.scores(KS)
    return [scores[name] for name in [*(f"recall_at_{k}_pct" for k in KS), "map_pct", "r_precision_pct"]]


def test_measures_by_hand():
    rankings = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    expected = [
        [2, 1, (1 + 2 / 3) / 2, 0.5],
        [1, 4, 0.25, 0],
        [0, 0, 0, 0],
        [2, 1, 1, 1],
        [2, 2, (1 / 2 + 2 / 3) / 2, 0.5],
    ]
    assert measure_rankings(rankings).tolist() == [pytest.approx(row) for row in expected]


def test_a_set_against_itself_agrees_with_a_slow_reference():
    features = blobs()
    retrieved = retrieve(features, features, device=CPU)
    nothing = np.zeros((120, 120), dtype=bool)
    assert as_list(retrieved) == pytest.approx(slow_scores(features, features, excluded=nothing, is_one=True).tolist())
    assert not (retrieved.hits == np.arange(120)[:, None]).any()
    assert (np.diff(retrieved.similarities, axis=1) <= 0).all()
    assert list(retrieved.hits[:40, 0]) == list(range(80, 120))  # each of the first third finds its double


def test_images_of_the_same_part_are_not_searched():
    features = blobs()
    parts = features.columns["part"]
    retrieved = retrieve(features, features, exclude=["part"], device=CPU)
    excluded = parts[:, None] == parts
    assert as_list(retrieved) == pytest.approx(slow_scores(features, features, excluded=excluded, is_one=True).tolist())
    assert not (parts[retrieved.hits] == parts[:, None]).any()


def test_queries_against_a_gallery_agree_with_a_slow_reference():
    queries, gallery = blobs(50, seed=3, name="QUERIES"), blobs(90, seed=4)
    for exclude in ([], ["part"]):
        retrieved = retrieve(queries, gallery, exclude=exclude, device=CPU)
        excluded = np.zeros((50, 90), dtype=bool)
        if exclude:
            excluded = queries.columns["part"][:, None] == gallery.columns["part"]
        slow = slow_scores(queries, gallery, excluded=excluded, is_one=False)
        assert as_list(retrieved) == pytest.approx(slow.tolist())


def test_map_over_labels_counts_each_label_alike():
    features = feature_set([[1, 0], [1, 0.1], [0.9, 0], [0, 1], [0.1, 1]], [0, 0, 0, 1, 1])
    retrieved = retrieve(features, features, device=CPU)
    assert retrieved.average_precision.tolist() == [1, 1, 1, 1, 1]
    worse = replace(features, targets=np.array([0, 0, 1, 1, 1]))
    retrieved = retrieve(worse, worse, device=CPU)
    of_labels = [retrieved.average_precision[:2].mean(), retrieved.average_precision[2:].mean()]
    assert retrieved.scores(KS)["map_mean_per_class_pct"] == pytest.approx(100 * np.mean(of_labels))


def test_results_depend_neither_on_the_order_of_images_nor_on_the_blocks(monkeypatch):
    expected = retrieve(blobs(), blobs(), exclude=["part"], device=CPU)
    order = np.random.default_rng(1).permutation(120)
    mixed = retrieve(blobs(order=order), blobs(order=order[::-1]), exclude=["part"], device=CPU)
    assert np.array_equal(mixed.hits, expected.hits) and mixed.scores(KS) == expected.scores(KS)
    monkeypatch.setattr("dinov2.eval.ranking._QUERIES_AT_ONCE", (7, 7))
    monkeypatch.setattr("dinov2.eval.ranking._GALLERY_AT_ONCE", 11)
    blocks = retrieve(blobs(), blobs(), exclude=["part"], device=CPU)
    assert np.array_equal(blocks.hits, expected.hits) and blocks.scores(KS) == expected.scores(KS)
    assert np.array_equal(blocks.similarities, expected.similarities)


def retrieved_on_rank():
    features = blobs()
    found = {}
    for name, one in (("labels", features), ("none", replace(features, targets=np.full(120, -1)))):
        retrieved = retrieve(one, one, exclude=["part"], device=CPU)
        found[f"hits {name}"] = torch.from_numpy(retrieved.hits)
        found[f"measures {name}"] = torch.from_numpy(retrieved.average_precision).nan_to_num(-1)
    return found


@pytest.mark.dist
def test_three_ranks_find_what_one_finds():
    expected = retrieved_on_rank()
    for result in run_distributed(retrieved_on_rank, num_processes=3):
        assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_without_labels_there_are_hits_and_no_scores():
    features = replace(blobs(), targets=np.full(120, -1))
    retrieved = retrieve(features, features, num_hits=3, device=CPU)
    with_labels = retrieve(blobs(), blobs(), num_hits=3, device=CPU)
    same_set = retrieve(*[blobs()] * 2, num_hits=3, device=CPU)
    assert np.array_equal(retrieved.hits, same_set.hits) and not np.array_equal(with_labels.hits, same_set.hits)
    assert retrieved.scores(KS) == {} and not retrieved.has_relevant.any() and not retrieved.is_relevant().any()
    assert retrieved.notes == ("PHOTOS: no image has a label; there are hits and no scores",)


def test_images_without_a_label_and_queries_without_a_match_are_counted_and_left_out():
    features = feature_set([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], [0, 0, -1, 2])
    retrieved = retrieve(features, features, device=CPU)
    assert retrieved.notes == (
        "PHOTOS: 1 of 4 images have no label and are left out",
        "PHOTOS: 1 of 3 queries have no image of their label to find; they are left out of the scores",
    )
    assert retrieved.scores(KS)["map_pct"] == 100 and retrieved.hits.shape == (3, 2)
    assert np.isnan(retrieved.values(KS)["recall_at_1_pct"]).tolist() == [False, False, True]


def test_few_members_are_left_where_groups_are_excluded():
    features = feature_set([[1, 0], [1, 0.1], [0, 1]], [0, 0, 0], part=["a", "a", "b"])
    retrieved = retrieve(features, features, exclude=["part"], device=CPU)
    assert retrieved.hits.tolist() == [[2, -1], [2, -1], [1, 0]]
    assert retrieved.num_relevant.tolist() == [1, 1, 2]
    assert retrieved.is_relevant().tolist() == [[True, False], [True, False], [True, True]]


def test_labels_match_by_name_where_both_sets_know_names_and_another_column_may_be_the_label():
    queries = feature_set([[1, 0], [0, 1]], [0, 1], class_names=("cat", "dog"), kind=["x", "y"])
    gallery = feature_set([[1, 0], [0, 1]], [1, 0], class_names=("dog", "cat"), kind=["y", "x"])
    assert retrieve(queries, gallery, device=CPU).scores((1,))["recall_at_1_pct"] == 100
    assert retrieve(queries, gallery, label="kind", device=CPU).scores((1,))["recall_at_1_pct"] == 0
    unnamed = replace(gallery, class_names=())
    assert retrieve(queries, unnamed, device=CPU).scores((1,))["recall_at_1_pct"] == 0


def sentence(*args, **options):
    with pytest.raises(DatasetError) as error:
        retrieve(*args, device=CPU, **options)
    return str(error.value)


def test_what_cannot_be_scored_is_one_sentence():
    features = feature_set([[1, 0], [0, 1]], [0, 1], part=["a", ""])
    assert sentence(features, features) == (
        "PHOTOS: no query has another image of its label to find; there is nothing to score"
    )
    same = feature_set([[1, 0], [0, 1]], [0, 0], part=["a", "a"])
    assert sentence(same, same, exclude=["part"]) == (
        "PHOTOS: no query has another image of its label to find outside its own part; there is nothing to score"
    )
    assert sentence(features, features, exclude=["slide"]) == (
        "PHOTOS has no column 'slide', which --exclude-group slide needs; its columns are part, path"
    )
    assert sentence(features, features, exclude=["part"]) == (
        "PHOTOS: 1 of 2 images have no part, which --exclude-group part needs; fill the column in, or leave these "
        "images out"
    )
    unlabelled = replace(features, targets=np.array([-1, -1]), name="GALLERY")
    assert sentence(features, unlabelled) == (
        "GALLERY: no image has a label (target), but images of PHOTOS have; label both, or neither"
    )
    one = features.take([0])
    assert sentence(one, one) == "PHOTOS: there is no image to find; the gallery needs two at least"
