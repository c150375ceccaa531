"""ResNets: torchvision's trunk and names, behind the interface of the vision transformer."""

import pytest
import torch
import torchvision

from dinov2.errors import ConfigError
from dinov2.models import RESNETS, ResNet, build_model


def images():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 96)]


def trunk_and_ours(arch):
    """Make torchvision's network with random weights and statistics, and ours with the same."""
    torch.manual_seed(1)
    theirs = torchvision.models.get_model(arch, weights=None).eval()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    ours = ResNet(arch).eval()
    ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")})
    theirs.fc = torch.nn.Identity()
    return theirs, ours


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@torch.no_grad()
def test_features_equal_those_of_torchvision(arch):
    theirs, ours = trunk_and_ours(arch)
    last_maps = []
    theirs.layer4.register_forward_hook(lambda module, args, output: last_maps.append(output))
    crops = images()
    pooled = [theirs(x) for x in crops]
    features = ours(crops, is_training=True)
    for part, want, cells in zip(features, pooled, last_maps, strict=True):
        torch.testing.assert_close(part["x_norm_clstoken"], want)
        torch.testing.assert_close(part["x_norm_patchtokens"].transpose(1, 2).view_as(cells), cells)
        assert part["x_norm_regtokens"].shape == (len(cells), 0, ours.embed_dim)
        torch.testing.assert_close(part["x_prenorm"][:, 0], want)
        assert torch.equal(part["x_prenorm"][:, 1:], part["x_norm_patchtokens"])
    torch.testing.assert_close(ours(crops), pooled)
    torch.testing.assert_close(ours(crops[0]), pooled[0])
    single = ours.forward_features(crops[1])
    torch.testing.assert_close(single["x_norm_patchtokens"], features[1]["x_norm_patchtokens"])


def test_masks_are_handed_through_without_effect():
    model, crops = ResNet("resnet18").eval(), images()
    mask = torch.ones(2, 4, dtype=torch.bool)
    features = model(crops, masks=[mask, None], is_training=True)
    assert features[0]["masks"] is mask and features[1]["masks"] is None
    assert torch.equal(features[0]["x_norm_clstoken"], model(crops[0]))


@pytest.mark.parametrize("arch", RESNETS)
@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_names_and_shapes_are_those_of_torchvision(arch, sync_batchnorm):
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(arch, weights=None), ResNet(arch, sync_batchnorm=sync_batchnorm)
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == wanted
    assert ours.embed_dim == theirs.fc.in_features


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_init_weights_sets_every_parameter_and_buffer_after_the_meta_device(sync_batchnorm):
    with torch.device("meta"):
        model = ResNet("resnet18", in_chans=5, sync_batchnorm=sync_batchnorm)
    model.init_weights(torch.Generator().manual_seed(0))  # harmless
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    model.init_weights(torch.Generator().manual_seed(0))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model.bn1.num_batches_tracked == 0 and (model.bn1.running_var == 1).all()
    other = ResNet("resnet18", in_chans=5)
    other.init_weights(torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_several_channels():
    model = build_model("resnet18", in_chans=5)
    assert model(torch.randn(2, 5, 32, 32)).shape == (2, 512)
    with pytest.raises(ValueError, match=r"^images have 3 channels, the model was built for in_chans=5$"):
        model(torch.randn(2, 3, 32, 32))


def test_layer_numbers_follow_the_residual_blocks():
    with torch.device("meta"):
        model = ResNet("resnet50")
    assert (model.depth, model.patch_size, model.num_register_tokens, model.num_features) == (16, 32, 0, 2048)
    assert len(model.shard_units()) == 16
    numbers = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert numbers["conv1.weight"] == numbers["bn1.bias"] == 0
    assert numbers["layer1.0.downsample.0.weight"] == 1
    assert numbers["layer2.0.conv1.weight"] == 4
    assert numbers["layer4.2.bn3.weight"] == 16
    assert set(numbers.values()) == set(range(17))
    assert model.no_weight_decay() == set()


def test_crop_sizes_have_their_own_batch_statistics():
    model, crops = ResNet("resnet18").train(), images()
    together = model(crops)
    assert model.bn1.num_batches_tracked == 2
    torch.testing.assert_close(together, [model(crop) for crop in crops])
    sum(part.sum() for part in together).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sizes_cannot_be_overridden_and_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"^depth=3: arch=resnet50 has fixed sizes; leave it out$"):
        build_model("resnet50", depth=3)
    with pytest.raises(ConfigError) as error:
        ResNet("resnet20")
    assert str(error.value) == "arch=resnet20: must be one of resnet18, resnet34, resnet50, resnet101, resnet152"
