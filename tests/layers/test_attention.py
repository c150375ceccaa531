"""Attention over packed tokens: equal to a written-out softmax for each image, with its gradient, on every backend."""

import sys

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.layers.attention import LinearKMaskedBias, SelfAttention, attention, rotate_packed
from dinov2.layers.rope import RopePositionEmbedding, rotate

LAYOUT = ((2, 5), (3, 2))
HEADS = 2


def rotations_of(layout, *, head=4):
    """Make angles for one token without a place and a column of patches."""
    embedding = RopePositionEmbedding(head, num_heads=1, dtype=torch.float64)
    return [embedding(num_tokens - 1, 1, num_prefix=1) for _, num_tokens in layout]


def reference(qkv, layout, num_heads, rotations=None):
    """Attend image by image and head by head."""
    outputs, start = [], 0
    for size, (num_images, num_tokens) in enumerate(layout):
        for _ in range(num_images):
            q, k, v = qkv[start : start + num_tokens].chunk(3, dim=1)
            heads = []
            for qh, kh, vh in zip(*(t.chunk(num_heads, dim=1) for t in (q, k, v)), strict=True):
                if rotations is not None:
                    qh, kh = (rotate(x[None], rotations[size])[0] for x in (qh, kh))
                heads.append(torch.softmax(qh @ kh.T * qh.shape[1] ** -0.5, dim=1) @ vh)
            outputs.append(torch.cat(heads, dim=1))
            start += num_tokens
    return torch.cat(outputs)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT[:1]])
def test_equals_softmax_written_out_with_its_gradient(layout, rotated):
    torch.manual_seed(0)
    rotations = rotations_of(layout) if rotated else None
    rows = sum(b * n for b, n in layout)
    qkv = torch.randn(rows, 3 * 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(rows, 8, dtype=torch.float64)
    for function in (attention, reference):
        out = function(qkv, layout, num_heads=HEADS, rotations=rotations)
        (grad,) = torch.autograd.grad((out * weights).sum(), qkv)
        if function is attention:
            got = out, grad
    torch.testing.assert_close(got, (out, grad))


def test_gradient_of_a_plain_sum_passes():
    qkv = torch.randn(16, 12, requires_grad=True)
    attention(qkv, LAYOUT, num_heads=HEADS).sum().backward()
    (want,) = torch.autograd.grad(reference(qkv, LAYOUT, HEADS).sum(), qkv)
    torch.testing.assert_close(qkv.grad, want)


def test_packed_queries_are_turned_like_those_of_each_crop_size():
    torch.manual_seed(0)
    x, rotations = torch.randn(16, 2, 4), rotations_of(LAYOUT)
    wanted = [
        rotate(rows.unflatten(0, size), rotation).flatten(0, 1)
        for rows, size, rotation in zip(x.split([10, 6]), LAYOUT, rotations, strict=True)
    ]
    torch.testing.assert_close(rotate_packed(x, LAYOUT, rotations), torch.cat(wanted))


def test_masked_keys_have_no_bias_and_no_gradient_of_it():
    torch.manual_seed(0)
    layer = SelfAttention(8, num_heads=2, mask_k_bias=True)
    assert isinstance(layer.qkv, LinearKMaskedBias)
    assert layer.qkv.bias_mask.tolist() == [1.0] * 8 + [0.0] * 8 + [1.0] * 8
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "qkv.bias_mask", "proj.weight", "proj.bias"}
    with torch.no_grad():
        layer.qkv.bias.copy_(torch.randn(24))
    x = torch.randn(5, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=1)
    plain_q, plain_k, plain_v = (x @ layer.qkv.weight.T).chunk(3, dim=1)
    bias_q, _, bias_v = layer.qkv.bias.chunk(3)
    torch.testing.assert_close((q, k, v), (plain_q + bias_q, plain_k, plain_v + bias_v))
    layer(x, ((1, 5),)).sum().backward()
    assert (layer.qkv.bias.grad[8:16] == 0).all()
    assert (layer.qkv.bias.grad[16:] != 0).all()


def test_without_a_bias_there_is_nothing_to_mask():
    layer = SelfAttention(8, num_heads=2, qkv_bias=False, mask_k_bias=True)
    assert set(layer.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_heads_that_do_not_divide_the_features_are_named():
    with pytest.raises(ConfigError, match=r"^embed_dim=10 is not a multiple of num_heads=4$"):
        SelfAttention(10, num_heads=4)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"^attention_backend=flash: must be one of auto, sdpa, xformers$"):
        SelfAttention(8, num_heads=2, attention_backend="flash")


def test_absent_xformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ConfigError) as error:
        SelfAttention(8, num_heads=2, attention_backend="xformers")
    assert str(error.value) == (
        "attention_backend=xformers needs the package xformers; "
        "run pip install 'dinov2-adapt[xformers]' or use attention_backend=sdpa"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [False, True])
def test_xformers_agrees_with_sdpa(rotated):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("xformers.ops", reason="needs the extra xformers")
    torch.manual_seed(0)
    layout = ((4, 197), (16, 37))
    results = []
    qkv = torch.randn(sum(b * n for b, n in layout), 3 * 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    embedding = RopePositionEmbedding(128, num_heads=2).cuda()
    rotations = [embedding(14, 14, num_prefix=1), embedding(6, 6, num_prefix=1)] if rotated else None
    for backend in ("sdpa", "xformers"):
        out = attention(qkv, layout, num_heads=2, backend=backend, rotations=rotations)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), qkv)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits


def test_biases_can_be_left_out():
    layer = SelfAttention(8, num_heads=2, qkv_bias=False, proj_bias=False)
    assert {name for name, _ in layer.named_parameters()} == {"qkv.weight", "proj.weight"}


@pytest.mark.parametrize(("masked", "rotated"), [(False, False), (True, True)])
def test_weights_of_the_first_token_make_its_output(masked, rotated):
    attention = SelfAttention(32, num_heads=2, mask_k_bias=masked)
    attention.init_weights()
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(3, 9, 32)
    rotation = RopePositionEmbedding(32, num_heads=2)(2, 4, num_prefix=1) if rotated else None
    weights = attention.first_token_weights(x, rotation)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))
    values = attention.qkv(x)[..., 64:].unflatten(-1, (2, 16))
    taken_up = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)
    out = attention(x.flatten(0, 1), ((3, 9),), None if rotation is None else (rotation,))
    torch.testing.assert_close(attention.proj(taken_up), out.view(3, 9, 32)[:, 0])
