"""Profiles against means and medians taken one by one."""

from dataclasses import replace

import numpy as np
import torch
from support.moa_table import moa_features

from dinov2.eval.columns import text_column
from dinov2.eval.profiles import build_profiles, take_images
from dinov2.eval.protocol_forms import NSC, NSCB, PLATES, TREATMENTS, WELLS, parse_protocol


def noisy_features(**columns):
    features = moa_features(**columns)
    features.values[:] = torch.from_numpy(np.random.default_rng(0).normal(size=tuple(features.values.shape)))
    return features


def wells_of(features, treatment):
    """Mean of each well of a treatment, with its plate."""
    plates, wells = features.columns["plate"], features.columns["well"]
    rows = np.flatnonzero(features.columns["treatment"] == treatment)
    values = features.values.numpy()
    names = sorted({(plates[row], wells[row]) for row in rows})
    return names, np.array([values[(plates == plate) & (wells == well)].mean(axis=0) for plate, well in names])


def test_a_treatment_is_the_median_of_the_means_of_its_wells():
    features = noisy_features()
    images = take_images(features, NSC)
    profiles = build_profiles(images, (WELLS, TREATMENTS))
    names = ["DMSO 0", "a1 1", "a1 10", "a2 1", "b1 1", "b2 1", "t2 1", "taxol 1"]
    assert profiles.names.tolist() == names
    for name, values in zip(names, profiles.values, strict=True):
        _, wells = wells_of(features, name)
        np.testing.assert_allclose(values.numpy(), np.median(wells, axis=0), rtol=0, atol=1e-12)
    assert [len(rows) for rows in profiles.members] == [12, 4, 4, 4, 4, 4, 4, 12]


def test_or_the_median_of_the_means_of_its_plates():
    columns = moa_features().columns
    features = noisy_features(plate=columns["batch"], well=np.char.add(columns["plate"], columns["well"]))
    profiles = build_profiles(take_images(features, NSCB), (WELLS, PLATES, TREATMENTS))
    names, of_wells = wells_of(features, "taxol 1")
    plates = sorted({plate for plate, _ in names})
    assert len(plates) == 3 and len(names) == 6
    of_plates = [of_wells[[one == plate for one, _ in names]].mean(axis=0) for plate in plates]
    np.testing.assert_allclose(profiles.values[-1].numpy(), np.median(of_plates, axis=0), rtol=0, atol=1e-12)


def test_without_levels_each_image_is_a_profile_in_the_order_of_paths():
    features = moa_features(order=np.arange(48)[::-1])
    images = take_images(features, parse_protocol("leave-one-group-out:column=plate"))
    profiles = build_profiles(images, ())
    assert profiles.names.tolist() == sorted(features.columns["path"].tolist())
    assert images.places.tolist() == list(np.argsort(moa_features().columns["path"], kind="stable"))
    assert torch.equal(profiles.values, images.values)


def test_images_without_a_label_are_left_out_and_controls_are_found_in_any_case():
    features = moa_features()
    moas = features.columns["moa"].copy()
    moas[:6] = ""
    compounds = np.char.replace(features.columns["compound"], "DMSO", "dmso")
    images = take_images(moa_features(moa=moas, compound=compounds), NSC)
    assert len(images) == 42 and images.is_control.sum() == 12


def test_what_is_unknown_has_no_text():
    features = moa_features()
    count = len(features)
    known = np.array([1.5, np.nan] * (count // 2)), np.array([" a", None] * (count // 2), dtype=object)
    features = replace(features, columns={"dose": known[0], "slide": known[1]})
    texts = [text_column(features, name, needed_by="this").tolist()[:2] for name in ("dose", "slide")]
    assert texts == [["1.5", ""], ["a", ""]]


def test_groups_of_one_name_in_two_parts_of_a_mixture_are_two():
    features = moa_features(group=np.array(["1"] * 24 + ["2"] * 24))
    object.__setattr__(features, "groups", np.repeat([0, 1, 2], 16))
    texts = text_column(features, "group", needed_by="the test")
    assert [sorted(set(part)) for part in (texts[:16], texts[16:24], texts[24:32], texts[32:])] == [
        ["1 #0"],
        ["1 #1"],
        ["2 #1"],
        ["2 #2"],
    ]
