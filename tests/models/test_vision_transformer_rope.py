"""Behaviour of the vision transformer of the DINOv3 family: rotary positions, storage tokens, untied norms."""

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.models import SIZES, DinoVisionTransformer

TOKENS = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")
UNTIED = {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}


def tiny(**kwargs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    family = {"pos_embed_type": "rope", "pos_embed_rope_dtype": "fp32", "mask_k_bias": True, "init_values": 0.5}
    return DinoVisionTransformer(**(sizes | family | {"num_register_tokens": 3} | kwargs))


def crops():
    """Return two crop sizes and the mask of the first."""
    torch.manual_seed(0)
    return [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 24)], [torch.rand(4, 16) < 0.5, None]


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu", "swiglu64"])
@pytest.mark.parametrize("norm_layer", ["layernorm", "rmsnorm"])
def test_init_weights_sets_every_parameter_and_buffer_after_the_meta_device(ffn_layer, norm_layer):
    options = {"ffn_layer": ffn_layer, "norm_layer": norm_layer, **UNTIED}
    with torch.device("meta"):
        model = tiny(**options)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    model.init_weights(torch.Generator().manual_seed(0))  # harmless
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    wanted = tiny(**options)
    wanted.init_weights(torch.Generator().manual_seed(0))
    got = dict(model.named_parameters()) | dict(model.named_buffers())
    assert len(got) == len(tensors)
    torch.testing.assert_close(got, dict(wanted.named_parameters()) | dict(wanted.named_buffers()), rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in got.values())


def test_initial_values():
    torch.manual_seed(0)
    model = tiny(embed_dim=512)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.storage_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.mask_token == 0).all()
    assert model.rope_embed.periods[0] == 1


def test_names_of_tensors_are_those_of_the_family():
    names = set(tiny(**UNTIED).state_dict())
    assert {"storage_tokens", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "cls_norm.weight"} <= names
    assert {"local_cls_norm.bias", "norm.weight", "mask_token", "cls_token"} <= names
    assert not {"register_tokens", "pos_embed"} & names


def test_swiglu_is_that_of_the_family():
    with torch.device("meta"):
        models = {kind: tiny(pos_embed_type=kind, ffn_layer="swiglu") for kind in ("rope", "learned")}
    assert {name for name, _ in models["rope"].blocks[0].mlp.named_children()} == {"w1", "w2", "w3"}
    assert {name for name, _ in models["learned"].blocks[0].mlp.named_children()} == {"w12", "w3"}


def test_several_crop_sizes_equal_separate_passes_with_their_gradients():
    model = tiny(untie_cls_and_patch_norms=True)
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


def test_storage_tokens_have_both_names_in_the_features():
    features = tiny().forward_features(crops()[0][1])
    assert features["x_storage_tokens"].shape == (8, 3, 32)
    assert torch.equal(features["x_storage_tokens"], features["x_norm_regtokens"])
    assert features["x_norm_patchtokens"].shape == (8, 6, 32)


def test_places_of_patches_matter_and_only_through_rope():
    model, x = tiny().eval(), crops()[0][0]
    swapped = torch.cat([x[..., 16:], x[..., :16]], dim=-1)
    want, got = (model.forward_features(images) for images in (x, swapped))
    assert not torch.allclose(want["x_norm_clstoken"], got["x_norm_clstoken"], atol=1e-5)
    model.rope_embed.periods.fill_(float("inf"))  # no angle is left
    want, got = (model.forward_features(images) for images in (x, swapped))
    torch.testing.assert_close(want["x_norm_clstoken"], got["x_norm_clstoken"])


def rotations_of_blocks(model, images):
    """Run a model and return the rotations that each block got."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda module, args: seen.append(args[2])) for block in model.blocks]
    model(images, is_training=True)
    for hook in hooks:
        hook.remove()
    return seen


def test_augmentation_is_drawn_anew_for_each_block_and_crop_size_in_training_mode():
    model, (images, _) = tiny(pos_embed_rope_jitter_coords=1.5), crops()
    first, second = rotations_of_blocks(model, [images[0], images[0]])
    assert not torch.equal(first[0].cos, second[0].cos)
    assert not torch.equal(first[0].cos, first[1].cos)
    assert first[0].cos.shape == (1 + 3 + 16, 8)
    assert (first[0].cos[:4] == 1).all() and (first[0].sin[:4] == 0).all()
    first, second = rotations_of_blocks(model.eval(), images)
    assert first is second
    torch.manual_seed(0)
    features = model.train().forward_features(images[0])["x_prenorm"]
    torch.manual_seed(0)
    assert torch.equal(model.forward_features(images[0])["x_prenorm"], features)


def test_which_norm_the_class_token_and_the_registers_get():
    model, (images, _) = tiny(**UNTIED), crops()
    with torch.no_grad():
        for number, norm in enumerate((model.norm, model.cls_norm, model.local_cls_norm)):
            norm.weight.zero_()
            norm.bias.fill_(number)

    def norms(features):
        return [tuple(part[name].unique().item() for name in TOKENS[:3]) for part in features]

    assert norms(model([*images, images[1]], is_training=True)) == [(1, 1, 0), (2, 2, 0), (1, 1, 0)]
    assert norms([model(images[1], is_training=True)]) == [(1, 1, 0)]
    assert norms(model.eval()(images, is_training=True)) == [(1, 1, 0), (1, 1, 0)]
    ((patches, token, extra),) = model.get_intermediate_layers(
        images[0], return_class_token=True, return_extra_tokens=True
    )
    assert (patches.unique().item(), token.unique().item(), extra.unique().item()) == (0, 1, 1)

    model.cls_norm = None
    assert norms(model(images, is_training=True)) == [(0, 0, 0), (0, 0, 0)]
    assert norms(model.train()(images, is_training=True)) == [(0, 0, 0), (2, 2, 0)]


def test_intermediate_layers_in_all_their_forms():
    model, x = tiny(depth=3, **UNTIED).eval(), crops()[0][1]
    features = model.forward_features(x)
    (last,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    ((raw, storage),) = model.get_intermediate_layers(x, norm=False, return_extra_tokens=True)
    torch.testing.assert_close(raw, features["x_prenorm"][:, 4:])
    torch.testing.assert_close(storage, features["x_prenorm"][:, 1:4])
    first, third = model.get_intermediate_layers(x, n=[0, 2], reshape=True, return_class_token=True)
    assert first[0].shape == (8, 32, 2, 3)
    torch.testing.assert_close(third[1], features["x_norm_clstoken"])
    torch.testing.assert_close(third[0][:, :, 1, 0], last[:, 3])


@pytest.mark.parametrize(("rate", "scale"), [(0.1, 1 / 0.9), (0.5, 2.0)])
@torch.no_grad()
def test_stochastic_depth_turns_the_images_it_keeps_as_all_are_turned(rate, scale):
    model, (images, _) = tiny(depth=1, drop_path_rate=rate, drop_path_uniform=True), crops()
    model.blocks[0].ls2.gamma.zero_()  # attention alone
    whole = model.eval()(images, is_training=True)
    torch.manual_seed(0)
    dropped = model.train()(images, is_training=True)
    kept = 0
    for x, want, got in zip(images, whole, dropped, strict=True):
        start = model.prepare_tokens_with_masks(x)
        for image, residual in enumerate(got["x_prenorm"] - start):
            if residual.any():
                kept += 1
                torch.testing.assert_close(residual, scale * (want["x_prenorm"] - start)[image], rtol=1e-4, atol=1e-5)
    assert 0 < kept < 12


@pytest.mark.parametrize("norm_layer", ["layernormbf16", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_residuals_in_float32(dtype, norm_layer):
    model, (images, masks) = tiny(norm_layer=norm_layer, **UNTIED), crops()
    want = model.eval()(images, masks=masks, is_training=True)[0]["x_prenorm"]
    with torch.autocast("cpu", dtype=dtype):
        got = model(images, masks=masks, is_training=True)[0]["x_prenorm"]
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
        features = model.train()(images, masks=masks, is_training=True)
        loss = sum(part["x_norm_patchtokens"].float().pow(2).mean() for part in features)
        loss = loss + sum(part["x_norm_clstoken"].float().pow(2).mean() for part in features)
    assert got.dtype is torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("rope_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm_layer", ["layernorm", "rmsnorm"])
def test_a_model_in_bfloat16_runs_and_gives_its_own_type(norm_layer, rope_dtype):
    model, (images, masks) = tiny(norm_layer=norm_layer, pos_embed_rope_dtype=rope_dtype).bfloat16(), crops()
    features = model([x.bfloat16() for x in images], masks=masks, is_training=True)
    assert {part[name].dtype for part in features for name in TOKENS} == {torch.bfloat16}


def test_rounded_angles_stay_close():
    model, x = tiny(), crops()[0][0]
    rounded = tiny(pos_embed_rope_dtype="bf16")
    rounded.load_state_dict(model.state_dict())
    assert rounded.rope_embed.periods.dtype is torch.bfloat16
    torch.testing.assert_close(rounded(x), model(x), rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
    assert not torch.equal(rounded(x), model(x))


def test_layer_numbers_and_names_without_weight_decay():
    model = tiny(depth=3, **UNTIED)
    numbers = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert {numbers[name] for name in ("cls_token", "mask_token", "storage_tokens", "patch_embed.proj.bias")} == {0}
    assert [numbers[f"blocks.{i}.attn.qkv.bias"] for i in range(3)] == [1, 2, 3]
    assert {numbers[f"{name}.weight"] for name in ("norm", "cls_norm", "local_cls_norm")} == {4}
    assert model.no_weight_decay() == {"cls_token", "mask_token", "storage_tokens"}
    assert model.no_weight_decay() <= numbers.keys()


@pytest.mark.parametrize(
    ("arch", "numbers"),
    [
        ("vit_so400m", (1152, 27, 18, 4352)),
        ("vit_huge2", (1280, 32, 20, 5120)),
        ("vit_7b", (4096, 40, 32, 12288)),
    ],
)
def test_sizes_of_the_family(arch, numbers):
    from dinov2.models import vision_transformer

    with torch.device("meta"):
        model = getattr(vision_transformer, arch)(pos_embed_type="rope")
    assert (model.embed_dim, model.depth, model.num_heads, model.blocks[0].mlp.fc1.out_features) == numbers
    assert all(hasattr(vision_transformer, name) for name in SIZES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pos_embed_type": "sincos"}, "pos_embed_type=sincos: must be one of learned, rope"),
        ({"norm_layer": "batchnorm"}, "norm_layer=batchnorm: must be one of layernorm, layernormbf16, rmsnorm"),
        ({"pos_embed_rope_dtype": "fp64"}, "pos_embed_rope_dtype=fp64: must be one of fp32, bf16, fp16"),
    ],
)
def test_unknown_names_list_the_known_ones(options, sentence):
    with pytest.raises(ConfigError) as error:
        tiny(**options)
    assert str(error.value) == sentence
