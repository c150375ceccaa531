"""Normalisation by controls against plain NumPy in float64, and what it promises of the controls."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.profile_normalization import normalize, parse_steps

NUM, DIM = 200, 6


def data(num=NUM, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    batches = rng.choice(["w1", "w2", "w3"], num)
    values[batches == "w2"] = values[batches == "w2"] * [1, 3, 1, 0.5, 1, 2] + 5
    return values, rng.random(num) < 0.4, {"batch": batches}


def apply(steps, values=None, is_control=None, columns=None):
    default = data()
    return normalize(
        default[0] if values is None else values,
        parse_steps(steps),
        is_control=default[1] if is_control is None else is_control,
        columns=default[2] if columns is None else columns,
        name="CELLS",
    )


def cosines(values):
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit @ unit.T


def test_whitening_agrees_with_scikit_learns_pca_of_the_controls():
    """Up to the signs of the components and the population's variance in place of the sample's."""
    values, is_control, _ = data()
    pca = PCA(whiten=True, svd_solver="full").fit(values[is_control])
    expected = pca.transform(values) * np.sqrt(is_control.sum() / (is_control.sum() - 1))
    np.testing.assert_allclose(np.abs(apply("whiten:0")), np.abs(expected), rtol=0, atol=1e-9)
    np.testing.assert_allclose(cosines(apply("whiten:0")), cosines(expected), rtol=0, atol=1e-9)


def test_whitening_agrees_with_its_formula():
    values, is_control, _ = data()
    controls = values[is_control] - values[is_control].mean(axis=0)
    covariance = sum(np.outer(row, row) for row in controls) / len(controls)
    variances, directions = np.linalg.eigh(covariance)
    scaled = (values - values[is_control].mean(axis=0)) @ directions / np.sqrt(variances + 0.3 * variances.mean())
    found = apply("whiten:0.3")
    np.testing.assert_allclose(np.abs(found), np.abs(scaled[:, ::-1]), rtol=0, atol=1e-9)
    np.testing.assert_allclose(cosines(found), cosines(scaled), rtol=0, atol=1e-9)


def test_whitened_controls_have_unit_covariance_and_mean_zero():
    _, is_control, _ = data()
    controls = apply("whiten:0")[is_control]
    np.testing.assert_allclose(controls.mean(axis=0), 0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.cov(controls.T, ddof=0), np.eye(DIM), rtol=0, atol=1e-9)


def test_directions_in_which_controls_do_not_vary_are_left_out():
    values, is_control, _ = data()
    few = np.zeros(NUM, dtype=bool)
    few[np.flatnonzero(is_control)[:4]] = True  # 4 controls span 3 directions
    assert apply("whiten", is_control=few).shape == (NUM, 3)
    constant = np.ones_like(values)
    with pytest.raises(DatasetError, match="all controls have the same features"):
        apply("whiten", values=constant)


def test_coral_gives_the_controls_of_every_batch_nearly_one_covariance():
    values, is_control, columns = data(num=3000)
    found = apply("coral:batch", values, is_control, columns)

    def spread(values):
        of_batches = [np.cov(values[is_control & (columns["batch"] == name)].T, ddof=0) for name in ("w1", "w2", "w3")]
        return max(np.linalg.norm(one - of_batches[0]) for one in of_batches) / np.linalg.norm(of_batches[0])

    assert spread(found) < 0.3 * spread(values)
    for name in ("w1", "w2", "w3"):
        np.testing.assert_allclose(found[is_control & (columns["batch"] == name)].mean(axis=0), 0, rtol=0, atol=1e-9)


def test_coral_of_one_batch_only_centres():
    values, is_control, _ = data()
    one = {"batch": np.full(NUM, "w1")}
    expected = values - values[is_control].mean(axis=0)
    np.testing.assert_allclose(apply("coral:batch", columns=one), expected, rtol=0, atol=1e-9)


def test_standardising_by_batch_agrees_with_scikit_learn():
    values, is_control, columns = data()
    found, centred = apply("standardize:batch"), apply("center:batch")
    for name in ("w1", "w2", "w3"):
        rows = columns["batch"] == name
        scaler = StandardScaler().fit(values[rows & is_control])
        np.testing.assert_allclose(found[rows], scaler.transform(values[rows]), rtol=0, atol=1e-10)
        np.testing.assert_allclose(centred[rows], values[rows] - scaler.mean_, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("setting", "expected"), [("3", 3), ("0.9", 0.9)])
def test_principal_components_agree_with_scikit_learn(setting, expected):
    values, _, _ = data()
    reference = PCA(expected, svd_solver="full").fit_transform(values)
    found = apply(f"pca:{setting}")
    assert found.shape == reference.shape
    np.testing.assert_allclose(np.abs(found), np.abs(reference), rtol=0, atol=1e-9)


def test_steps_follow_one_another():
    values, is_control, columns = data()
    expected = apply("pca:3", values=apply("coral:batch", values=apply("whiten")))
    np.testing.assert_allclose(apply("whiten,coral:batch,pca:3"), expected, rtol=0, atol=1e-12)
    assert apply("none") is not None and np.array_equal(apply("none"), values)
    assert np.array_equal(values, data()[0])  # left unchanged


def test_too_few_controls_are_named():
    with pytest.raises(DatasetError) as error:
        apply("whiten", is_control=np.zeros(NUM, dtype=bool))
    assert str(error.value) == (
        "CELLS has no images of controls, but --normalize whiten is fitted on them and needs two; keep the controls in "
        "the dataset (BBBC021: controls=keep, split=all), or leave this step out"
    )
    _, is_control, columns = data()
    only = is_control & (columns["batch"] != "w3")
    only[np.flatnonzero(columns["batch"] == "w3")[0]] = True
    with pytest.raises(DatasetError, match=r"CELLS: batch w3 has 1 image of controls, but --normalize coral:batch is"):
        apply("coral:batch", is_control=only)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "whitten",
            "--normalize whitten: unknown step 'whitten'; did you mean whiten? known are center, standardize, whiten, "
            "coral, pca",
        ),
        ("whiten:-1", "--normalize whiten:-1: whiten:EPSILON must be at least 0"),
        ("whiten:x", "--normalize whiten:x: whiten:EPSILON must be at least 0"),
        ("coral", "--normalize coral: coral needs a column whose values are aligned, e.g. coral:batch"),
        (
            "center:",
            "--normalize center:: 'center:' ends in a colon; name what stands behind it, or leave it out",
        ),
        (
            "pca:2.5",
            "--normalize pca:2.5: pca:N must be a whole number of components, or a share of the variance between 0 and "
            "1, e.g. pca:64",
        ),
    ],
)
def test_wrong_steps_are_one_sentence(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_steps(text)
    assert str(error.value) == sentence


def test_more_components_than_there_are():
    with pytest.raises(ConfigError) as error:
        apply("pca:7")
    assert str(error.value) == "--normalize pca:7: 200 images of 6 features have at most 6 components"
