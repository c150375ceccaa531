"""Saved linear classifiers."""

import pytest
import torch

from dinov2.errors import CheckpointError
from dinov2.eval.linear_head import HeadDescription, LinearHead, load_linear_head

ABOUT = HeadDescription(
    class_names=("scratch", "dent"), pool="cls", weights="w.pth", checkpoint_key="teacher", train_dataset="Digits"
)


def head():
    return LinearHead(weight=torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), bias=torch.zeros(2), description=ABOUT)


def test_round_trip(tmp_path):
    head().save(tmp_path / "head.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.safetensors"]
    loaded = load_linear_head(tmp_path / "head.safetensors")
    assert loaded.description == ABOUT and loaded.pool == "cls" and loaded.weights == "w.pth"
    features = torch.tensor([[1.0, 0.0, 5.0], [1.0, 1.0, 5.0]])
    assert loaded.predict(features) == ["scratch", "dent"]
    torch.testing.assert_close(loaded.probabilities(features).sum(dim=1), torch.ones(2))


def test_features_of_another_pool_are_refused():
    with pytest.raises(
        ValueError, match="features of length 6, but the classifier takes 3: those of the pool cls of w"
    ):
        head().predict(torch.zeros(1, 6))


def test_damaged_or_missing_files_are_named(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        load_linear_head(path)
    head().save(path)
    about = tmp_path / "head.json"
    about.write_text(about.read_text().replace('"pool"', '"pol"'))
    with pytest.raises(CheckpointError, match="it or the .json file beside it is no saved classifier, or damaged"):
        load_linear_head(path)
    head().save(path)
    about.write_text(about.read_text().replace('"dent"', '"dent", "hole"'))
    with pytest.raises(CheckpointError, match="weights of 2 classes, but the .json file names others"):
        load_linear_head(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="no saved classifier, or damaged"):
        load_linear_head(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="the classifier cannot be written"):
        head().save(tmp_path / "none" / "head.safetensors")
