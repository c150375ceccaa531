"""A transformer block against its formula, on plain and on packed tokens."""

import pytest
import torch

from dinov2.layers.block import Block
from dinov2.layers.packing import pack, unpack


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_equals_its_formula_on_plain_and_packed_tokens(init_values):
    torch.manual_seed(0)
    block = Block(16, 2, init_values=init_values)
    scale = init_values or 1.0
    tokens = [torch.randn(2, 5, 16), torch.randn(3, 4, 16)]
    wanted = []
    for x in tokens:
        y = x + scale * block.attn(block.norm1(x).flatten(0, 1), (tuple(x.shape[:2]),)).view_as(x)
        wanted.append(y + scale * block.mlp(block.norm2(y)))
    torch.testing.assert_close([block(x) for x in tokens], wanted)
    packed, layout = pack(tokens)
    torch.testing.assert_close(unpack(block(packed, layout), layout), wanted)


def test_init_weights_sets_every_parameter():
    block = Block(16, 2, init_values=0.5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.init_weights()
    assert all(parameter.isfinite().all() for parameter in block.parameters())
