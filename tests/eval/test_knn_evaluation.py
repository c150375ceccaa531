"""k-NN accuracies against scikit-learn, on any number of processes, workers and batch sizes."""

import logging
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from support.dist import run_distributed
from torch import nn

from dinov2 import distributed
from dinov2.errors import CheckpointError, ConfigError, DatasetError
from dinov2.eval.build import NamedDataset
from dinov2.eval.extraction import ExtractionSettings, extract_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.knn_evaluation import evaluate_sets
from dinov2.eval.knn_online import OnlineKnn
from dinov2.eval.knn_scores import choose_few

CPU = torch.device("cpu")
TEMPERATURE = 0.07


class Images:
    """Random images [3, 4, 4] whose class shows; some are unreadable."""

    def __init__(self, num, *, seed=0, num_classes=7, targets=None, class_names=(), unreadable=(), knows_targets=True):
        rng = np.random.default_rng(seed)
        self.targets = rng.integers(0, num_classes, num) if targets is None else np.asarray(targets)
        means = np.random.default_rng(99).normal(size=(max(num_classes, 20), 3, 4, 4))
        self.images = torch.from_numpy(means[self.targets] + 2 * rng.normal(size=(num, 3, 4, 4))).float()
        self.class_names = list(class_names)
        self.unreadable = unreadable
        if knows_targets:
            self.get_targets = lambda: self.targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise DatasetError(f"image {index} (img{index}.png) cannot be read: truncated")
        target = int(self.targets[index])
        return self.images[index], None if target < 0 else target


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.projection = nn.Linear(48, 8)
        self.dropout = nn.Dropout(0.5)
        self.num_calls = 0

    def forward(self, images):
        self.num_calls += 1
        return self.dropout(self.projection(images.flatten(1)))


class Evaluation(OnlineKnn):
    def __call__(self, backbone):
        return self.score(*self.extract(backbone))[0]


def evaluation(train=None, val=None, *, nb_knn=(5, 1, 20), **settings):
    settings = {"device": CPU, "batch_size": 32, "num_workers": 0} | settings
    return Evaluation(
        NamedDataset("TRAIN", Images(200) if train is None else train),
        NamedDataset("VAL", Images(101, seed=1) if val is None else val),
        nb_knn=nb_knn,
        temperature=TEMPERATURE,
        extraction=ExtractionSettings(**settings),
    )


def feature_set(name, images, backbone):
    values, targets = extract_features(backbone, images, batch_size=32, num_workers=0, device=CPU)
    return FeatureSet(name=name, values=values, targets=targets.numpy(), places=np.arange(len(images)))


def evaluate_few(n_per_class_list, *, train=None, val=None, nb_knn=(5, 1, 20), n_tries=1):
    train = feature_set("TRAIN", Images(200) if train is None else train, Backbone())
    val = feature_set("VAL", Images(101, seed=1) if val is None else val, Backbone())
    return evaluate_sets(
        train,
        val,
        nb_knn=nb_knn,
        temperature=TEMPERATURE,
        device=CPU,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
    )


def evaluate_on_rank(batch_size, num_workers, num_val=101):
    backbone, val = Backbone(), Images(num_val, seed=1)
    result = evaluation(val=val, batch_size=batch_size, num_workers=num_workers)(backbone)
    of_sets, predictions = evaluate_few([-1, 3], val=val, n_tries=2)
    return {
        "scores": [asdict(score) for score in result.scores],
        "scores of sets": [asdict(score) for score in of_sets.scores],
        "votes": torch.from_numpy(predictions.scores),
        "n_val": result.n_val,
        "calls": backbone.num_calls,
    }


def scores_of(result):
    return [asdict(score) for score in result.scores]


def scikit_learn(train, val, *, k):
    """Votes [m, C] of scikit-learn's brute force; it settles ties in no stated way, and there are none here."""
    with torch.no_grad():
        train_features, val_features = (Backbone().eval()(images.images).numpy() for images in (train, val))
    reference = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / TEMPERATURE),
    )
    return reference.fit(train_features, train.targets).predict_proba(val_features)


def test_accuracies_agree_with_scikit_learn():
    train, val = Images(200), Images(101, seed=1)
    result = evaluation(train, val)(Backbone())
    assert [score.k for score in result.scores] == [5, 1, 20]
    for score in result.scores:
        votes = scikit_learn(train, val, k=score.k)
        predicted = votes.argmax(axis=1)
        assert score.top1_pct == pytest.approx(100 * (predicted == val.targets).mean(), abs=1e-9)
        recalls = [(predicted[val.targets == number] == number).mean() for number in range(7)]
        assert score.mean_per_class_pct == pytest.approx(100 * np.mean(recalls), abs=1e-9)
        order = np.argsort(-votes, axis=1, kind="stable")[:, :5]
        in_top5 = ((order == val.targets[:, None]) & (np.take_along_axis(votes, order, axis=1) > 0)).any(axis=1)
        assert score.top5_pct == pytest.approx(100 * in_top5.mean(), abs=1e-9)
    assert (result.n_train, result.n_val, result.n_classes, result.n_features) == (200, 101, 7, 8)
    assert result.named_scores()["knn_top1_pct"] == result.scores[0].top1_pct  # the first k, not the best
    assert result.named_scores()["knn20_top5_pct"] == result.scores[2].top5_pct


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 2), (1000, 0)])
def test_scores_depend_neither_on_batch_size_nor_on_workers(batch_size, num_workers):
    assert evaluate_on_rank(batch_size, num_workers)["scores"] == evaluate_on_rank(32, 0)["scores"]


def features_on_rank():
    features, targets = extract_features(Backbone(), Images(45), batch_size=8, num_workers=0, device=CPU)
    return {"features": features, "targets": targets}


def error_on_rank(on_bad_image):
    train = Images(60, unreadable=(9,))  # in batches of 8 it is rank 1's
    try:
        return evaluation(train, on_bad_image=on_bad_image, batch_size=8)(Backbone()).n_train
    except DatasetError as error:
        return f"{distributed.get_rank()}: {error}"


def all_on_rank(num_val):
    return {
        "evaluation": evaluate_on_rank(32, 0, num_val),
        "features": features_on_rank(),
        "bad image": [error_on_rank("error"), error_on_rank("skip")],
    }


@pytest.mark.dist
@pytest.mark.parametrize(("num_processes", "num_val"), [(2, 101), (3, 33)])
def test_results_do_not_depend_on_the_number_of_processes(num_processes, num_val):
    """33 images in batches of 32: one rank of three has no image at all."""
    alone, features = evaluate_on_rank(32, 0, num_val), features_on_rank()
    assert alone["n_val"] == len(alone["votes"]) == num_val
    votes = scikit_learn(Images(200), Images(num_val, seed=1), k=5)
    own = alone["votes"].numpy() / alone["votes"].sum(dim=1, keepdim=True).numpy()
    np.testing.assert_allclose(own, votes, rtol=0, atol=1e-5)  # its cosines are float32
    assert np.array_equal(own.argmax(axis=1), votes.argmax(axis=1))
    assert alone["scores of sets"][:3] == alone["scores"]  # in training, and of features that are kept
    assert torch.equal(features["targets"], torch.from_numpy(Images(45).targets))
    results = run_distributed(all_on_rank, num_processes=num_processes, args={"num_val": num_val})
    for rank, result in enumerate(results):
        for name in ("scores", "scores of sets", "n_val"):
            assert result["evaluation"][name] == alone[name]
        # 1e-6: this process may compute features with more threads
        torch.testing.assert_close(result["evaluation"]["votes"], alone["votes"], rtol=0, atol=1e-6)
        # a sharded model needs all ranks in every forward pass
        assert result["evaluation"]["calls"] == results[0]["evaluation"]["calls"]
        assert torch.equal(result["features"]["features"], features["features"])  # bit for bit
        assert torch.equal(result["features"]["targets"], features["targets"])
        # all ranks fail together
        assert result["bad image"] == [f"{rank}: image 9 (img9.png) cannot be read: truncated", 59]


def test_few_images_of_each_class():
    train, val, backbone = Images(200), Images(101, seed=1), Backbone()
    result, predictions = evaluate_few([3], train=train, val=val, nb_knn=[2, 10], n_tries=3)
    assert predictions is None
    assert [(score.n_per_class, score.k) for score in result.scores] == [(3, 2), (3, 3)]
    top1 = []
    for seed in range(3):
        chosen = choose_few(train.targets, n_per_class=3, seed=seed)
        assert np.array_equal(np.bincount(train.targets[chosen]), [3] * 7)
        few = Images(len(chosen), targets=train.targets[chosen])
        few.images = train.images[chosen]
        top1.append(evaluation(few, val, nb_knn=[3])(backbone).scores[0].top1_pct)
    # the order of equals may differ from that of the whole set, but there are none here
    assert result.scores[1].top1_pct == pytest.approx(np.mean(top1), abs=1e-9)
    assert result.scores[1].top1_std_pct == pytest.approx(np.std(top1), abs=1e-9)


def test_more_images_per_class_than_there_are():
    result, _ = evaluate_few([500], train=Images(12), nb_knn=[1])
    assert [score.k for score in result.scores] == [1, 12]


def test_evaluation_leaves_modes_gradients_and_random_states_alone():
    backbone = Backbone().train()
    backbone.projection.eval()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for num_workers in (0, 1):
        evaluation(num_workers=num_workers)(backbone)
    assert (backbone.training, backbone.dropout.training, backbone.projection.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.array_equal(np.random.get_state()[1], before[2])


def test_repeated_evaluation_gives_the_same():
    evaluate, backbone = evaluation(), Backbone()
    assert scores_of(evaluate(backbone)) == scores_of(evaluate(backbone))


def test_too_large_k_is_left_out_once(caplog):
    with caplog.at_level(logging.WARNING):
        evaluate = evaluation(Images(15), nb_knn=[20, 10, 16, 5])
        result = [evaluate(Backbone()) for _ in range(2)][1]
    assert [score.k for score in result.scores] == [10, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "k-NN leaves out k=[20, 16]: TRAIN has only 15 labelled images"
    ]


def test_only_too_large_k_is_an_error():
    with pytest.raises(ConfigError) as caught:
        evaluation(Images(15), nb_knn=[20, 16])
    assert str(caught.value) == (
        "evaluation.knn.nb_knn=[20, 16]: all are larger than the 15 labelled images of TRAIN; use at most 15"
    )


@pytest.mark.parametrize("knows_targets", [True, False])
@pytest.mark.parametrize(
    ("train", "val", "sentence"),
    [
        (
            {"targets": [-1] * 30},
            {},
            "TRAIN: no image has a label, and labels are needed here; "
            "ImageFolder takes the names of the folders below its root, "
            "a class of your own gives them by get_targets()",
        ),
        (
            {},
            {"targets": [-1] * 30},
            "VAL: no image has a label, and labels are needed here; "
            "ImageFolder takes the names of the folders below its root, "
            "a class of your own gives them by get_targets()",
        ),
        (
            {"targets": [1] * 30, "class_names": ["bad", "good"]},
            {},
            "TRAIN: all images are of one class (good); two are needed",
        ),
        (
            {"targets": [0, 1] * 15, "class_names": ["bad", "good"]},
            {"targets": [0, 1] * 15, "class_names": ["dog", "cat"]},
            "VAL: none of its classes (dog, cat) is one of TRAIN (bad, good)",
        ),
    ],
)
def test_labels_that_do_not_serve(train, val, sentence, knows_targets):
    train, val = Images(30, knows_targets=knows_targets, **train), Images(30, knows_targets=knows_targets, **val)
    with pytest.raises(DatasetError) as caught:
        evaluation(train, val)(Backbone())
    assert str(caught.value) == sentence


def test_a_dataset_without_labels_is_refused_at_once():
    train = Images(30)
    train.get_targets = lambda: None
    with pytest.raises(DatasetError, match="TRAIN: no image has a label"):
        evaluation(train)


def test_classes_are_matched_by_name(caplog):
    train = Images(60, targets=[0, 1] * 30, class_names=["bad", "good"])
    val = Images(40, targets=[0, 1] * 20, class_names=["bad", "good"])
    expected = scores_of(evaluation(train, val)(Backbone()))
    val.class_names, val.targets = ["good", "unused", "bad"], np.array([2, 0] * 20)
    assert scores_of(evaluation(train, val)(Backbone())) == expected


def test_images_of_unknown_classes_count_as_wrong(caplog):
    train = Images(60, targets=[0, 1] * 30, class_names=["bad", "good"])
    val = Images(40, targets=[0, 1] * 20, class_names=["bad", "good"])
    expected = evaluation(train, val)(Backbone()).scores[0]
    val.targets = np.array([0, 1] * 10 + [2] * 20)
    half = Images(20, targets=[0, 1] * 10)
    half.images = val.images[:20]
    val.class_names = ["bad", "good", "odd"]
    with caplog.at_level(logging.WARNING):
        score = evaluation(train, val)(Backbone()).scores[0]
    assert [record.getMessage() for record in caplog.records] == [
        "VAL: 20 images are of classes that TRAIN does not have (odd); they count as wrong"
    ]
    assert score.top1_pct == evaluation(train, half)(Backbone()).scores[0].top1_pct / 2
    assert expected.top1_pct > score.top1_pct


def test_images_without_a_label_are_left_out(caplog):
    train, val = Images(60, num_classes=3), Images(40, seed=1, num_classes=3)
    expected = scores_of(evaluation(train, val, nb_knn=[5])(Backbone()))
    with_more = Images(65, targets=[*train.targets, *[-1] * 5])
    with_more.images[:60] = train.images
    with caplog.at_level(logging.WARNING):
        result = evaluation(with_more, val, nb_knn=[5])(Backbone())
    assert scores_of(result) == expected and result.n_train == 60
    assert [record.getMessage() for record in caplog.records] == [
        "TRAIN: 5 of 65 images have no label and are left out"
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images(num_workers, caplog):
    train, val = Images(60), Images(41, seed=1, unreadable=(3, 40))
    with pytest.raises(DatasetError) as caught:
        evaluation(train, val, num_workers=num_workers)(Backbone())
    assert str(caught.value) == "image 3 (img3.png) cannot be read: truncated"
    with caplog.at_level(logging.WARNING):
        result = evaluation(train, val, num_workers=num_workers, on_bad_image="skip", batch_size=8)(Backbone())
    assert result.n_val == 39
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation left out 2 images that cannot be read; the first: image 3 (img3.png) cannot be read: truncated"
    ]


def test_no_readable_image_at_all():
    with pytest.raises(DatasetError, match="none of the images to evaluate on can be read"):
        evaluation(Images(20, unreadable=range(20)), nb_knn=[1], on_bad_image="skip")(Backbone())
    with pytest.raises(DatasetError, match="holds no images"):
        extract_features(Backbone(), Images(0), batch_size=8, num_workers=0, device=CPU)


def test_features_that_are_not_finite():
    class Broken(Backbone):
        def forward(self, images):
            features = super().forward(images)
            features[0] = float("nan")
            return features

    with pytest.raises(CheckpointError) as caught:
        evaluation(batch_size=50)(Broken())
    assert str(caught.value) == (
        "7 of 200 feature vectors hold NaN or infinity; the weights are damaged, or too large for this precision: "
        "try compute_precision.param_dtype=fp32"
    )
