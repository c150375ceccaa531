"""Rotary positions: angles against their formula, what a rotation keeps, augmentation, settings that do not fit."""

import math

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.layers.rope import RopePositionEmbedding, rotate

HEAD = 8  # features of a head: two periods


def rope(**options):
    return RopePositionEmbedding(2 * HEAD, num_heads=2, **options).eval()


def coordinates(rotation):
    """Recover the coordinates [N, 2] of an embedding whose periods are so long that no angle leaves (-pi, pi)."""
    return torch.atan2(rotation.sin, rotation.cos)[:, ::2] * 40 / (2 * math.pi)  # two equal periods of each axis


def long_periods(**options):
    return rope(base=None, min_period=40.0, max_period=40.0, **options).train()


@pytest.mark.parametrize(("normalize", "divisors"), [("separate", (3, 2)), ("min", (2, 2)), ("max", (3, 3))])
def test_angles_are_those_of_patch_centres(normalize, divisors):
    rotation = rope(normalize_coords=normalize)(3, 2)
    wanted = []
    for row in range(3):
        for column in range(2):
            y, x = (2 * (cell + 0.5) / cells - 1 for cell, cells in zip((row, column), divisors, strict=True))
            wanted.append([2 * math.pi * place / period for place in (y, x) for period in (1.0, 100**0.5)])
    wanted = torch.tensor(wanted)
    torch.testing.assert_close(rotation.cos, wanted.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.sin, wanted.sin(), rtol=0, atol=1e-6)


def test_periods_follow_the_base_or_lie_between_two_ends():
    torch.testing.assert_close(rope(base=16.0).periods, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(
        RopePositionEmbedding(24, num_heads=2, base=None, min_period=0.5, max_period=8.0).periods,
        torch.tensor([0.5, 2.0, 8.0]),
    )


def test_a_rotation_turns_pairs_half_a_head_apart_and_leaves_class_and_storage_tokens():
    torch.manual_seed(0)
    rotation, x = rope()(2, 2, num_prefix=3), torch.randn(5, 7, 2, HEAD)
    out = rotate(x, rotation)
    assert torch.equal(out[:, :3], x[:, :3])
    pairs = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], dim=-1))  # [5, 7, 2, 4]
    turned = pairs * torch.complex(rotation.cos, rotation.sin)[:, None]
    torch.testing.assert_close(out, torch.cat([turned.real, turned.imag], dim=-1))


def test_products_of_queries_and_keys_depend_on_the_difference_of_places_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, HEAD).expand(2, 1, 16, HEAD)
    rotation = rope()(4, 4)
    products = (rotate(q, rotation) @ rotate(k, rotation).mT)[0].view(4, 4, 4, 4)  # rows, columns of q, then of k
    torch.testing.assert_close(products[0, 1, 2, 2], products[1, 2, 3, 3])
    torch.testing.assert_close(products[3, 0, 1, 1], products[2, 2, 0, 3])
    assert not torch.isclose(products[0, 1, 2, 2], products[0, 1, 2, 3])


def test_the_result_has_the_type_of_the_tokens_and_angles_their_own():
    rotation = rope(dtype=torch.bfloat16)(2, 2)
    assert rotation.cos.dtype is rotation.sin.dtype is rope(dtype=torch.bfloat16).periods.dtype is torch.bfloat16
    x = torch.randn(1, 4, HEAD)
    out = rotate(x, rotation)
    assert out.dtype is torch.float32
    assert torch.equal(out, out.bfloat16().float())  # turned in bfloat16, as in the parent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_no_angle(dtype):
    embedding = rope(rescale_coords=2.0, jitter_coords=1.5, shift_coords=0.1, dtype=dtype).train()
    x, results = torch.randn(1, 4, HEAD), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(rotate(x, embedding(2, 2)))
    assert torch.equal(*results)


def test_augmentation_happens_in_training_mode_alone():
    embedding = rope(shift_coords=0.5, jitter_coords=2.0, rescale_coords=2.0)
    plain = rope()(3, 2)
    assert not embedding.augments
    assert torch.equal(embedding(3, 2).cos, plain.cos)
    assert embedding.train().augments
    assert not torch.equal(embedding(3, 2).cos, embedding(3, 2).cos)
    assert not rope().train().augments
    torch.manual_seed(3)
    first = embedding(3, 2)
    torch.manual_seed(3)
    assert torch.equal(embedding(3, 2).cos, first.cos)


def test_each_augmentation_moves_coordinates_within_its_limits():
    torch.manual_seed(0)
    plain = coordinates(long_periods().eval()(3, 2))

    def change(**options):
        """Give, for 200 draws, what was added to or multiplied with each axis, after checking that it is one number."""
        embedding, found = long_periods(**options), []
        for _ in range(200):
            moved = coordinates(embedding(3, 2))
            effect = moved - plain if "shift_coords" in options else (moved / plain)[[0, 1, 4, 5]]  # 0 / 0 in row 1
            torch.testing.assert_close(effect, effect[:1].expand_as(effect), rtol=1e-4, atol=1e-4)
            found.append(effect[0])
        return torch.stack(found)  # [200, 2]

    shift = change(shift_coords=0.25)
    assert -0.25 <= shift.min() < -0.2 and 0.2 < shift.max() <= 0.25
    assert shift.mean().abs() < 0.03
    for factors, limit in ((change(jitter_coords=1.5), 1.5), (change(rescale_coords=2.0), 2.0)):
        logs = factors.log() / math.log(limit)
        assert -1.0001 <= logs.min() < -0.8 and 0.8 < logs.max() <= 1.0001
        assert logs.mean().abs() < 0.15
    assert torch.allclose(factors[:, 0], factors[:, 1])
    assert not torch.allclose(shift[:, 0], shift[:, 1])


def test_jitter_differs_between_the_axes():
    torch.manual_seed(0)
    embedding = long_periods(jitter_coords=2.0)
    moved, plain = coordinates(embedding(2, 2)), coordinates(embedding.eval()(2, 2))
    factors = (moved / plain)[0]
    assert not torch.isclose(*factors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"base": 100.0, "min_period": 1.0, "max_period": 2.0},
            "pos_embed_rope_base=100.0, pos_embed_rope_min_period=1.0, pos_embed_rope_max_period=2.0: "
            "give either the base or both periods, and null for the other",
        ),
        (
            {"base": None, "min_period": 1.0},
            "pos_embed_rope_base=None, pos_embed_rope_min_period=1.0, pos_embed_rope_max_period=None: "
            "give either the base or both periods, and null for the other",
        ),
        (
            {"base": -1.0},
            "pos_embed_rope_base=-1.0, pos_embed_rope_min_period=None, pos_embed_rope_max_period=None: must be above 0",
        ),
        (
            {"normalize_coords": "mean"},
            "pos_embed_rope_normalize_coords=mean: must be one of separate, min, max",
        ),
        ({"shift_coords": -0.5}, "pos_embed_rope_shift_coords=-0.5: must be at least 0, or null for none"),
        ({"jitter_coords": 0.5}, "pos_embed_rope_jitter_coords=0.5: must be at least 1, or null for none"),
        ({"rescale_coords": 0.0}, "pos_embed_rope_rescale_coords=0.0: must be at least 1, or null for none"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, sentence):
    with pytest.raises(ConfigError) as error:
        rope(**options)
    assert str(error.value) == sentence


def test_heads_need_a_multiple_of_four_features():
    with pytest.raises(ConfigError) as error:
        RopePositionEmbedding(12, num_heads=2)
    assert str(error.value) == "embed_dim=12 is not a multiple of 4 * num_heads=8, as pos_embed_type=rope needs"
