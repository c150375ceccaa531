"""A transformer block against its formula, on plain and on packed tokens."""

import pytest
import torch

from dinov2.layers.block import Block
from dinov2.layers.norms import NORM_LAYERS
from dinov2.layers.packing import pack, unpack
from dinov2.layers.rope import RopePositionEmbedding


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("init_values", [None, 0.5])
def test_equals_its_formula_on_plain_and_packed_tokens(init_values, rotated):
    torch.manual_seed(0)
    block = Block(16, 2, init_values=init_values)
    scale = init_values or 1.0
    tokens = [torch.randn(2, 5, 16), torch.randn(3, 4, 16)]
    rope = RopePositionEmbedding(16, num_heads=2)
    rotations = [[rope(2, 2, num_prefix=1)], [rope(1, 3, num_prefix=1)]] if rotated else [None, None]
    wanted = []
    for x, rotation in zip(tokens, rotations, strict=True):
        y = x + scale * block.attn(block.norm1(x).flatten(0, 1), (tuple(x.shape[:2]),), rotation).view_as(x)
        wanted.append(y + scale * block.mlp(block.norm2(y)))
    plain = [block(x, rotations=rotation) for x, rotation in zip(tokens, rotations, strict=True)]
    torch.testing.assert_close(plain, wanted)
    packed, layout = pack(tokens)
    of_both = [rotation for (rotation,) in rotations] if rotated else None
    torch.testing.assert_close(unpack(block(packed, layout, of_both), layout), wanted)


@pytest.mark.parametrize("norm_layer", NORM_LAYERS)
def test_init_weights_sets_every_parameter_and_buffer(norm_layer):
    block = Block(16, 2, init_values=0.5, norm_layer=NORM_LAYERS[norm_layer], mask_k_bias=True)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.fill_(float("nan"))
    block.init_weights()
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())
