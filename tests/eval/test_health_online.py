"""Label-free measures of a backbone in training: what they look at, what they compare with, and that ranks agree."""

import logging
import random

import numpy as np
import pytest
import torch
from support.dist import run_distributed
from torch import nn

from dinov2.errors import DatasetError
from dinov2.eval.build import NamedDataset
from dinov2.eval.extraction import ExtractionSettings, extract_local_features
from dinov2.eval.health_measures import alignment, effective_rank, neighbour_overlap_pct, rankme, singular_values
from dinov2.eval.health_online import NUM_NEIGHBOURS, OnlineHealth, Preprocessed, SampleFeatures
from dinov2.eval.health_pairs import compare_pairs, neighbours_within
from dinov2.eval.health_views import TwoViews, choose_images

CPU = torch.device("cpu")
NAMES = ["rankme", "effective_rank", "uniformity", "alignment"]


class Images:
    """Random images [2, 8, 8]; some are unreadable."""

    def __init__(self, num, *, unreadable=()):
        self.images = torch.randn(num, 2, 8, 8, generator=torch.Generator().manual_seed(1))
        self.unreadable = unreadable

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise DatasetError(f"image {index} cannot be read")
        return self.images[index], None


class Backbone(nn.Module):
    def __init__(self, seed=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = nn.Linear(128, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.projection(images.flatten(1)))


def online(images, *, num_images, name="SET", **settings):
    extraction = ExtractionSettings(**{"device": CPU, "batch_size": 32, "num_workers": 0} | settings)
    return OnlineHealth(NamedDataset(name, images), num_images=num_images, extraction=extraction)


def features_of(images, backbone, places):
    with torch.no_grad():
        return backbone.eval()(images.images[torch.from_numpy(places)])


def test_measures_are_those_of_the_sample():
    images, places = Images(150), choose_images(150, at_most=60)
    measures, sample = online(images, num_images=60)(Backbone())
    values = features_of(images, Backbone(), places)
    assert list(measures) == NAMES
    assert np.array_equal(sample.places, places) and sample.dataset == "SET"
    torch.testing.assert_close(sample.values, values)
    assert measures["rankme"] == pytest.approx(rankme(singular_values(values, is_centred=False)))
    assert measures["effective_rank"] == pytest.approx(effective_rank(singular_values(values, is_centred=True)))
    assert measures["uniformity"] == pytest.approx(compare_pairs(values, device=CPU).uniformity)
    views = features_of(images, TwoViews(Backbone()), places[::4])
    assert measures["alignment"] == pytest.approx(alignment(*views.chunk(2, dim=1)))


def test_features_that_are_known_are_not_computed_again():
    class Counting(Backbone):
        num_images = 0

        def forward(self, images):
            self.num_images += len(images)
            return super().forward(images)

    images, health = Images(150), online(Images(150), num_images=60)
    known = extract_local_features(Backbone(), images, batch_size=32, num_workers=0, device=CPU)
    backbone = Counting()
    measures, sample = health(backbone, known=known)
    expected, expected_sample = health(Backbone())
    assert backbone.num_images == 2 * 32  # two views, in one pass
    assert np.array_equal(sample.places, expected_sample.places)
    torch.testing.assert_close(sample.values, expected_sample.values)
    assert measures == pytest.approx(expected)


def test_overlap_with_the_start(tmp_path):
    images, health = Images(80), online(Images(80), num_images=50)
    _, start = health(Backbone())
    (tmp_path / "start").write_bytes(start.write())
    read = SampleFeatures.read(tmp_path / "start")
    assert read.dataset == "SET" and np.array_equal(read.places, start.places)
    assert torch.equal(read.values, start.values)
    assert health(Backbone(), start=read)[0]["nn_overlap_with_start_pct"] == 100
    found = health(Backbone(seed=4), start=read)[0]["nn_overlap_with_start_pct"]
    both = [
        neighbours_within(features_of(images, Backbone(seed), start.places), num_neighbours=NUM_NEIGHBOURS, device=CPU)
        for seed in (3, 4)
    ]
    assert found == pytest.approx(neighbour_overlap_pct(*both)) and 20 < found < 95


def test_overlap_is_over_images_that_both_have():
    _, start = online(Images(80), num_images=80)(Backbone())
    fewer = online(Images(80, unreadable=(5, 17)), num_images=80, on_bad_image="skip")
    measures, sample = fewer(Backbone(), start=start)
    assert len(sample.places) == 78 and measures["nn_overlap_with_start_pct"] == 100


def test_overlap_is_left_out_where_it_means_nothing(tmp_path, caplog):
    _, start = online(Images(80), num_images=50)(Backbone())
    for other in (online(Images(80), num_images=50, name="OTHER"), online(Images(80), num_images=10)):
        assert list(other(Backbone(), start=start)[0]) == NAMES
    assert SampleFeatures.read(tmp_path / "none") is None
    (tmp_path / "damaged").write_bytes(start.write()[:-9])
    with caplog.at_level(logging.WARNING):
        assert SampleFeatures.read(tmp_path / "damaged") is None
    assert "cannot be read" in caplog.text and "the overlap with the start is left out" in caplog.text


def test_too_few_images_give_no_measures(caplog):
    health = online(Images(3, unreadable=(0, 1)), num_images=10, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        assert health(Backbone())[0] == {}
    assert "SET: fewer than 2 images can be read, too few for measures" in caplog.messages


def test_modes_and_random_states_are_left_alone():
    backbone = Backbone().train()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    online(Images(40), num_images=30, num_workers=1)(backbone)
    assert backbone.training and backbone.dropout.training and backbone.projection.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_training_images_are_preprocessed():
    images = Preprocessed([("a", None), ("b", 3)], str.upper)
    assert (len(images), images[0], images[1]) == (2, ("A", None), ("B", 3))


def of_rank():
    images = Images(90, unreadable=(4,))
    health = online(images, num_images=70, on_bad_image="skip")
    _, start = health(Backbone())
    known = extract_local_features(Backbone(4), images, batch_size=32, num_workers=0, device=CPU, on_bad_image="skip")
    return {
        "computed": health(Backbone(4), start=start)[0],
        "known": health(Backbone(4), known=known, start=start)[0],
        "places": torch.from_numpy(start.places),
    }


@pytest.mark.dist
def test_three_ranks_find_what_one_finds():
    alone = of_rank()
    assert alone["known"] == pytest.approx(alone["computed"]) and "nn_overlap_with_start_pct" in alone["known"]
    results = run_distributed(of_rank, num_processes=3)
    for result in results:
        assert result["computed"] == results[0]["computed"] == pytest.approx(alone["computed"])
        assert result["known"] == results[0]["known"] == pytest.approx(alone["known"])
        assert torch.equal(result["places"], alone["places"])
