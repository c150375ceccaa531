"""Scores of groups in k-NN against a plain reference, on any number of processes, in any batches and any order."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.dist import run_distributed
from torch import nn

from dinov2.data.datasets.mixed import MixedDataset
from dinov2.errors import DatasetError
from dinov2.eval.build import NamedDataset
from dinov2.eval.extraction import ExtractionSettings, extract_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.knn_evaluation import evaluate_sets
from dinov2.eval.knn_online import OnlineKnn
from dinov2.eval.knn_scores import choose_few

CPU = torch.device("cpu")
TEMPERATURE = 0.07
NUM_CLASSES = 4
KS = [5, 1, 20]
GROUP_NAMES = [f"knn{k}_group_top1_pct" for k in KS]


class Vectors:
    """Images [1, 1, D] that are their own features; with groups, if they are given."""

    def __init__(self, vectors, targets, groups=None, *, class_names=(), unreadable=()):
        self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
        self.targets = np.asarray(targets)
        self.class_names = list(class_names)
        self.unreadable = unreadable
        if groups is not None:
            self.metadata = lambda: {"group": np.asarray(groups)}

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise DatasetError(f"image {index} cannot be read")
        target = int(self.targets[index])
        return self.vectors[index][None, None], None if target < 0 else target

    def get_targets(self):
        return self.targets


class NumberedVectors(Vectors):
    """Groups have numbers too, as those of our own datasets."""

    def groups(self):
        return np.unique(self.metadata()["group"], return_inverse=True)[1]


def noisy_vectors(num, *, seed, targets):
    means = np.random.default_rng(99).normal(size=(NUM_CLASSES, 8))
    return means[targets] + 2.5 * np.random.default_rng(seed).normal(size=(num, 8))


def training_set():
    targets = np.random.default_rng(0).integers(0, NUM_CLASSES, 120)
    return Vectors(noisy_vectors(120, seed=1, targets=targets), targets)


def grouped_set(order=slice(None)):
    """97 images in 30 groups of 1 to 8 images, a fifth of them without a label."""
    rng = np.random.default_rng(5)
    groups = rng.integers(0, 30, 97)
    targets = rng.integers(0, NUM_CLASSES, 30)[groups]
    vectors = noisy_vectors(97, seed=2, targets=targets)
    targets = np.where(rng.random(97) < 0.2, -1, targets)
    return Vectors(vectors[order], targets[order], np.array([f"part {group}" for group in groups])[order])


def slow_group_accuracy(train, val, *, k):
    """Percent of groups whose mean of votes is largest for their class, group by group."""

    def unit(vectors):
        vectors = vectors.double().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    cosine = unit(val.vectors) @ unit(train.vectors).T
    groups, right = val.metadata()["group"], []
    for group in np.unique(groups[val.targets >= 0]):
        members = np.flatnonzero((groups == group) & (val.targets >= 0))
        votes = np.zeros((len(members), NUM_CLASSES))
        for place, member in enumerate(members):
            for neighbour in np.argsort(-cosine[member], kind="stable")[:k]:
                votes[place, train.targets[neighbour]] += np.exp(cosine[member, neighbour] / TEMPERATURE)
            votes[place] /= votes[place].sum()
        right.append(votes.mean(axis=0).argmax() == val.targets[members[0]])
    return 100 * np.mean(right)


def evaluate(train, val, *, nb_knn=KS, batch_size=32):
    knn = OnlineKnn(
        NamedDataset("TRAIN", train),
        NamedDataset("VAL", val),
        nb_knn=nb_knn,
        temperature=TEMPERATURE,
        extraction=ExtractionSettings(device=CPU, batch_size=batch_size, num_workers=0, on_bad_image="skip"),
    )
    return knn.score(*knn.extract(nn.Flatten()))[0]


def evaluate_few(train, val, *, nb_knn=KS, n_per_class_list=(-1,), n_tries=1, batch_size=32):
    sets = []
    for name, images in (("TRAIN", train), ("VAL", val)):
        values, targets = extract_features(nn.Flatten(), images, batch_size=batch_size, num_workers=0, device=CPU)
        columns = images.metadata() if hasattr(images, "metadata") else {}
        sets.append(
            FeatureSet(
                name=name, values=values, targets=targets.numpy(), places=np.arange(len(images)), columns=columns
            )
        )
    few = {"n_per_class_list": n_per_class_list, "n_tries": n_tries}
    return evaluate_sets(*sets, nb_knn=nb_knn, temperature=TEMPERATURE, device=CPU, **few)


def scores_of_groups(**options):
    train, val = training_set(), grouped_set()
    of_sets, predictions = evaluate_few(train, val, n_per_class_list=[-1, 3], n_tries=2, **options)
    in_training = evaluate(train, val, **options)
    of_all = [score.group_top1_pct for score in in_training.scores]
    assert of_all == [score.group_top1_pct for score in of_sets.scores[: len(KS)]]
    assert of_all[0] == pytest.approx(100 * predictions.by_group().is_right(among=1).mean(), abs=1e-9)
    return [score.group_top1_pct for score in of_sets.scores]


def test_accuracies_agree_with_a_slow_reference():
    train, val = training_set(), grouped_set()
    result = evaluate(train, val)
    for score in result.scores:
        assert score.group_top1_pct == pytest.approx(slow_group_accuracy(train, val, k=score.k), abs=1e-9)
    assert len({score.group_top1_pct for score in result.scores}) == 3
    assert result.n_val_groups == len(np.unique(val.metadata()["group"][val.targets >= 0]))
    named = result.named_scores()
    assert [named[name] for name in GROUP_NAMES] == [score.group_top1_pct for score in result.scores]
    assert named["knn_group_top1_pct"] == named["knn5_group_top1_pct"]


def test_scores_depend_neither_on_order_nor_on_batches_nor_on_the_other_ks():
    expected = scores_of_groups()
    for batch_size in (1, 7, 1000):
        assert scores_of_groups(batch_size=batch_size) == expected
    mixed_up = evaluate(training_set(), grouped_set(np.random.default_rng(3).permutation(97)))
    assert [score.group_top1_pct for score in mixed_up.scores] == expected[:3]
    for k, score in zip(KS, expected[:3], strict=True):
        assert evaluate(training_set(), grouped_set(), nb_knn=[k]).scores[0].group_top1_pct == score


@pytest.mark.dist
@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 8), (3, 64)])
def test_scores_do_not_depend_on_the_number_of_processes(num_processes, batch_size):
    """97 images in batches of 64: one rank of three has no image at all."""
    results = run_distributed(scores_of_groups, num_processes=num_processes, args={"batch_size": batch_size})
    assert results == [scores_of_groups()] * num_processes


def test_the_mean_of_votes_decides_and_not_the_majority():
    """Two images are hardly nearer to class 1, the third is much nearer to class 0."""
    train = Vectors([[1, 0], [0, 1]], [0, 1])
    hardly = [np.cos(np.radians(46)), np.sin(np.radians(46))]
    val = Vectors([hardly, hardly, [1, 0], [0, 1]], [0, 0, 0, 1], ["a", "a", "a", "b"])
    (score,) = evaluate(train, val, nb_knn=[2]).scores
    assert (score.top1_pct, score.group_top1_pct) == (50, 100)
    (score,) = evaluate(train, val, nb_knn=[1]).scores  # each image has one vote
    assert (score.top1_pct, score.group_top1_pct) == (50, 50)


def test_of_equal_means_the_first_class_wins():
    train = Vectors([[1, 0], [0, 1]], [0, 1])
    for target, expected in ((0, 100), (1, 0)):
        val = Vectors([[0, 1], [1, 0]], [target] * 2, ["a", "a"])
        assert evaluate(train, val, nb_knn=[1]).scores[0].group_top1_pct == expected


def test_few_training_images_have_scores_of_groups_too():
    train, val = training_set(), grouped_set()
    (score,) = evaluate_few(train, val, nb_knn=[3], n_per_class_list=[3], n_tries=3)[0].scores
    tries = []
    for seed in range(3):
        chosen = choose_few(train.targets, n_per_class=3, seed=seed).sort().values
        tries.append(slow_group_accuracy(Vectors(train.vectors[chosen], train.targets[chosen]), val, k=3))
    assert (score.k, score.group_top1_pct) == (3, pytest.approx(np.mean(tries), abs=1e-9))


def test_groups_of_several_classes_are_left_out_and_counted(caplog):
    train = Vectors(np.eye(3), [0, 1, 2])
    val = Vectors(np.eye(3)[[0, 0, 1, 1, 2]], [0, 0, 2, 2, 2], ["a", "a", "b", "b", "c"])
    expected = evaluate(train, val, nb_knn=[1])
    assert (expected.scores[0].group_top1_pct, expected.n_val_groups) == (pytest.approx(200 / 3), 3)
    wider = Vectors(
        np.concatenate([val.vectors, np.eye(3)[[0, 1]]]), [*val.targets, 0, 1], [*"aabbc", "tumour", "tumour"]
    )
    with caplog.at_level(logging.WARNING):
        result = evaluate(train, wider, nb_knn=[1])
    assert replace(result.scores[0], top1_pct=0, top5_pct=0, mean_per_class_pct=0) == replace(
        expected.scores[0], top1_pct=0, top5_pct=0, mean_per_class_pct=0
    )
    assert (result.n_val, result.n_val_groups) == (7, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "VAL: 1 of 4 groups have images of different classes; they are left out of the scores of groups"
    ]


def test_without_a_group_that_could_be_scored_there_are_no_scores(caplog):
    train = Vectors(np.eye(3), [0, 1, 2])

    def names_of(groups):
        result = evaluate(train, Vectors(np.eye(3), [0, 1, 2], groups), nb_knn=[1])
        assert result.n_val_groups == 0 and result.scores[0].group_top1_pct is None
        return [name for name in result.named_scores() if "group" in name]

    with caplog.at_level(logging.WARNING):
        assert names_of(None) == names_of(["a", "b", "c"]) == []
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert names_of(["a", "a", "c"]) == []
    assert [record.getMessage() for record in caplog.records] == [
        "VAL: 1 of 2 groups have images of different classes; they are left out of the scores of groups, and so there "
        "are none"
    ]


def test_images_that_are_left_out_and_classes_that_nobody_knows():
    train = Vectors(np.eye(3), [0, 1, 1], class_names=["bad", "good", "odd"])
    vectors, targets, groups = np.eye(3)[[0, 0, 1, 1, 2, 0]], [0, 0, 2, 2, 1, 1], [*"aabbcc"]
    val = Vectors(vectors, targets, groups, class_names=["bad", "good", "odd"], unreadable=(5,))
    result = evaluate(train, val, nb_knn=[1])
    assert result.n_val_groups == 3
    assert result.scores[0].group_top1_pct == pytest.approx(200 / 3)  # odd is never right; c has one image


def test_groups_of_one_name_in_two_parts_of_a_mixture_are_two():
    train = Vectors(np.eye(2), [0, 1])
    parts = [NumberedVectors(np.eye(2)[[0, 0]], [0, 0], ["1", "1"], class_names=["bad", "good"])]
    parts += [NumberedVectors(np.eye(2)[[1, 1]], [1, 1], ["1", "1"], class_names=["bad", "good"])]
    result = evaluate(train, MixedDataset(parts, ["A", "B"]), nb_knn=[1])
    assert (result.n_val_groups, result.scores[0].group_top1_pct) == (2, 100)
