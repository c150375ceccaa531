"""Features in a notebook: of images in any form, of loaders, with and without a head."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import photo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dinov2.configs import load_config
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.encoder import FeatureEncoder, extract_features, open_feature_set
from dinov2.models import build_model

MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = ["crops.global_crops_size=16", "crops.local_crops_size=8", "compute_precision.device=cpu"]
CPU = torch.device("cpu")


def backbone(**options):
    model = build_model("vit_tiny", depth=2, embed_dim=48, patch_size=4, img_size=16, init_values=1.0, **options)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def pixels(count=3, *, dtype=torch.uint8, channels=3):
    values = torch.randint(0, 256, (count, channels, 20, 24), generator=torch.Generator().manual_seed(1))
    return values.to(dtype)


def loader(count=70, *, batch_size=16, **options):
    generator = torch.Generator().manual_seed(2)
    images, targets = torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 5
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size, **options)


@pytest.fixture
def encoder():
    return FeatureEncoder(backbone(), image_size_px=16)


def test_images_of_any_form_have_the_same_features(encoder):
    batch = pixels()
    arrays = batch.permute(0, 2, 3, 1).numpy()
    wanted = encoder.encode_features(batch)
    assert wanted.shape == (3, 48) and wanted.std() > 0.1
    for images in (
        list(batch),
        arrays,
        list(arrays),
        [Image.fromarray(array) for array in arrays],
        [batch[:1], arrays[1], Image.fromarray(arrays[2])],
    ):
        assert torch.equal(encoder.encode_features(images), wanted)
    assert torch.equal(encoder.encode_features(photo()), encoder.encode_features([photo()]))
    # fractions and 16 bits: resized as float32 instead of uint8, which is within half a grey value
    for images in (batch / 255, (batch.int() * 257).to(torch.uint16)):
        torch.testing.assert_close(encoder.encode_features(images), wanted, rtol=0, atol=0.05)


def test_grey_images_serve_a_network_of_three_channels(encoder):
    grey = pixels(channels=1)
    wanted = encoder.encode_features(grey.expand(-1, 3, -1, -1))
    assert torch.equal(encoder.encode_features(grey), wanted)
    assert torch.equal(encoder.encode_features([image[0].numpy() for image in grey]), wanted)
    assert torch.equal(encoder.encode_features([Image.fromarray(image[0].numpy()) for image in grey]), wanted)


def test_what_is_no_image_is_refused(encoder):
    with pytest.raises(DatasetError, match="an image has 5 channels, and the network takes 3"):
        encoder.encode_features(pixels(channels=5))
    with pytest.raises(TypeError, match="str is no image; give Pillow images"):
        encoder.encode_features(["a.png"])
    with pytest.raises(DatasetError, match="there are no images to encode"):
        encoder.encode_features([])
    with pytest.raises(ConfigError, match="pool 'max': must be one of"):
        encoder.encode_features(pixels(), "max")


def test_networks_of_other_channels_take_theirs():
    encoder = FeatureEncoder(backbone(in_chans=5), image_size_px=16)
    assert encoder.encode_features(pixels(channels=5), "patches").shape == (3, 16, 48)


def test_a_config_brings_weights_and_preprocessing(tmp_path):
    torch.save(backbone().state_dict(), tmp_path / "w.pth")
    cfg = load_config(None, [*MODEL, *SIZES, "student.layerscale=1.0", f"train.output_dir={tmp_path}"])
    encoder = FeatureEncoder(cfg, weights=tmp_path / "w.pth")
    wanted = FeatureEncoder(backbone(), image_size_px=16).encode_features(pixels())
    assert torch.equal(encoder.encode_features(pixels()), wanted)
    with pytest.raises(ConfigError, match="takes a config together with weights=..., or a backbone alone"):
        FeatureEncoder(cfg)
    with pytest.raises(ConfigError, match="takes a config together with"):
        FeatureEncoder(backbone(), weights="w.pth")


def test_a_loaders_features_are_kept(encoder, tmp_path):
    found = encoder.cache_features(loader(), tmp_path / "new" / "f.safetensors", "cls+mean", "fp16")
    assert found.values.shape == (70, 96) and found.values.dtype == torch.float16
    assert found.targets.tolist() == [number % 5 for number in range(70)]
    values, targets = extract_features(encoder.backbone, loader(), CPU)
    assert torch.equal(found.select("cls").values, values.half()) and targets.tolist() == found.targets.tolist()
    again = open_feature_set(tmp_path / "new" / "f.safetensors")
    assert torch.equal(again.values, found.values) and again.digest == found.digest
    with pytest.raises(ConfigError, match="features are kept as .safetensors of fp32, bf16, fp16"):
        encoder.cache_features(loader(), tmp_path / "f.npz")
    nn.init.constant_(encoder.backbone.norm.weight, 1e6)
    with pytest.raises(ConfigError, match="features are not finite as fp16; keep them as fp32"):
        encoder.cache_features(loader(), tmp_path / "f.safetensors", "cls", "fp16")


@pytest.mark.parametrize("batch_size", [1, 7, 70])
def test_a_loaders_batch_size_changes_nothing(batch_size):
    model = backbone().train()
    wanted, _ = extract_features(model, loader(), CPU)
    values, _ = extract_features(model, loader(batch_size=batch_size), "cpu")
    assert torch.equal(values, wanted) and model.training and not values.requires_grad


def test_heads():
    model = backbone()
    without, _ = extract_features(model, loader(5), CPU)
    model.head = nn.Linear(48, 7)
    assert torch.equal(extract_features(model, loader(5), CPU)[0], without)
    with_head, _ = extract_features(model, loader(5), CPU, use_head=True)
    torch.testing.assert_close(with_head, model.head(without).detach(), rtol=1e-5, atol=1e-5)  # rows of another batch
    pair = nn.ModuleDict({"backbone": backbone(), "dino_head": nn.Linear(48, 9)})
    assert torch.equal(extract_features(pair, loader(5), CPU)[0], without)
    assert extract_features(pair, loader(5), CPU, use_head=True)[0].shape == (5, 9)
    del pair["dino_head"]
    with pytest.raises(TypeError, match="the modules are backbone and none is dino_head"):
        extract_features(pair, loader(5), CPU, use_head=True)


def test_any_network_and_images_without_targets():
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    images = [torch.randn(3, 3, 16, 16) for _ in range(2)]
    values, targets = extract_features(network, images, CPU)
    torch.testing.assert_close(values, network(torch.cat(images)).detach(), rtol=1e-5, atol=1e-5)
    assert targets.tolist() == [-1] * 6
    paired = [(images[0], [0, None, np.int64(2)])]
    assert extract_features(network, paired, CPU)[1].tolist() == [0, -1, 2]
    with pytest.raises(DatasetError, match="the loader gives no images"):
        extract_features(network, [], CPU)
