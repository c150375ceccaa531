"""Pools of tokens: their names, what they hold, and smaller ones cut out of larger ones."""

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.eval.pooling import PooledBackbone, parse_pool, select_pool
from dinov2.models import build_model

POOLS = ("cls", "mean", "cls+mean", "patches", "last2", "last3+mean")


@pytest.fixture(scope="module")
def backbone():
    model = build_model("vit_tiny", depth=3, embed_dim=48, patch_size=4, img_size=16, num_register_tokens=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def pooled(backbone, images, pool):
    return PooledBackbone(backbone, pool)(images)


def test_pools_hold_what_they_say(backbone, images):
    layers = backbone.get_intermediate_layers(images, 3, return_class_token=True)
    tokens, patches = [token for _, token in layers], layers[-1][0]
    mean = patches.mean(dim=1)
    wanted = {
        "cls": tokens[2],
        "mean": mean,
        "cls+mean": torch.cat([tokens[2], mean], dim=1),
        "patches": patches,
        "last2": torch.cat(tokens[1:], dim=1),
        "last3+mean": torch.cat([*tokens, mean], dim=1),
    }
    for pool in POOLS:
        assert torch.equal(pooled(backbone, images, pool), wanted[pool].detach()), pool
    assert torch.equal(pooled(backbone, images, "cls"), backbone(images).detach())


@pytest.mark.parametrize(
    "pool, parts",
    [
        ("cls+mean", ("cls", "mean", "last1")),
        ("last2", ("cls", "last1")),
        ("last3+mean", ("last3", "last2", "last2+mean", "cls", "cls+mean", "last1+mean", "mean")),
        ("patches", ("mean",)),
    ],
)
def test_smaller_pools_are_cut_out_of_larger_ones(backbone, images, pool, parts):
    values = pooled(backbone, images, pool)
    for part in (pool, *parts):
        assert torch.equal(select_pool(values, pool=pool, wanted=part), pooled(backbone, images, part)), part


@pytest.mark.parametrize("pool, wanted", [("cls", "mean"), ("last2", "last3"), ("mean", "patches"), ("patches", "cls")])
def test_what_a_pool_lacks_is_refused(pool, wanted):
    with pytest.raises(ConfigError) as caught:
        select_pool(torch.zeros(2, 6, 6)[:, 0] if pool != "patches" else torch.zeros(2, 6, 6), pool=pool, wanted=wanted)
    assert str(caught.value) == (
        f"features of the pool {pool} do not hold those of {wanted}; compute them with that pool"
    )


def test_names():
    assert [parse_pool(name).name for name in POOLS] == list(POOLS)
    assert [parse_pool(name).name for name in ("last1", "last1+mean")] == ["cls", "cls+mean"]
    for name in ("", "cls+", "mean+mean", "last0", "last", "last2+cls", "patches+mean", "CLS", "last2+"):
        with pytest.raises(ConfigError) as caught:
            parse_pool(name)
        assert str(caught.value) == (
            f"pool {name!r}: must be one of cls, mean, cls+mean, patches, lastN or lastN+mean with a number N of "
            "blocks, e.g. last4+mean"
        )


def test_a_resnet_has_one_pool():
    with pytest.raises(ConfigError, match="a ResNet has one feature for an image, its mean over the map; use cls"):
        PooledBackbone(build_model("resnet18"), "patches")
