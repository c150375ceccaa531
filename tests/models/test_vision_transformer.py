"""Behaviour of the vision transformer: initial values, crop sizes together, masks, stochastic depth, precision."""

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.models import DinoVisionTransformer, build_model

TOKENS = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")


def tiny(**kwargs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return DinoVisionTransformer(**(sizes | {"init_values": 0.5, "num_register_tokens": 3} | kwargs))


def crops():
    """Return two crop sizes and the mask of the first."""
    torch.manual_seed(0)
    return [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 24)], [torch.rand(4, 16) < 0.5, None]


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
def test_init_weights_sets_every_parameter(ffn_layer):
    with torch.device("meta"):
        model = tiny(ffn_layer=ffn_layer)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_initial_values():
    torch.manual_seed(0)
    model = tiny(embed_dim=96, init_values=1e-5, patch_size=4)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[1].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed.proj.weight.abs().max() <= 48**-0.5  # 3 * 4 * 4 inputs of a patch
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert (model.mask_token == 0).all()
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    assert (model.blocks[0].mlp.fc1.bias == 0).all()
    assert (model.norm.weight == 1).all()


def test_initial_values_follow_the_generator_or_the_global_seed():
    model = tiny()

    def draw(generator=None):
        model.init_weights(generator)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = draw(torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    assert torch.equal(draw(torch.Generator().manual_seed(1)), first)
    assert not torch.equal(draw(torch.Generator().manual_seed(2)), first)
    torch.manual_seed(5)
    seeded = draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), seeded)


def test_several_crop_sizes_equal_separate_passes_with_their_gradients():
    model = tiny()
    images, masks = crops()

    def separate():
        return [model(x, masks=m, is_training=True) for x, m in zip(images, masks, strict=True)]

    def together():
        return model(images, masks=masks, is_training=True)

    results = []
    for run in (separate, together):
        model.zero_grad()
        features = run()
        sum(part[name].pow(3).sum() for part in features for name in TOKENS).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append(([{name: part[name] for name in TOKENS} for part in features], gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)  # sums over rows in another order


def test_shapes_of_all_features():
    images, masks = crops()
    features = tiny()(images, masks=masks, is_training=True)
    assert [[tuple(part[name].shape) for name in TOKENS] for part in features] == [
        [(4, 32), (4, 3, 32), (4, 16, 32), (4, 20, 32)],
        [(8, 32), (8, 3, 32), (8, 6, 32), (8, 10, 32)],
    ]
    assert features[0]["masks"] is masks[0]
    assert features[1]["masks"] is None


def test_without_is_training_the_class_token_comes_back():
    model, (images, _) = tiny().eval(), crops()
    features = model.forward_features(images[0])
    assert torch.equal(model(images[0]), features["x_norm_clstoken"])
    assert [tuple(token.shape) for token in model(images)] == [(4, 32), (8, 32)]


def test_every_block_is_called_once_for_all_crop_sizes():
    model, (images, _) = tiny(), crops()
    called = []
    for unit in model.shard_units():
        unit.register_forward_hook(lambda module, args, output: called.append(module))
    model(images, is_training=True)
    assert called == list(model.blocks)


def test_a_masked_patch_does_not_depend_on_its_pixels():
    model, (images, _) = tiny().eval(), crops()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 5] = True  # second row, second column
    changed = images[0].clone()
    changed[:, :, 8:16, 8:16] = 7.0
    outputs = [model.forward_features(x, mask)["x_prenorm"] for x in (images[0], changed)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.forward_features(images[0])["x_prenorm"])


def test_intermediate_layers_in_all_their_forms():
    model, (images, _) = tiny(depth=3).eval(), crops()
    x = images[1]
    features = model.forward_features(x)
    (last,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    (raw,) = model.get_intermediate_layers(x, norm=False)
    torch.testing.assert_close(raw, features["x_prenorm"][:, 4:])
    first, third = model.get_intermediate_layers(x, n=[0, 2], reshape=True, return_class_token=True)
    assert first[0].shape == (8, 32, 2, 3)
    assert first[1].shape == (8, 32)
    torch.testing.assert_close(third[0][:, :, 1, 0], last[:, 3])
    with pytest.raises(ValueError, match=r"^blocks \[1, 3\] asked for, the model has blocks 0 to 2$"):
        model.get_intermediate_layers(x, n=[1, 3])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_stochastic_depth_is_off_in_eval_mode(rate):
    model, (images, masks) = tiny(drop_path_rate=rate, drop_path_uniform=True), crops()
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    want = plain(images, masks=masks, is_training=True)
    kept = model.eval()(images, masks=masks, is_training=True)
    assert torch.equal(kept[0]["x_prenorm"], want[0]["x_prenorm"])
    torch.manual_seed(0)
    dropped = model.train()(images, masks=masks, is_training=True)
    assert not torch.equal(dropped[0]["x_prenorm"], want[0]["x_prenorm"])
    single = model(images[0], is_training=True)
    assert single["x_prenorm"].shape == want[0]["x_prenorm"].shape


def test_stochastic_depth_grows_linearly_or_is_uniform():
    rates = [block.drop_path_rate for block in tiny(depth=5, drop_path_rate=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    uniform = tiny(depth=5, drop_path_rate=0.4, drop_path_uniform=True)
    assert [block.drop_path_rate for block in uniform.blocks] == [0.4] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"init_values": None}, {"drop_path_rate": 0.5, "drop_path_uniform": True}])
def test_autocast_keeps_residuals_in_float32(dtype, options):
    model, (images, masks) = tiny(**options), crops()
    want = model.eval()(images, masks=masks, is_training=True)[0]["x_prenorm"]
    with torch.autocast("cpu", dtype=dtype):
        got = model(images, masks=masks, is_training=True)[0]["x_prenorm"]
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
        features = model.train()(images, masks=masks, is_training=True)
        loss = sum(part["x_norm_patchtokens"].float().pow(2).mean() for part in features)
    assert got.dtype is torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_runs_and_gives_its_own_type(dtype):
    model, (images, masks) = tiny(drop_path_rate=0.5).to(dtype), crops()
    features = model([x.to(dtype) for x in images], masks=masks, is_training=True)
    assert {part[name].dtype for part in features for name in TOKENS} == {dtype}


def test_weights_survive_a_round_trip():
    first, second = tiny(), tiny()
    second.load_state_dict(first.state_dict(), strict=True)
    x = crops()[0][0]
    assert torch.equal(first(x), second(x))


def test_layer_numbers_and_names_without_weight_decay():
    model = tiny(depth=3)
    numbers = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert {numbers[name] for name in ("cls_token", "pos_embed", "mask_token", "register_tokens")} == {0}
    assert numbers["patch_embed.proj.weight"] == 0
    assert [numbers[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [1, 2, 3]
    assert numbers["norm.bias"] == 4
    assert model.no_weight_decay() == {"cls_token", "pos_embed", "mask_token", "register_tokens"}
    assert "register_tokens" not in tiny(num_register_tokens=0).no_weight_decay()


def test_sizes_can_be_overridden():
    with torch.device("meta"):
        model = build_model("vit_tiny", patch_size=8, img_size=32, embed_dim=96, depth=4, num_heads=2)
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (96, 4, 2, 8)
    with torch.device("meta"):
        assert build_model("vit_tiny").embed_dim == 192


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError) as error:
        build_model("vit_huge")
    assert str(error.value) == (
        "arch=vit_huge: must be one of vit_tiny, vit_small, vit_base, vit_large, vit_so400m, vit_huge2, vit_giant2, "
        "vit_7b, resnet18, resnet34, resnet50, resnet101, resnet152"
    )
    with pytest.raises(
        ConfigError, match=r"^ffn_layer=moe: must be one of mlp, swiglu, swiglufused, swiglu32, swiglu64, swiglu128$"
    ):
        tiny(ffn_layer="moe")


@pytest.mark.parametrize("kind", [{}, {"pos_embed_type": "rope", "mask_k_bias": True, "pos_embed_rope_dtype": "fp32"}])
@pytest.mark.parametrize("block", [-1, 0])
def test_class_attention_is_that_of_the_forward_pass(kind, block):
    model = tiny(**kind).eval()
    seen = []
    model.blocks[block].attn.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    images = torch.randn(2, 3, 16, 24)
    model(images)
    (tokens, _, rotations, out), attn = seen[0], model.blocks[block].attn
    weights = model.get_class_attention(images, block)
    assert weights.shape == (2, 2, 1 + 3 + 6) and (rotations is None) == (not kind)
    values = attn.qkv(tokens)[:, 64:].view(2, 10, 2, 16)
    taken_up = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)
    torch.testing.assert_close(attn.proj(taken_up), out.view(2, 10, 32)[:, 0])


def test_class_attention_of_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block 2 asked for, the model has blocks 0 to 1"):
        tiny().get_class_attention(torch.zeros(1, 3, 16, 16), 2)
