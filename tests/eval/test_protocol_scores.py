"""NSC, NSCB and other protocols against scores computed by hand, and their unhappy paths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.dist import run_distributed
from support.moa_table import moa_features

from dinov2.errors import CheckpointError, ConfigError, DatasetError
from dinov2.eval.protocol_forms import NSC, NSCB, parse_protocol
from dinov2.eval.protocol_scores import details_of, find_answerable, score_protocol

CPU = torch.device("cpu")


def score(protocol, features=None, **options):
    protocol = parse_protocol(protocol) if isinstance(protocol, str) else protocol
    return score_protocol(moa_features() if features is None else features, protocol, device=CPU, **options)


def right(scored):
    return {str(name): bool(is_right) for name, is_right in zip(scored.profiles.names, scored.is_right, strict=True)}


def nearest(scored):
    names = scored.profiles.names
    return {str(name): str(names[place]) for name, place in zip(names, scored.nearest, strict=True)}


def sentence(kind, protocol, features=None, **options):
    with pytest.raises(kind) as error:
        score(protocol, features, **options)
    return str(error.value)


def test_nsc_by_hand():
    """DMSO lies nearest to most and is never compared; the other concentration of a1 is not either."""
    scored = score(NSC)
    assert nearest(scored) == {
        "a1 1": "a2 1",
        "a1 10": "b1 1",
        "a2 1": "a1 1",
        "b1 1": "a1 10",
        "b2 1": "a1 10",
        "t2 1": "taxol 1",
        "taxol 1": "t2 1",
    }
    assert right(scored) == {
        "a1 1": True,
        "a1 10": False,
        "a2 1": True,
        "b1 1": False,
        "b2 1": False,
        "t2 1": True,
        "taxol 1": True,
    }
    assert scored.accuracy_pct() == pytest.approx(100 * 4 / 7)
    assert scored.class_names == ("A", "B", "T") and scored.notes == () and scored.left_out == ()
    assert scored.accuracy_by("compound") == {
        "a1": (2, 50),
        "a2": (1, 100),
        "b1": (1, 0),
        "b2": (1, 0),
        "t2": (1, 100),
        "taxol": (1, 100),
    }
    assert scored.similarity[0] == pytest.approx(np.cos(np.radians(20)), abs=1e-7)


def test_nscb_by_hand_leaves_out_the_moa_of_one_batch():
    """B is in week 1 only; taxol, in all weeks, may be compared with treatments of week 1 or 2."""
    scored = score(NSCB)
    assert nearest(scored) == {
        "a1 1": "a2 1",
        "a1 10": "a2 1",
        "a2 1": "a1 1",
        "t2 1": "taxol 1",
        "taxol 1": "t2 1",
    }
    assert scored.accuracy_pct() == 100
    assert scored.left_out == ("B",) and scored.class_names == ("A", "T")
    assert scored.notes == (
        "CELLS: 1 labels (B) have no two profiles that differ in compound and batch, so protocol nscb could never be "
        "right; their 2 profiles are left out",
    )
    assert list(scored.excluding["batch"]) == ["Week1", "Week1", "Week2", "Week2", "Week1 + Week2 + Week3"]


def test_nscb_counts_the_moa_of_one_batch_if_asked_to():
    scored = score("nscb:unanswerable=count")
    assert scored.accuracy_pct() == pytest.approx(100 * 5 / 7)
    assert not right(scored)["b1 1"] and scored.left_out == ()
    assert scored.notes[0].endswith("their 2 profiles count as wrong")
    assert list(scored.predictions().targets) == [0, 0, 0, -1, -1, 2, 2]


def test_nscb_with_a_profile_for_each_batch_of_taxol():
    """Taxol of week 1 lies near a2, that of week 2 may not be compared with t2, that of week 3 is right: one third."""
    scored = score("nscb:many=split")
    assert nearest(scored) == {
        "a1 1 Week1": "a2 1 Week2",
        "a1 10 Week1": "a2 1 Week2",
        "a2 1 Week2": "a1 1 Week1",
        "t2 1 Week2": "taxol 1 Week3",
        "taxol 1 Week1": "a2 1 Week2",
        "taxol 1 Week2": "a1 10 Week1",
        "taxol 1 Week3": "t2 1 Week2",
    }
    assert scored.accuracy_pct() == pytest.approx(100 * (4 + 1 / 3) / 5)
    assert scored.accuracy_by("compound")["taxol"] == (1, pytest.approx(100 / 3))
    assert list(scored.has_right) == [True] * 5 + [False, True]
    assert scored.notes[1] == "CELLS: 1 profiles may be compared with none of their label; they count as wrong"
    details = details_of(scored)
    assert (details["num_profiles"], details["num_images"]) == (5, 28)
    assert details["num_without_comparable_profile_of_their_label"] == 1
    assert details["by_batch"]["Week3"] == {"num_profiles": 1, "accuracy_pct": 100}


def test_a_moa_with_one_compound_can_never_be_right_and_is_left_out():
    compounds = moa_features().columns["compound"]
    scored = score(NSC, moa_features(compound=np.where(compounds == "b2", "b1", compounds)))
    assert scored.left_out == ("B",) and len(scored.labels) == 5


def test_scores_depend_neither_on_the_order_of_images_nor_on_the_number_type_of_texts():
    order = np.random.default_rng(0).permutation(len(moa_features()))
    for protocol in (NSC, NSCB, parse_protocol("nscb:many=split"), parse_protocol("leave-one-group-out:column=plate")):
        expected, mixed = score(protocol), score(protocol, moa_features(order))
        assert np.array_equal(expected.profiles.names, mixed.profiles.names)
        assert np.array_equal(expected.scores, mixed.scores)
        assert np.array_equal(expected.profiles.values, mixed.profiles.values)
        assert np.array_equal(expected.nearest, mixed.nearest)
    as_objects = moa_features(moa=moa_features().columns["moa"].astype(object))
    assert np.array_equal(score(NSC, as_objects).scores, score(NSC).scores)


def images_in_blobs(num=300):
    rng = np.random.default_rng(1)
    targets, groups = rng.integers(0, 3, num), rng.integers(0, 6, num)
    means = rng.normal(size=(3, 5))
    values = torch.tensor(means[targets] + 0.8 * rng.normal(size=(num, 5))).float()
    features = moa_features().take(np.zeros(num, dtype=int))
    return replace(
        features,
        values=values,
        targets=targets,
        places=np.arange(num),
        columns={"slide": np.array([f"slide {group}" for group in groups])},
    )


@pytest.mark.parametrize("k", [1, 7])
def test_leave_one_slide_out_agrees_with_going_through_the_slides(k):
    features = images_in_blobs()
    scored = score(f"leave-one-group-out:column=slide:k={k}", features)
    values = features.values.double().numpy()
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    slides, targets = features.columns["slide"], features.targets
    for number in range(len(features)):
        others = np.flatnonzero(slides != slides[number])
        cosine = values[others] @ values[number]
        chosen = np.argsort(-cosine, kind="stable")[:k]
        votes = np.bincount(targets[others[chosen]], weights=np.exp(cosine[chosen] / 0.07), minlength=3)
        assert scored.scores[number] == pytest.approx(votes / votes.sum(), abs=1e-5)
    assert 60 < scored.accuracy_pct() < 100


def test_leave_one_slide_out_with_logistic_regression_agrees_with_scikit_learn():
    features = images_in_blobs()
    scored = score("leave-one-group-out:column=slide:classifier=logistic:c=0.5", features)
    data, slides = features.values.double().numpy(), features.columns["slide"]
    for slide in np.unique(slides):
        rows = slides == slide
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
        model.fit(data[~rows], features.targets[~rows])
        assert scored.scores[rows] == pytest.approx(model.predict_proba(data[rows]), abs=1e-9)
    assert 60 < scored.accuracy_pct() < 100


def scores_of_rank():
    features = images_in_blobs()
    return {
        kind: torch.from_numpy(score(f"leave-one-group-out:column=slide:{kind}", features).scores)
        for kind in ("k=5", "classifier=logistic")
    }


@pytest.mark.dist
def test_three_ranks_score_like_one(monkeypatch):
    results = run_distributed(scores_of_rank, num_processes=3)
    expected = scores_of_rank()
    for result in results:
        assert all(torch.equal(result[kind], expected[kind]) for kind in expected)


def test_which_profiles_may_be_compared_with_one_of_their_label():
    labels = np.array(["x", "x", "x", "y", "y", "z"])
    codes = np.array([[0, 0], [0, 1], [1, 1], [2, 0], [3, 0], [4, 2]])  # compound, batch
    assert find_answerable(labels, codes).tolist() == [True, False, True, False, False, False]
    assert find_answerable(labels, codes[:, :1]).tolist() == [True] * 5 + [False]
    assert find_answerable(labels, codes[:, :0]).tolist() == [True] * 5 + [False]


def test_predictions_have_the_compound_as_group():
    predictions = score(NSC).predictions()
    assert predictions.paths.tolist()[:2] == ["a1 1", "a1 10"]
    assert predictions.groups.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert predictions.predicted().tolist() == [0, 1, 0, 0, 0, 2, 2]


def test_missing_columns_and_values_are_named():
    assert sentence(DatasetError, NSCB, moa_features(batch=None)) == (
        "CELLS has no column 'batch', which protocol nscb (exclude=batch) needs; its columns are compound, "
        "concentration, moa, path, plate, treatment, well"
    )
    assert "no column 'plate', which protocol nsc (aggregate=mean@plate/well) needs" in sentence(
        DatasetError, NSC, moa_features(plate=None)
    )
    batches = moa_features().columns["batch"].copy()
    batches[:3] = ""
    assert sentence(DatasetError, NSCB, moa_features(batch=batches)) == (
        "CELLS: 3 of 36 images have no batch, which protocol nscb (exclude=batch) needs; fill the column in, or leave "
        "these images out"
    )
    nothing = np.full(48, "")
    assert sentence(DatasetError, NSC, moa_features(moa=nothing)) == (
        "CELLS: no image has a label (moa) that protocol nsc could predict"
    )


def test_labels_that_cannot_be_right_are_an_error_if_there_is_no_other():
    assert sentence(DatasetError, NSC, moa_features(compound=moa_features().columns["moa"])) == (
        "CELLS: protocol nsc can be right for no label (moa): no two profiles of a label differ in compound"
    )
    everywhere = moa_features(batch=np.tile(["Week1", "Week2"], 24))
    assert sentence(DatasetError, NSCB, everywhere) == (
        "CELLS: protocol nscb can be right for no label (moa): no two profiles of a label differ in compound and "
        "batch; many=split takes profiles of several values apart"
    )
    moas = np.where(moa_features().columns["moa"] == "DMSO", "DMSO", "A")
    assert sentence(DatasetError, NSC, moa_features(moa=moas)) == (
        "CELLS: all profiles have one label (A); protocol nsc needs two"
    )


def test_two_treatments_in_a_well_and_two_labels_of_a_treatment_are_errors():
    treatments = moa_features().columns["treatment"].copy()
    treatments[0] = "other 1"
    assert sentence(DatasetError, NSC, moa_features(treatment=treatments)) == (
        "CELLS: the images of Week1_1 B00 have several values of treatment (a1 1, other 1), which median@treatment "
        "needs to be one"
    )
    moas = moa_features().columns["moa"].copy()
    moas[0] = "B"
    assert sentence(DatasetError, NSC, moa_features(moa=moas)) == (
        "CELLS: the images of a1 1 have several labels (moa: A, B), but protocol nsc makes one profile of them "
        "(median@treatment)"
    )


def test_features_that_are_not_finite_and_too_many_neighbours():
    features = moa_features()
    features.values[3] = torch.nan
    assert sentence(CheckpointError, NSC, features) == (
        "CELLS: 1 of 48 feature vectors hold NaN or infinity; the weights are damaged, or too large for this "
        "precision: try compute_precision.param_dtype=fp32"
    )
    assert sentence(ConfigError, "nsc:k=7") == "--protocol nsc: k=7 must be below the number of profiles, 7"
