"""Low-rank updates: what the layer computes, how it starts, and the plain layer that computes the same."""

import pytest
import torch
from torch import nn

from dinov2.errors import ConfigError
from dinov2.layers import LinearKMaskedBias
from dinov2.layers.lora import add_low_rank_updates, first_updates, low_rank_updates, merge_update, update_parameters


class Attention(nn.Module):
    def __init__(self, qkv):
        super().__init__()
        self.qkv, self.proj = qkv, nn.Linear(6, 6)


@pytest.fixture(params=[lambda: nn.Linear(6, 9), lambda: nn.Linear(6, 9, bias=False), lambda: LinearKMaskedBias(6, 9)])
def network(request):
    torch.manual_seed(0)
    return Attention(request.param())


def add(network, **options):
    add_low_rank_updates(network, **{"targets": ["qkv"], "rank": 2, "alpha": 6.0} | options)


def test_training_starts_from_the_given_layer(network):
    x, weight = torch.randn(4, 6), network.qkv.weight
    before, names = network.qkv(x), list(network.state_dict())
    add(network)
    network.load_state_dict(first_updates(network, torch.Generator().manual_seed(3)), strict=False)
    assert torch.equal(network.qkv(x), before) and network.qkv.weight is weight
    assert update_parameters(network) == {"qkv.lora_a", "qkv.lora_b"}
    assert [name for name in network.state_dict() if "lora" not in name] == names
    assert network.qkv.lora_a.abs().max() <= 6**-0.5 and network.qkv.lora_a.std() > 0.1


def test_first_values_depend_on_the_seed_alone(network):
    add(network, targets=["qkv", "proj"])
    drawn = [first_updates(network, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert drawn[0].keys() == update_parameters(network)
    for name, values in drawn[0].items():
        assert torch.equal(values, drawn[1][name])
        assert name.endswith("lora_b") or not torch.equal(values, drawn[2][name])


def test_the_product_is_added_and_can_be_merged(network):
    add(network)
    nn.init.normal_(network.qkv.lora_a), nn.init.normal_(network.qkv.lora_b)
    x = torch.randn(5, 6, requires_grad=True)
    with torch.no_grad():
        plain = merge_update(network.qkv.weight, network.qkv.lora_a, network.qkv.lora_b, scale=3.0)
        torch.testing.assert_close(plain, network.qkv.weight + 3 * network.qkv.lora_b @ network.qkv.lora_a)
    out = network.qkv(x)
    network.qkv.weight.data = plain
    network.qkv.lora_b.data.zero_()
    torch.testing.assert_close(out, network.qkv(x))
    out.sum().backward()
    assert network.qkv.lora_a.grad is not None and x.grad is not None


def test_dropout_acts_on_the_product_in_training_alone(network):
    add(network, dropout=0.5)
    nn.init.normal_(network.qkv.lora_a), nn.init.normal_(network.qkv.lora_b)
    x = torch.randn(5, 6)
    assert not torch.equal(network.qkv(x), network.qkv(x))
    network.eval()
    assert torch.equal(network.qkv(x), network.qkv(x))


def test_only_the_targets_that_are_there_and_not_left_out_get_updates(network):
    add(network, targets=["qkv", "proj", "w12"], but_for={"qkv.weight"})
    assert [name for name, _ in low_rank_updates(network)] == ["proj"]
    with pytest.raises(ConfigError) as caught:
        add(network, targets=["w12", "w3"])
    assert str(caught.value) == "lora.targets=['w12', 'w3']: the backbone has none of these layers; use qkv and proj"
